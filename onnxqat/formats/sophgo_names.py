"""The names under which Sophgo's compiler looks up each tensor.

tpu-mlir names an op ``<output tensor>_<OpType>``, after the ONNX node that computes the tensor
(``python/transform/OnnxConverter.py``); graph inputs keep their names. After fusing Conv + Relu it
looks up the Relu; the table has the same numbers under the Conv's name, so that both are found. The
name of a weight is ``<op>_weight``, where the op is the last of the fused chain. The compiler's
simplifier turns a two-dimensional MatMul and the Add that follows it into a Gemm, and then looks up
``<output of the Add>_Gemm``; it stops if that is missing (seen with tpu-mlir 1.30.2). The table
therefore has such an Add under both names.

A plan with asymmetric activations makes a table for ``model_deploy.py --asymmetric``. The compiler
still makes the ranges of Abs, Sub and Mul symmetric there (``lib/Dialect/Top/Transforms/
ImportCalibration.cpp``, ``getMinMax``).

A plan with ops of 4 bits makes a table for ``model_deploy.py --quantize INT4``. Only convolutions
that are not depthwise and products with a constant compute with 4 bits (``isInt4Op`` in
``lib/Support/Module.cpp``); the qtable names the other convolutions and products as ``INT8``. Every
tensor of 4 bits also has a line of 8 bits with the same range, for the ops that write it or read it
in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats import sophgo, sophgo_grids
from onnxqat.formats.format import Calibrated, Format, Found, Key, Table, Written, edges_of
from onnxqat.formats.table import CalibrationTable, Threshold, WeightScales
from onnxqat.nodes import is_convolution, is_depthwise, output_channels, takes_grid
from onnxqat.operators import WEIGHTED
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule

__all__ = ["SOPHGO", "found_in", "int4_ops", "is_asymmetric", "op_modes", "table_of"]

MADE_SYMMETRIC = ("Abs", "Sub", "Mul")  # ops whose output the compiler quantizes symmetrically
LEAST_SHARE = 126.5 / 128  # a symmetric range reaches at least this share of the threshold
MAX_F16 = 65504  # the largest float16
# tpu_mlir 1.30.2 python/transform/OnnxConverter.py: its defaults are not those of ONNX
STATED = {
    "AveragePool": ("strides",),
    "BatchNormalization": ("epsilon",),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LRN": ("alpha", "beta", "bias"),
    "LeakyRelu": ("alpha",),
    "MaxPool": ("strides",),
    "Split": ("axis",),
}
INT4_WEIGHTS = ("Conv", "Gemm", "MatMul")  # ops that may compute with 4 bits


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

    def of_end(self, node: gs.Node) -> str:
        """Return the name of the op that a node runs as, the last of its chain."""
        return self.of_output(self.nodes[self.last.get(node.name, node.name)])

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
                    node = self.nodes[edge.node]
                    for name in self.with_alias(self.of_end(node), "_weight"):
                        yield name, point, _channels(node)

    def products(self) -> Iterator[tuple[str, bool]]:
        """Yield the names of weighted ops, and whether they compute with 4 bits."""
        edges = edges_of(self.plan)
        for node in self.graph.nodes:
            read = [edges.get((node.name, i)) for i in range(len(node.inputs))]
            points = [point for point in read if point is not None]
            if node.op in INT4_WEIGHTS and any(p.role == "weight" for p in points):
                small = len(points) == 2 and all(p.spec.bits <= 4 for p in points)
                for name in self.with_alias(self.of_end(node)):
                    yield name, small and not is_depthwise(node)

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


def is_asymmetric(plan: QuantPlan) -> bool:
    """Return whether activations are asymmetric, so that the table is for ``--asymmetric``."""
    return any(p.role == "activation" and not p.spec.symmetric for p in plan.grid_points())


def int4_ops(model: QuantizedModel, rule: HardwareRule | None = None) -> tuple[str, ...]:
    """Return the names of the ops that compute with 4 bits; none on a chip without 4 bits."""
    if rule is not None and not (4 in rule.weight_bits and 4 in rule.activation_bits):
        return ()
    names = _Names(model.floats.graph, model.plan)
    return tuple(name for name, small in names.products() if small)


def table_of(model: QuantizedModel, rule: HardwareRule | None = None) -> CalibrationTable:
    """Return the calibration table of a calibrated or fine-tuned Q/DQ model.

    Parameters
    ----------
    rule : HardwareRule, optional
        Rule of the plan; without it, the chip is taken to have 4 bits.

    Raises
    ------
    FormatError
        The model has weights with zero points other than 0, widths other than 8 and 4 bits, or
        asymmetric activations of 4 bits.
    """
    plan, params = model.plan, model.params
    names, asymmetric = _Names(model.floats.graph, plan), is_asymmetric(plan)
    activations: dict[str, Threshold] = {}
    int4: dict[str, Threshold] = {}
    weights: dict[str, WeightScales] = {}
    for name, point in names.activations():
        one = params[point.parameters]
        if asymmetric:
            _check_width(point, (8,), "an asymmetric Sophgo table holds 8 bits", "8")
            entry = sophgo_grids.span(float(one.scale), int(one.zero_point), one.signed)
        else:
            _check_sayable(point, one, (4, 8))
            entry = _threshold(point, one)
        if point.spec.bits == 4:
            _add(int4, name, entry)
        _add(activations, name, entry)
    shared = {p.parameters for _, p in names.activations()}
    for name, point, channels in names.weights():
        one = params[point.parameters]
        if not (asymmetric and point.parameters in shared):
            # a grid narrower than 8 bits is a part of the 8-bit grid with the same scale
            _check_sayable(point, one, range(2, 9))
        _add(weights, name, _scales(one, channels))
    mixed = any(p.spec.bits == 4 for p in plan.grid_points())
    return CalibrationTable(
        activations=activations,
        int4=int4,
        weights=weights,
        int4_ops=int4_ops(model, rule),
        work_mode="int4_and_int8_mix" if mixed else "QAT_all_int8",
    )


def _threshold(point: QuantPoint, params: QuantParams) -> Threshold:
    return sophgo_grids.threshold(float(params.scale), point.spec.bits, params.signed)


def _scales(params: QuantParams, channels: int) -> WeightScales:
    scales = np.atleast_1d(params.scale).astype(np.float64)
    zero_points = np.atleast_1d(params.zero_point).astype(np.int64)
    if channels:  # a grouped ConvTranspose repeats its scales for each group
        scales = np.tile(scales, channels // scales.size)
        zero_points = np.tile(zero_points, channels // zero_points.size)
    return WeightScales(scales=tuple(scales.tolist()), zero_points=tuple(zero_points.tolist()))


def _check_sayable(point: QuantPoint, params: QuantParams, widths: Collection[int]) -> None:
    if np.any(params.zero_point):
        raise FormatError(
            f"'{point.tensor}' has a zero_point other than 0; a Sophgo table holds symmetric "
            "weights, and activations that are all symmetric or all asymmetric. Insert with a "
            "Sophgo rule."
        )
    _check_width(point, widths, "a Sophgo table holds 8 and 4 bits", "8 or 4")


def _check_width(point: QuantPoint, widths: Collection[int], held: str, advice: str) -> None:
    if point.spec.bits not in widths:
        raise FormatError(
            f"'{point.tensor}' has {point.spec.bits} bits; {held}. Insert again with {advice} bits."
        )


_Entry = TypeVar("_Entry", Threshold, WeightScales)


def _add(section: dict[str, _Entry], name: str, entry: _Entry) -> None:
    if section.setdefault(name, entry) != entry:
        raise FormatError(
            f"Two tensors with different scales have the name '{name}' in a Sophgo table. Rename "
            "one of them in the model."
        )


def op_modes(model: QuantizedModel, rule: HardwareRule | None = None) -> dict[str, str]:
    """Return the mode of each op that does not run in the mode of the whole model.

    These are the ops that run in float on the chip, and beside ops of 4 bits those of 8. The mode
    of float ops is ``float_type`` of the rule, ``F32`` without a rule. An op with a constant that
    F16 cannot hold is in F32.
    """
    names = _Names(model.floats.graph, model.plan)
    float_type = "F32" if rule is None else rule.float_type
    modes = {names.of_output(node): _float_mode(node, float_type) for node in names.floats()}
    if small := int4_ops(model, rule):
        return {name: "INT8" for name, _ in names.products() if name not in small} | modes
    return modes


def _float_mode(node: gs.Node, float_type: str) -> str:
    constants = (t.values for t in node.inputs if isinstance(t, gs.Constant))
    large = any(np.any(np.abs(v) > MAX_F16) for v in constants if v.dtype == np.float32)
    return "F32" if large and float_type == "F16" else float_type


def _keys(graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    names = _Names(graph, plan)
    for name, point in names.activations():
        yield Key(name, point.parameters, "int4" if point.spec.bits == 4 else "activations")
    for name, point, _ in names.weights():
        yield Key(name, point.parameters, "weights")
    for node in names.floats():
        yield Key(names.of_output(node), section="qtable")


def _write(source: Calibrated) -> Written:
    model, plan = source.model, source.plan
    files = {"table": sophgo.write(table_of(model, source.rule))}
    if modes := op_modes(model, source.rule):
        files["qtable"] = sophgo.write_qtable(modes)
    left_out = source.left_out("biases")
    written = {t.name for n in source.graph.nodes if n.op in MADE_SYMMETRIC for t in n.outputs}
    again = [p.tensor for p, params in source.points("activation")
             if p.tensor in written and np.any(params.zero_point)]  # fmt: skip
    if again and is_asymmetric(plan):
        left_out["asymmetric ranges of Abs, Sub and Mul"] = tuple(again)
    return Written(files=files, left_out=left_out)


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
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
    asymmetric = is_asymmetric(plan)
    for name, point in names.activations():
        lines = table.int4 if point.spec.bits == 4 else table.activations
        if name in lines:
            put = _put_span if asymmetric else _put_threshold
            put(found, point, lines[name], name)
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


def _put_threshold(found: Found, point: QuantPoint, entry: Threshold, name: str) -> None:
    """Add the parameters of a symmetric activation.

    Sophgo's own writer gives the range of -128 to 127 for it, and the threshold of 128.
    """
    if entry.low < 0 and (
        not math.isclose(-entry.low, entry.threshold, rel_tol=1e-6)
        or entry.high < LEAST_SHARE * entry.threshold
    ):
        raise FormatError(_other_symmetry(found, name, entry, "asymmetric", "symmetric"))
    scale, signed = sophgo_grids.scale_of(entry, point.spec.bits)
    found.put(point, scale, signed=signed, name=name)


def _put_span(found: Found, point: QuantPoint, entry: Threshold, name: str) -> None:
    """Add the parameters of an asymmetric activation, whose 255 steps never split equally at 0."""
    if entry.low == -entry.high:
        raise FormatError(_other_symmetry(found, name, entry, "symmetric", "asymmetric"))
    signed = found.signed(point, name, lowest=entry.low >= 0)
    scale, zero_point = sophgo_grids.span_of(entry, signed=signed)
    found.put(point, scale, zero_point, signed=signed, name=name)


def _other_symmetry(found: Found, name: str, entry: Threshold, has: str, wanted: str) -> str:
    return (
        f"{found.source}: '{name}' has the {has} range {entry.low} to {entry.high}, but is "
        f"{wanted} in the plan. Are --rules and --set those that the table was made with?"
    )


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
    stated=STATED,
)
