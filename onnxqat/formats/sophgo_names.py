"""The names under which Sophgo's compiler looks up each tensor.

tpu-mlir names an op ``<output tensor>_<OpType>``, after the ONNX node that computes the tensor
(``python/transform/OnnxConverter.py``); graph inputs keep their names. After fusing Conv + Relu it
looks up the Relu; the table has the same numbers under the Conv's name, so that both are found. The
name of a weight is ``<op>_weight``, where the op is the last of the fused chain. The compiler's
simplifier turns a two-dimensional MatMul and the Add that follows it into a Gemm, and then looks up
``<output of the Add>_Gemm``; it stops if that is missing (seen with tpu-mlir 1.30.2). The table
therefore has such an Add under both names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats import sophgo
from onnxqat.formats.format import Calibrated, Format, Found, Key, Table, Written
from onnxqat.formats.table import CalibrationTable, Threshold, WeightScales
from onnxqat.nodes import is_convolution, output_channels, takes_grid
from onnxqat.operators import WEIGHTED
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams
from onnxqat.quantized import QuantizedModel

__all__ = ["SOPHGO", "float_ops", "found_in", "table_of"]


class _Names:
    """The names of one float graph under one plan."""

    def __init__(self, graph: gs.Graph, plan: QuantPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.nodes = {n.name: n for n in graph.nodes}
        self.last = {name: chain[-1] for chain in plan.chains for name in chain}
        self.points = {p.tensor: p for p in plan.grid_points()}
        inner = (name for chain in plan.chains for name in chain[:-1])
        self.inner = {self.nodes[name].outputs[0].name for name in inner}
        self.outputs = {t.name for t in graph.outputs}
        adds = (self.nodes[name] for chain in plan.chains for name in chain[1:])
        heads = {name: self.nodes[chain[0]].op for chain in plan.chains for name in chain}
        self.aliases = {
            f"{add.outputs[0].name}_Add": f"{add.outputs[0].name}_Gemm"
            for add in adds
            if add.op == "Add" and heads[add.name] == "MatMul"
        }

    def with_alias(self, name: str, suffix: str = "") -> Iterator[str]:
        """Yield a name, and its second name if the compiler turns the op into a Gemm."""
        yield f"{name}{suffix}"
        if name in self.aliases:
            yield f"{self.aliases[name]}{suffix}"

    def is_alias(self, name: str) -> bool:
        """Return whether a name is only an alias, which a table need not contain."""
        return name.removesuffix("_weight") in self.aliases.values()

    def of_output(self, node: gs.Node, index: int = 0) -> str:
        return f"{node.outputs[index].name}_{node.op}"

    def activations(self) -> Iterator[tuple[str, QuantPoint]]:
        """Yield every name of every activation, inner tensors of chains included."""
        for tensor in self.graph.inputs:
            if tensor.name in self.points:
                yield tensor.name, self.points[tensor.name]
        for node in self.graph.nodes:
            for i, tensor in enumerate(node.outputs):
                end = self.nodes[self.last.get(node.name, node.name)]
                source = tensor.name if tensor.name in self.points else end.outputs[0].name
                if source in self.points:
                    for name in self.with_alias(self.of_output(node, i)):
                        yield name, self.points[source]

    def weights(self) -> Iterator[tuple[str, QuantPoint, int]]:
        """Yield every name of every weight (one per consumer), its point and the scales needed.

        The compiler always quantizes a convolution per output channel and reads that many scales,
        so a per-tensor scale must be repeated. A count of 0 means as many scales as the grid has.
        """
        for point in self.plan.grid_points():
            if point.role == "weight":
                for edge in point.consumers:
                    end = self.nodes[self.last.get(edge.node, edge.node)]
                    for name in self.with_alias(self.of_output(end), "_weight"):
                        yield name, point, _channels(self.nodes[edge.node])

    def floats(self) -> Iterator[gs.Node]:
        """Yield the nodes that run in float: skipped nodes, and nodes with unquantized tensors.

        A chain runs as one node; if one of its nodes is in float, the whole chain is.
        """
        skipped = {skip.node for skip in self.plan.skips}
        off = (n.name for n in self.graph.nodes if n.name in skipped or self._is_off_grid(n))
        ends = {self.last.get(name, name) for name in off}
        for node in self.graph.nodes:
            if node.outputs[0].dtype == np.float32 and self.last.get(node.name, node.name) in ends:
                yield node

    def _is_off_grid(self, node: gs.Node) -> bool:
        """Return whether a node reads or writes data that are not quantized."""
        read = [t for i, t in enumerate(node.inputs) if takes_grid(node, i)]
        if node.op not in WEIGHTED:  # for other ops the rule may leave constants in float
            read = [t for t in read if not isinstance(t, gs.Constant)]
        written = [t for t in node.outputs if t.outputs or t.name in self.outputs]
        return any(
            t.dtype == np.float32 and t.name not in self.points and t.name not in self.inner
            for t in (*read, *written)
        )


def _channels(node: gs.Node) -> int:
    """Return the number of output channels of a convolution; 0 for other ops."""
    return (output_channels(node, node.inputs[1].shape) or 0) if is_convolution(node) else 0


def table_of(model: QuantizedModel) -> CalibrationTable:
    """Return the calibration table of a calibrated or fine-tuned Q/DQ model.

    Raises
    ------
    FormatError
        The model has zero points other than 0 or widths other than 8 and 4 bits.
    """
    plan, params = model.plan, model.params
    names = _Names(model.floats.graph, plan)
    activations: dict[str, Threshold] = {}
    int4: dict[str, Threshold] = {}
    weights: dict[str, WeightScales] = {}
    for name, point in names.activations():
        _check_sayable(point, params[point.parameters], (4, 8))
        section = int4 if point.spec.bits == 4 else activations
        _add(section, name, _threshold(point, params[point.parameters]))
    for name, point, channels in names.weights():
        # a grid narrower than 8 bits is a part of the 8-bit grid with the same scale
        _check_sayable(point, params[point.parameters], range(2, 9))
        _add(weights, name, _scales(params[point.parameters], channels))
    mixed = any(p.spec.bits == 4 for p in plan.grid_points())
    return CalibrationTable(
        activations=activations,
        int4=int4,
        weights=weights,
        work_mode="int4_and_int8_mix" if mixed else "QAT_all_int8",
    )


def _threshold(point: QuantPoint, params: QuantParams) -> Threshold:
    return sophgo.threshold(float(params.scale), point.spec.bits, params.signed)


def _scales(params: QuantParams, channels: int) -> WeightScales:
    scales = np.atleast_1d(params.scale).astype(np.float64)
    if channels:  # a grouped ConvTranspose repeats its scales for each group
        scales = np.tile(scales, channels // scales.size)
    return WeightScales(scales=tuple(scales.tolist()), zero_points=(0,) * scales.size)


def _check_sayable(point: QuantPoint, params: QuantParams, widths: Collection[int]) -> None:
    if np.any(params.zero_point):
        raise FormatError(
            f"'{point.tensor}' has a zero_point other than 0; a Sophgo table holds symmetric "
            "ranges only. Insert with a Sophgo rule."
        )
    if point.spec.bits not in widths:
        raise FormatError(
            f"'{point.tensor}' has {point.spec.bits} bits; a Sophgo table holds 8 and 4 bits. "
            "Insert again with 8 or 4 bits."
        )


_Entry = TypeVar("_Entry", Threshold, WeightScales)


def _add(section: dict[str, _Entry], name: str, entry: _Entry) -> None:
    if section.setdefault(name, entry) != entry:
        raise FormatError(
            f"Two tensors with different scales have the name '{name}' in a Sophgo table. Rename "
            "one of them in the model."
        )


def float_ops(model: QuantizedModel) -> list[str]:
    """Return the names of the ops that run in float on the chip, for the ``qtable``."""
    names = _Names(model.floats.graph, model.plan)
    return [names.of_output(node) for node in names.floats()]


def _keys(graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    names = _Names(graph, plan)
    for name, point in names.activations():
        yield Key(name, point.parameters, "int4" if point.spec.bits == 4 else "activations")
    for name, point, _ in names.weights():
        yield Key(name, point.parameters, "weights")
    for node in names.floats():
        yield Key(names.of_output(node), section="qtable")


def _write(source: Calibrated) -> Written:
    files = {"table": sophgo.write(table_of(source.model))}
    if floats := float_ops(source.model):
        files["qtable"] = sophgo.write_qtable(floats)
    return Written(files=files, left_out=source.left_out("biases"))


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    if not all(p.spec.symmetric for p in plan.grid_points()):
        raise FormatError(
            f"{table.name}: cannot be read under the rule '{plan.rule}', which is asymmetric; a "
            "Sophgo table holds symmetric ranges only. Give --rules the rule it was made with."
        )
    return found_in(sophgo.read(table.text(), table.name), graph, plan, table.name)


def found_in(table: CalibrationTable, graph: gs.Graph, plan: QuantPlan, source: str) -> Found:
    """Find the parameters that a table gives the points of ``plan``: inverse of `table_of`.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        The float graph that the plan was made for.
    source : str
        Name of the table, for messages.

    Raises
    ------
    FormatError
        Two lines that must agree differ, or a weight has the wrong number of scales.
    """
    names, found = _Names(graph, plan), Found(source, graph)
    for name, point in names.activations():
        lines = table.int4 if point.spec.bits == 4 else table.activations
        if name in lines:
            scale, signed = sophgo.scale_of(lines[name], point.spec.bits)
            found.put(point, scale, signed=signed, name=name)
        elif not names.is_alias(name):
            found.missing.append(name)
    for name, point, _ in names.weights():
        if name in table.weights:
            _put_weight(found, point, table.weights[name], name)
        elif not names.is_alias(name):
            found.missing.append(name)
    known = {name for name, *_ in (*names.activations(), *names.weights())}
    all_lines = (*table.activations, *table.int4, *table.weights)
    found.unused += [name for name in all_lines if name not in known]
    return found


def _put_weight(found: Found, point: QuantPoint, entry: WeightScales, name: str) -> None:
    """Add the scales of a weight; the table may repeat them."""
    axis = point.spec.axis
    count = 1 if axis is None else int(found.tensors[point.tensor].shape[axis])
    scales = np.asarray(entry.scales)
    if scales.size % count == 0 and (scales.reshape(-1, count) == scales[:count]).all():
        scales = scales[:count]
    # a constant has the signedness of its group
    shared = found.params.get(point.parameters)
    signed = shared.signed if shared is not None else point.spec.signedness != "unsigned"
    found.put(point, scales, entry.zero_points[: scales.size], signed=signed, name=name)


SOPHGO = Format(
    summary="cali_table and qtable of Sophgo's tpu-mlir",
    files={"table": "cali_table", "qtable": "qtable"},
    writer=_write,
    read=_read,
    keys=_keys,
    misread=sophgo.misread,
)
