"""Which name Sophgo's compiler looks up for each tensor, and what stands under it.

tpu-mlir names an op ``<tensor>_<OpType>`` after the ONNX node that made its output
(``python/transform/OnnxConverter.py``); graph inputs keep their bare name. After it fused
Conv + Relu it looks up the Relu's line; the Conv's line says the same, so that either is found.
A weight goes by ``<op>_weight``, the op being the last of its fused chain.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats import sophgo
from onnxqat.formats.table import CalibrationTable, Threshold, WeightScales
from onnxqat.insert import plan_of, read_params, strip
from onnxqat.model import Model
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams, storage_dtype

__all__ = ["float_ops", "params_from_table", "table_of"]


class _Names:
    """The names of one float graph under one plan."""

    def __init__(self, graph: gs.Graph, plan: QuantPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.nodes = {n.name: n for n in graph.nodes}
        self.last = {name: chain[-1] for chain in plan.chains for name in chain}
        self.points = {p.tensor: p for p in plan.grid_points()}

    def of_output(self, node: gs.Node, index: int = 0) -> str:
        return f"{node.outputs[index].name}_{node.op}"

    def activations(self) -> Iterator[tuple[str, QuantPoint]]:
        """Yield every name an activation goes by, inner tensors of chains included."""
        for tensor in self.graph.inputs:
            if tensor.name in self.points:
                yield tensor.name, self.points[tensor.name]
        for node in self.graph.nodes:
            for i, tensor in enumerate(node.outputs):
                end = self.nodes[self.last.get(node.name, node.name)]
                source = tensor.name if tensor.name in self.points else end.outputs[0].name
                if source in self.points:
                    yield self.of_output(node, i), self.points[source]

    def weights(self) -> Iterator[tuple[str, QuantPoint]]:
        """Yield every name a weight goes by: one for each node that reads it."""
        for point in self.plan.grid_points():
            if point.role == "weight":
                for edge in point.consumers:
                    end = self.nodes[self.last.get(edge.node, edge.node)]
                    yield f"{self.of_output(end)}_weight", point


def table_of(model: Model) -> CalibrationTable:
    """Return the calibration table of a calibrated or fine-tuned Q/DQ model.

    Raises
    ------
    FormatError
        The model has what the table cannot say: zero points, widths other than 8 and 4 bits.
    """
    plan, params = plan_of(model), read_params(model)
    names = _Names(strip(model).graph, plan)
    activations: dict[str, Threshold] = {}
    int4: dict[str, Threshold] = {}
    for name, point in names.activations():
        entry = params[point.parameters]
        if np.any(entry.zero_point):
            raise FormatError(
                f"'{point.tensor}' has zero_point {entry.zero_point}; a Sophgo table holds "
                "symmetric ranges only. Insert with a Sophgo rule."
            )
        if point.spec.bits not in (4, 8):
            raise FormatError(
                f"'{point.tensor}' has {point.spec.bits} bits; a Sophgo table holds 8 and 4."
            )
        section = int4 if point.spec.bits == 4 else activations
        section[name] = sophgo.threshold(float(entry.scale), point.spec.bits, entry.signed)
    weights = {}
    for name, point in names.weights():
        entry = params[point.parameters]
        zeros = tuple(np.atleast_1d(entry.zero_point).tolist())
        scales = tuple(np.atleast_1d(entry.scale).astype(np.float64).tolist())
        weights[name] = WeightScales(scales=scales, zero_points=zeros)
    mixed = int4 or any(p.spec.bits == 4 for p in plan.grid_points())
    return CalibrationTable(
        activations=activations,
        int4=int4,
        weights=weights,
        work_mode="int4_and_int8_mix" if mixed else "QAT_all_int8",
    )


def float_ops(model: Model) -> list[str]:
    """Return the names of the ops that run in float on the chip: the table has no line for them."""
    plan = plan_of(model)
    names = _Names(strip(model).graph, plan)
    return [
        names.of_output(names.nodes[skip.node])
        for skip in plan.skips
        if names.nodes[skip.node].outputs[0].dtype == np.float32
    ]


def params_from_table(
    graph: gs.Graph, plan: QuantPlan, table: CalibrationTable, source: str
) -> dict[str, QuantParams]:
    """Return the parameters that a table gives the points of ``plan``; undo `table_of`.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        The float graph the plan was made for.
    source : str
        Name of the table, for messages.

    Raises
    ------
    FormatError
        A name is missing, or two lines that must agree do not.
    """
    names = _Names(graph, plan)
    found: dict[str, QuantParams] = {}
    missing = []
    for name, point in names.activations():
        lines = table.int4 if point.spec.bits == 4 else table.activations
        if name not in lines:
            missing.append(name)
            continue
        scale, signed = sophgo.scale_of(lines[name], point.spec.bits)
        dtype = storage_dtype(point.spec, signed=signed)
        params = QuantParams(scale=np.asarray(scale), zero_point=np.zeros((), dtype))
        _store(found, point.parameters, params, f"{source}: '{name}'")
    for name, point in names.weights():
        if name not in table.weights:
            missing.append(name)
            continue
        scales = np.asarray(table.weights[name].scales, np.float32)
        shape = (
            ()
            if point.spec.axis is None
            else (graph.tensors()[point.tensor].shape[point.spec.axis],)
        )
        if scales.size != int(np.prod(shape)):
            raise FormatError(
                f"{source}: '{name}' has {scales.size} scales; its weight takes "
                f"{int(np.prod(shape))}. Is the rule the one the table was made for?"
            )
        zero_point = np.zeros(shape, storage_dtype(point.spec, signed=True))
        params = QuantParams(scale=scales.reshape(shape), zero_point=zero_point)
        _store(found, point.parameters, params, f"{source}: '{name}'")
    if missing:
        raise FormatError(
            f"{source}: lacks {len(missing)} names that the model needs: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Is it the table of this model and rule?"
        )
    return found


def _store(found: dict[str, QuantParams], key: str, params: QuantParams, place: str) -> None:
    known = found.setdefault(key, params)
    if not known.same_as(params):
        raise FormatError(
            f"{place} differs from another line of the same group ({params.scale} instead of "
            f"{known.scale}). Tensors that share parameters need equal lines."
        )
