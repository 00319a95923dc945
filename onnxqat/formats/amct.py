"""The record file of Ascend's AMCT: protobuf's text form, one record for each layer.

::

    record {
      key: "Conv_0"
      value {
        scale_d: 0.02
        offset_d: -12
        scale_w: 0.001                  repeated for each channel (Conv only)
        offset_w: 0
      }
    }

(CANN documentation atlasamct_16_0165; OpenPPL/ppq ``ppq/parser/ascend_export.py``, which adds
fields of the Caffe variant.) Keys are node names, escaped as protobuf's text form requires.
``scale_d`` is the scale of the layer's input, ``offset_d`` its int8 zero_point. An op that reads
two tensors at different scales cannot have a record, and is listed as left out. Floats are float32
in the .proto file, and are written with all their digits. Proof: format only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from google.protobuf.text_encoding import CEscape, CUnescape

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written, edges_of, refuse
from onnxqat.operators import CONVOLUTIONS
from onnxqat.plan import QuantPlan, QuantPoint

__all__ = ["AMCT"]

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|[{}:]|[^\s{}:"#]+|#[^\n]*|\n|[^\S\n]+|"')
_SKIPPED = ("shift_bit", "channels", "height", "width", "skip_fusion", "is_tensor_quantize",
            "tensor_balance_factor", "op_data_type", "act_type", "wts_type")  # fmt: skip


@dataclass
class _Record:
    """The fields of one record."""

    scale_d: list[float] = field(default_factory=list)
    offset_d: list[float] = field(default_factory=list)
    scale_w: list[float] = field(default_factory=list)
    offset_w: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Layer:
    """A node with quantized inputs, and their points."""

    node: gs.Node
    inputs: tuple[QuantPoint, ...]
    weights: tuple[QuantPoint, ...]


def _layers(graph: gs.Graph, plan: QuantPlan) -> Iterator[_Layer]:
    edges = edges_of(plan)
    for node in graph.nodes:
        points = [edges[node.name, i] for i in range(len(node.inputs)) if (node.name, i) in edges]
        inputs = tuple(p for p in points if p.role == "activation")
        if points:
            yield _Layer(node, inputs, tuple(p for p in points if p.role == "weight"))


def _write(source: Calibrated) -> Written:
    refuse(_problems(source), "An AMCT record cannot hold this. Insert with the rule ascend")
    texts, left_out, covered = [], [], set[str]()
    for layer in _layers(source.graph, source.plan):
        first, *others = (source.params(p) for p in layer.inputs)
        if not all(first.same_as(other) for other in others):
            left_out.append(layer.node.name)
            continue
        covered.update(p.parameters for p in (*layer.inputs, *layer.weights))
        values = [("scale_d", float(first.scale)), ("offset_d", int(first.zero_point))]
        for point in layer.weights:
            scales = np.atleast_1d(source.params(point).scale).tolist()
            values += [("scale_w", scale) for scale in scales]
            values += [("offset_w", 0)] * len(scales)
        fields = "".join(f"    {name}: {value!r}\n" for name, value in values)
        key = CEscape(layer.node.name, as_utf8=False)
        texts.append(f'record {{\n  key: "{key}"\n  value {{\n{fields}  }}\n}}\n')
    unequal = {"ops with inputs at two scales": tuple(left_out)} if left_out else {}
    rest = source.others(covered, "activation", "weight")
    return Written(
        files={"table": "".join(texts)}, left_out=unequal | rest | source.left_out("biases")
    )


def _problems(source: Calibrated) -> Iterator[str]:
    for layer in _layers(source.graph, source.plan):
        name, op = layer.node.name, layer.node.op
        if len(layer.weights) > 1 or not layer.inputs:
            yield f"'{name}' ({op}) has no quantized activation, or two weights"
        for point in (*layer.inputs, *layer.weights):
            params = source.params(point)
            if point.spec.bits != 8 or not params.signed:
                yield f"'{point.tensor}' is not int8"
            if point.role == "weight" and np.any(params.zero_point):
                yield f"weight '{point.tensor}' has a zero_point"
            if point.spec.axis is not None and op not in CONVOLUTIONS:
                yield f"'{point.tensor}' is per-axis, but '{name}' is a {op}"


class _Tokens:
    """The words of a text; ``line`` is the line of the current one."""

    def __init__(self, table: Table) -> None:
        self.name = table.name
        self.line = 1
        self.words = self._split(table.text())
        self.word = next(self.words)

    def _split(self, text: str) -> Iterator[str]:
        for match in _TOKEN.finditer(text):
            word = match[0]
            if word == "\n":
                self.line += 1
            elif not word.isspace() and not word.startswith("#"):
                yield word
        yield ""

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.name}:{self.line}: {message}. Write the record file again.")

    def take(self, expected: str | None = None) -> str:
        word = self.word
        if expected is not None and word != expected:
            found = f"'{word[:40]}'" if word else "the end of the file"
            raise self.error(f"expected '{expected}', found {found}")
        self.word = next(self.words, "")
        return word

    def accept(self, word: str) -> bool:
        found = self.word == word
        if found:
            self.take()
        return found


def _parse(table: Table) -> dict[str, _Record]:
    """Read the records, by key."""
    tokens = _Tokens(table)
    found: dict[str, _Record] = {}
    while tokens.word:
        tokens.take("record")
        tokens.accept(":")
        tokens.take("{")
        tokens.take("key")
        tokens.take(":")
        key = _name(tokens)
        if key in found:
            raise tokens.error(f"record {key[:80]!r} appears twice")
        tokens.take("value")
        tokens.accept(":")
        tokens.take("{")
        found[key] = _parse_value(tokens)
        tokens.take("}")
    return found


def _name(tokens: _Tokens) -> str:
    """Read a name in quotes."""
    word = tokens.take()
    try:
        name = str(CUnescape(word[1:-1]), "utf-8")
    except ValueError:
        name = ""
    if not name or word[0] != '"' or word[-1] != '"':
        raise tokens.error(f"{word[:40]!r} is not a name in quotes")
    return name


def _parse_value(tokens: _Tokens) -> _Record:
    record = _Record()
    while not tokens.accept("}"):
        name = tokens.take()
        tokens.take(":")
        text = tokens.take()
        if name in _SKIPPED:
            continue
        if name not in vars(record):
            raise tokens.error(f"'{name[:40]}' is not a field of a record")
        vars(record)[name].append(_parse_number(text, tokens))
    if len(record.scale_d) != 1 or len(record.offset_d) > 1:
        raise tokens.error("a record needs one scale_d and one offset_d")
    if any(record.offset_w):
        raise tokens.error("offset_w must be 0")
    return record


def _parse_number(text: str, tokens: _Tokens) -> float:
    if not re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{0,60})?([eE][-+]?[0-9]{1,2})?f?", text):
        raise tokens.error(f"'{text[:40]}' is not a number")
    return float(text.rstrip("f"))


def _named(graph: gs.Graph, plan: QuantPlan) -> set[str]:
    """Return the parameters that always have a record: those of ops with one input grid."""
    layers = [x for x in _layers(graph, plan) if len({p.parameters for p in x.inputs}) == 1]
    return {p.parameters for layer in layers for p in (*layer.inputs, *layer.weights)}


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, records = Found(table.name, graph), _parse(table)
    for layer in _layers(graph, plan):
        name = layer.node.name
        record = records.pop(name, None)
        if record is None:  # another record may have its points
            continue
        offset = record.offset_d[0] if record.offset_d else 0.0
        if offset != int(offset) or abs(offset) > 255:
            raise FormatError(f"{table.name}: '{name}' has offset_d {offset}. Write an int8.")
        for point in layer.inputs:
            found.put(point, record.scale_d[0], int(offset), signed=True, name=name)
        for point in layer.weights:
            found.put(point, record.scale_w, signed=True, name=name)
    lacking = [p for p in plan.grid_points() if p.parameters not in found.params]
    named = _named(graph, plan)
    found.missing += [p.tensor for p in lacking if p.parameters in named]
    found.unsaid += [p.tensor for p in lacking if p.parameters not in named]
    found.unused += records
    return found


AMCT = Format(
    summary="record file of Ascend's AMCT",
    files={"table": "amct_record.txt"},
    writer=_write,
    read=_read,
)
