"""Compare a node with its operator: number of inputs and outputs, attributes, ranks.

The numbers and the attributes come from ONNX's schemas. `RANKS`, `FILLED`, `LIMITS` and the
rules for windows go further than the schemas: onnxruntime 1.19.2 divides by a stride or a group
of 0 and reads beyond the end of weights of a wrong rank, which crashes the process. These cases
were found by running about 70 operators and corrupting their inputs and attributes one by one.
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

Shape = Sequence[int | None] | None  # None: the length, or the whole shape, is unknown

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
MAX_SIZE = 2**31  # for a window, stride, dilation, pad or group

# For each operator and input: the rank that ONNX defines. https://onnx.ai/onnx/operators
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
# For each operator: the inputs that may not be empty.
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
# For each operator: an integer attribute, its smallest and its largest value.
LIMITS = {
    "DepthToSpace": ("blocksize", 1, 2**15),
    "GatherND": ("batch_dims", 0, 63),
    "SpaceToDepth": ("blocksize", 1, 2**15),
}


def label(node: NodeProto) -> str:
    """Return the name of a node in messages."""
    name = node.name or next((output for output in node.output if output), "")
    return f"node '{name}' ({node.op_type})"


def check_node(node: NodeProto, opset: int, shapes: Mapping[str, Shape], where: str) -> None:
    """Refuse a node that its operator does not allow.

    Parameters
    ----------
    node : onnx.NodeProto
        A node of the default domain. Operators that ONNX does not know get no schema check.
    opset : int
        The opset version of the default domain.
    shapes : mapping of str to sequence of int, or None
        The known shapes, by the name of the value.
    where : str
        The beginning of each message, such as the file's path.

    Raises
    ------
    ModelError
        The node breaks one of the rules in the module's docstring.
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
    """The checked parts of a schema, cached because reading them from the schema is slow."""

    inputs: tuple[bool, ...]  # for each parameter: may it be left out?
    outputs: tuple[bool, ...]
    counts: tuple[int, int, int, int]  # smallest and largest number of inputs, of outputs
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
    """Return the number that model files use for a schema's type; onnx's stubs do not type it."""
    return int(kind.value)


def _wrong_counts(node: NodeProto, facts: _Facts) -> str | None:
    fewest, most, fewest_out, most_out = facts.counts
    if not fewest <= len(node.input) <= most:
        return f"has {len(node.input)} inputs; the operator accepts {_between(fewest, most)}"
    if not fewest_out <= len(node.output) <= most_out:
        return (
            f"has {len(node.output)} outputs; the operator writes {_between(fewest_out, most_out)}"
        )
    for what, names, optional in (
        ("input", node.input, facts.inputs),
        ("output", node.output, facts.outputs),
    ):
        for index, name in enumerate(names):
            if not name and not optional[min(index, len(optional) - 1)]:
                return f"leaves out {what} {index}, which the operator requires"
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
            return f"has the attribute '{attribute.name}' of type {found}; it must be {right}"
        name, least, greatest = LIMITS.get(node.op_type, ("", 0, 0))
        if attribute.name == name and not least <= attribute.i <= greatest:
            return f"has {name} = {attribute.i}; it must be {least} to {greatest}"
    return None


def _wrong_ranks(node: NodeProto, shapes: Mapping[str, Shape]) -> str | None:
    for index, rank in RANKS.get(node.op_type, {}).items():
        shape = _shape(node, index, shapes)
        if shape is not None and len(shape) != rank:
            return f"reads '{node.input[index]}' of shape {list(shape)}; its rank must be {rank}"
    for index in FILLED.get(node.op_type, ()):
        shape = _shape(node, index, shapes)
        if shape is not None and 0 in shape:
            return f"reads '{node.input[index]}' of shape {list(shape)}, which is empty"
    return None


def _shape(node: NodeProto, index: int, shapes: Mapping[str, Shape]) -> Shape:
    return shapes.get(node.input[index]) if index < len(node.input) else None


def _wrong_window(node: NodeProto, shapes: Mapping[str, Shape]) -> str | None:
    given = {a.name: list(a.ints) for a in node.attribute if not a.ref_attr_name}
    weight = _shape(node, 1, shapes) if node.op_type in CONVOLUTIONS else None
    if weight is not None and len(weight) < 3:
        return f"has a weight '{node.input[1]}' of shape {list(weight)}; its rank must be 3 or more"
    data = _shape(node, 0, shapes)
    if data is not None and weight is not None and len(data) != len(weight):
        ranks = f"of rank {len(data)}, but a weight of rank {len(weight)}"
        return f"reads data '{node.input[0]}' {ranks}"
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
            return f"has {name} = {values}; each must be {lowest} or more"
        if axes and len(values) != count:
            return f"has {name} = {values}; {axes} spatial axes need {count} values"
    return _wrong_groups(node, weight, shapes)


def _wrong_groups(node: NodeProto, weight: Shape, shapes: Mapping[str, Shape]) -> str | None:
    group = next((a.i for a in node.attribute if a.name == "group" and not a.ref_attr_name), 1)
    if not 1 <= group < MAX_SIZE:
        return f"has group = {group}; it must be 1 or more"
    if weight is None or weight[0] is None or weight[1] is None:
        return None
    if weight[0] % group:
        return (
            f"has a weight '{node.input[1]}' of shape {list(weight)}, which {group} groups "
            "do not divide"
        )
    channels = convolution_channels(node.op_type, (weight[0], weight[1]), group)
    bias = _shape(node, 2, shapes)
    if bias is not None and bias[0] not in (channels, None):
        return f"has a bias '{node.input[2]}' of shape {list(bias)}, but {channels} channels"
    return None


def _wrong_gates(node: NodeProto, shapes: Mapping[str, Shape]) -> str | None:
    """Compare the shapes of W, R and B with the node's directions, gates and units."""
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
            found = f"'{node.input[index]}' of shape {list(shape or ())}"
            return f"reads {found}; the operator needs {wanted}"
    return None
