"""A node against the operator that it names: how many inputs, which attributes, which ranks.

The counts and the attributes are those of ONNX's schemas. `RANKS`, `FILLED`, `LIMITS` and the
rules for windows say more: onnxruntime 1.19.2 divides by a stride or a group of 0, and reads
behind the end of weights of another rank, and with it dies whoever asked it. They were found by
running some 70 operators with each of their inputs and attributes spoiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx
from onnx import AttributeProto, NodeProto
from onnx.defs import OpSchema, SchemaError

from onnxqat.errors import ModelError
from onnxqat.operators import CONVOLUTIONS, OPERATORS, RECURRENT, WINDOWED, convolution_channels

__all__ = ["ATTRIBUTE_LISTS", "ATTRIBUTE_SINGLES", "Shape", "check_node", "label"]

Shape = Sequence[int | None] | None  # None for a length, or a shape, that is not known

ATTRIBUTE_LISTS = {
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}
ATTRIBUTE_SINGLES = (
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
)
MAX_SIZE = 2**31  # of a window, stride, dilation, pad or group

# By operator and input: the rank that ONNX defines. https://onnx.ai/onnx/operators
_RECURRENT = {0: 3, 1: 3, 2: 3, 3: 2, 4: 1, 5: 3}
RANKS: dict[str, dict[int, int]] = {
    "BatchNormalization": {1: 1, 2: 1, 3: 1, 4: 1},
    "Conv": {2: 1},
    "ConvTranspose": {2: 1},
    "Expand": {1: 1},
    "GRU": _RECURRENT,
    "Gemm": {0: 2, 1: 2},
    "InstanceNormalization": {1: 1, 2: 1},
    "LSTM": {**_RECURRENT, 6: 3, 7: 2},
    "Pad": {1: 1},
    "RNN": _RECURRENT,
    "Reshape": {1: 1},
    "Resize": {1: 1, 2: 1, 3: 1},
    "Slice": {1: 1, 2: 1, 3: 1, 4: 1},
    "Tile": {1: 1},
    "Upsample": {1: 1},
}
# By operator: the inputs that may not be empty.
FILLED: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "CumSum": (1,),
    "Einsum": (0, 1),
    "GRU": (0, 1, 2, 3),
    "LSTM": (0, 1, 2, 3),
    "LayerNormalization": (1, 2),
    "LpNormalization": (0,),
    "RNN": (0, 1, 2, 3),
}
# By operator: an integer attribute, and its least and greatest value.
LIMITS = {
    "DepthToSpace": ("blocksize", 1, 2**15),
    "GatherND": ("batch_dims", 0, 63),
    "SpaceToDepth": ("blocksize", 1, 2**15),
}


def label(node: NodeProto) -> str:
    """Return what a message calls a node."""
    name = node.name or next((output for output in node.output if output), "")
    return f"node '{name}' ({node.op_type})"


def check_node(node: NodeProto, opset: int, shapes: Mapping[str, Shape], where: str) -> None:
    """Refuse a node that is no use of its operator.

    Parameters
    ----------
    node : onnx.NodeProto
        A node of the default domain; an operator that ONNX does not know is left alone.
    opset : int
        That of the default domain.
    shapes : mapping of str to sequence of int, or None
        The shapes of values as far as they are known.
    where : str
        What messages begin with.

    Raises
    ------
    ModelError
        See the module's text.
    """
    facts = _facts(node.op_type, opset)
    wrong = None
    if facts is not None:
        wrong = _wrong_counts(node, facts) or _wrong_attributes(node, facts)
    wrong = wrong or _wrong_ranks(node, shapes)
    if not wrong and node.op_type in WINDOWED:
        wrong = _wrong_window(node, shapes)
    if not wrong and node.op_type in RECURRENT:
        wrong = _wrong_gates(node, shapes)
    if wrong:
        raise ModelError(f"{where}: {label(node)} {wrong}. Export it again.")


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What of a schema is looked at; reading it out of the schema is slow."""

    inputs: tuple[bool, ...]  # of each parameter, whether it may be left out
    outputs: tuple[bool, ...]
    counts: tuple[int, int, int, int]  # fewest and most inputs, fewest and most outputs
    types: dict[str, int]
    required: frozenset[str]


@lru_cache(maxsize=1024)
def _facts(op: str, opset: int) -> _Facts | None:
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except SchemaError:
        return None
    optional = OpSchema.FormalParameterOption.Optional
    return _Facts(
        inputs=tuple(p.option == optional for p in schema.inputs),
        outputs=tuple(p.option != OpSchema.FormalParameterOption.Single for p in schema.outputs),
        counts=(schema.min_input, schema.max_input, schema.min_output, schema.max_output),
        types={name: _number(a.type) for name, a in schema.attributes.items()},
        required=frozenset(name for name, a in schema.attributes.items() if a.required),
    )


def _number(kind: Any) -> int:
    """Return the number that files have for a schema's type; the stubs know no enumeration."""
    return int(kind.value)


def _wrong_counts(node: NodeProto, facts: _Facts) -> str | None:
    fewest, most, fewest_out, most_out = facts.counts
    if not fewest <= len(node.input) <= most:
        return f"has {len(node.input)} inputs; the operator takes {_between(fewest, most)}"
    if not fewest_out <= len(node.output) <= most_out:
        return (
            f"has {len(node.output)} outputs; the operator gives {_between(fewest_out, most_out)}"
        )
    for what, names, optional in (
        ("input", node.input, facts.inputs),
        ("output", node.output, facts.outputs),
    ):
        for index, name in enumerate(names):
            if not name and not optional[min(index, len(optional) - 1)]:
                return f"leaves {what} {index} out, which the operator needs"
    return None


def _between(fewest: int, most: int) -> str:
    if most >= 2**31 - 1:
        return f"{fewest} or more"
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def _wrong_attributes(node: NodeProto, facts: _Facts) -> str | None:
    names = {attribute.name for attribute in node.attribute}
    missing = sorted(facts.required - names)
    if missing:
        return f"lacks the attribute '{missing[0]}'"
    for attribute in node.attribute:
        expected = facts.types.get(attribute.name, attribute.type)
        if attribute.type != expected:
            kinds = AttributeProto.AttributeType
            found, right = kinds.Name(attribute.type), kinds.Name(expected)
            return f"has the attribute '{attribute.name}' as {found}; it is {right}"
        name, least, greatest = LIMITS.get(node.op_type, ("", 0, 0))
        if attribute.name == name and not least <= attribute.i <= greatest:
            return f"has the {name} {attribute.i}; it is {least} to {greatest}"
    return None


def _wrong_ranks(node: NodeProto, shapes: Mapping[str, Shape]) -> str | None:
    for index, rank in RANKS.get(node.op_type, {}).items():
        shape = _shape(node, index, shapes)
        if shape is not None and len(shape) != rank:
            return f"has '{node.input[index]}' of shape {list(shape)}; its rank is {rank}"
    for index in FILLED.get(node.op_type, ()):
        shape = _shape(node, index, shapes)
        if shape is not None and 0 in shape:
            return f"has '{node.input[index]}' of shape {list(shape)}, which is empty"
    return None


def _shape(node: NodeProto, index: int, shapes: Mapping[str, Shape]) -> Shape:
    return shapes.get(node.input[index]) if index < len(node.input) else None


def _wrong_window(node: NodeProto, shapes: Mapping[str, Shape]) -> str | None:
    given = {a.name: list(a.ints) for a in node.attribute if not a.ref_attr_name}
    weight = _shape(node, 1, shapes) if node.op_type in CONVOLUTIONS else None
    if weight is not None and len(weight) < 3:
        return f"has a weight '{node.input[1]}' of shape {list(weight)}; its rank is 3 or more"
    data = _shape(node, 0, shapes)
    if data is not None and weight is not None and len(data) != len(weight):
        ranks = f"of rank {len(data)} for a weight of rank {len(weight)}"
        return f"has data '{node.input[0]}' {ranks}"
    axes = len(weight) - 2 if weight is not None else len(given.get("kernel_shape", ()))
    for name, lowest, count in (
        ("kernel_shape", 1, axes),
        ("strides", 1, axes),
        ("dilations", 1, axes),
        ("pads", 0, 2 * axes),
        ("output_padding", 0, axes),
    ):
        values = given.get(name)
        if values is None:
            continue
        if any(not lowest <= value < MAX_SIZE for value in values):
            return f"has the {name} {values}; each is {lowest} or more"
        if axes and len(values) != count:
            return f"has the {name} {values}; there are {axes} spatial axes"
    return _wrong_groups(node, weight, shapes)


def _wrong_groups(node: NodeProto, weight: Shape, shapes: Mapping[str, Shape]) -> str | None:
    group = next((a.i for a in node.attribute if a.name == "group" and not a.ref_attr_name), 1)
    if not 1 <= group < MAX_SIZE:
        return f"has the group {group}; it is 1 or more"
    if weight is None or weight[0] is None or weight[1] is None:
        return None
    if weight[0] % group:
        return f"has a weight '{node.input[1]}' of shape {list(weight)} for {group} groups"
    channels = convolution_channels(node.op_type, (weight[0], weight[1]), group)
    bias = _shape(node, 2, shapes)
    if bias is not None and bias[0] not in (channels, None):
        return f"has a bias '{node.input[2]}' of shape {list(bias)} for {channels} channels"
    return None


def _wrong_gates(node: NodeProto, shapes: Mapping[str, Shape]) -> str | None:
    """Compare the weights W, R and B with the directions, gates and units that there are."""
    given = {attribute.name: attribute for attribute in node.attribute}
    if "hidden_size" not in given:
        return None
    units = given["hidden_size"].i
    directions = 2 if "direction" in given and given["direction"].s == b"bidirectional" else 1
    rows = OPERATORS[node.op_type].gates * units
    data = _shape(node, 0, shapes)
    for index, expected in (
        (1, (directions, rows, data[-1] if data else None)),
        (2, (directions, rows, units)),
        (3, (directions, 2 * rows)),
    ):
        shape = _shape(node, index, shapes)
        known = zip(shape or (), expected, strict=False)
        if any(None not in pair and pair[0] != pair[1] for pair in known):
            wanted = " x ".join("any" if size is None else str(size) for size in expected)
            return f"has '{node.input[index]}' of shape {list(shape or ())}; it takes {wanted}"
    return None
