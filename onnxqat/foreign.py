"""Q/DQ pairs that another tool wrote: taken out of the graph, their parameters kept.

::

    x -> QuantizeLinear -> DequantizeLinear -> y      =>   x, and its scale and zero_point
    integers -> DequantizeLinear -> w                 =>   initializer w = (q - zero_point) * scale

onnxruntime.quantization leaves a Relu out where the unsigned integers behind it cut at zero anyway
(``onnxruntime/python/tools/quantization/operators/activation.py``). The float model needs it: where
the integers of what a Conv, Gemm, MatMul or Add writes begin at 0.0 and no Relu or Clip follows, a
Relu is put back. This changes no value behind the pair. Where it was a Clip, its upper end is known
to the parameters only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqat.errors import ModelError
from onnxqat.insert import PLAN_KEY, read_params
from onnxqat.model import Model
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.prepare.constants import lift_constants
from onnxqat.prepare.editing import constant_values, remove_nodes
from onnxqat.prepare.folding import evaluate
from onnxqat.prepare.order import sort_nodes
from onnxqat.prepare.passthrough import remove_passthroughs
from onnxqat.qparams import QuantParams, choose_qparams, storage_dtype

__all__ = ["ForeignParams", "mark_taken", "read_foreign_qdq", "take_over", "taken_params"]

TAKEN_KEY = "onnxqat.taken_over"

DOMAINS = (None, "", "ai.onnx", "com.microsoft")
# Producers whose output may be negative, so that integers from 0.0 upwards say that it is cut.
CUT_BEHIND = ("Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Sub")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignParams:
    """What another tool chose for one tensor.

    Attributes
    ----------
    params : QuantParams
        Scale and zero_point, of shape () or (C,).
    axis : int or None
        The axis of a scale of shape (C,), not negative.
    """

    params: QuantParams
    axis: int | None


def read_foreign_qdq(model: Model) -> tuple[Model, dict[str, ForeignParams]]:
    """Return the float model within a Q/DQ model of another tool, and the parameters by tensor.

    A model without pairs, and one of ours, is returned as it is. A weight stored as integers
    is named after the output of its DequantizeLinear; int32 is a bias, and has no parameters.

    Raises
    ------
    ModelError
        A QuantizeLinear or DequantizeLinear is not part of a pair with constant parameters.
    """
    if PLAN_KEY in model.metadata or not any(_is(n, "DequantizeLinear") for n in model.graph.nodes):
        return model, {}
    result = model.copy()
    graph = result.graph
    lift_constants(graph)
    found: dict[str, ForeignParams] = {}
    folded = []
    for node in list(graph.nodes):
        if _is(node, "DequantizeLinear"):
            if isinstance(node.inputs[0], gs.Constant):
                _fold_weight(node, found, model.name)
                folded.append(node)
            else:
                _take_pair_out(graph, node, found, model.name)
    remove_nodes(graph, folded)
    _check_rest(graph, model.name)
    remove_passthroughs(graph)
    sort_nodes(graph)
    return result, found


def _is(node: gs.Node, op: str) -> bool:
    return node.op == op and node.domain in DOMAINS


def _fold_weight(node: gs.Node, found: dict[str, ForeignParams], where: str) -> None:
    stored = constant_values(node.inputs[0])
    read = [constant_values(tensor) for tensor in node.inputs if tensor.name]
    values = [] if any(v is None for v in read) else evaluate(node, read)
    if stored is None or not values:
        raise _refused(where, node, "does not hold 8, 16 or 32-bit integers with a constant scale")
    target = node.outputs[0]
    if stored.dtype != np.int32:
        found[target.name] = _params(node, stored.dtype, stored.ndim, where)
    target.to_constant(values[0])


def _take_pair_out(
    graph: gs.Graph, node: gs.Node, found: dict[str, ForeignParams], where: str
) -> None:
    """Let the DequantizeLinear hand on what the QuantizeLinear reads."""
    integers = node.inputs[0]
    quantize = integers.inputs[0] if integers.inputs else None
    if quantize is None or not _is(quantize, "QuantizeLinear"):
        raise _refused(where, node, "is not behind a QuantizeLinear")
    source, target = quantize.inputs[0], node.outputs[0]
    rank = len(source.shape) if source.shape is not None else None
    pair = [_params(n, _dtype(quantize), rank, where) for n in (quantize, node)]
    if not pair[0].params.same_as(pair[1].params):
        raise _refused(where, node, f"has other parameters than '{quantize.name}' before it")
    _restore_relu(graph, quantize, pair[0])
    found.setdefault(source.name, pair[0])
    found.setdefault(target.name, pair[0])  # of a graph output, the name that survives
    node.op, node.domain = "Identity", None
    node.attrs.clear()
    node.inputs = [source]


def _dtype(node: gs.Node) -> np.dtype[np.generic]:
    """Return the type of the integers that a QuantizeLinear writes without a zero_point."""
    kind = node.attrs.get("output_dtype", 0) or onnx.TensorProto.UINT8
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _params(
    node: gs.Node, dtype: np.dtype[np.generic], rank: int | None, where: str
) -> ForeignParams:
    scale = constant_values(node.inputs[1])
    zero_point = constant_values(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(node.inputs) < 3 and scale is not None:
        zero_point = np.zeros(scale.shape, dtype)
    if (
        scale is None
        or zero_point is None
        or scale.dtype != np.float32
        or scale.ndim > 1
        or not np.all((scale > 0) & np.isfinite(scale))
        or zero_point.size != scale.size
    ):
        raise _refused(where, node, "has no positive float32 scale with an integer zero_point")
    axis = None
    if scale.ndim:
        axis = node.attrs.get("axis", 1)
        axis = axis + rank if axis < 0 and rank is not None else axis
    params = QuantParams(scale=scale, zero_point=zero_point.reshape(scale.shape))
    return ForeignParams(params=params, axis=axis)


def _restore_relu(graph: gs.Graph, quantize: gs.Node, foreign: ForeignParams) -> None:
    """Put a Relu before a pair whose integers begin at 0.0, where the producer needs it."""
    source = quantize.inputs[0]
    producer = source.inputs[0] if source.inputs else None
    lowest = np.iinfo(foreign.params.zero_point.dtype).min
    pairs = quantize.outputs[0].outputs
    readers = {reader.op for node in pairs for t in node.outputs for reader in t.outputs}
    if (
        producer is None
        or producer.op not in CUT_BEHIND
        or foreign.params.zero_point.size != 1
        or int(foreign.params.zero_point.reshape(())) != lowest
        or readers & {"Clip", "Relu"}
        or len(source.outputs) > 1
        or any(t is source for t in graph.outputs)
    ):
        return
    uncut = gs.Variable(f"{source.name}/uncut", source.dtype, source.shape)
    producer.outputs[producer.outputs.index(source)] = uncut
    graph.nodes.append(gs.Node("Relu", f"{source.name}/Relu", {}, [uncut], [source]))


def _check_rest(graph: gs.Graph, where: str) -> None:
    """Remove QuantizeLinear nodes without readers; refuse one that has some."""
    outputs = {tensor.name for tensor in graph.outputs}
    left = [node for node in graph.nodes if _is(node, "QuantizeLinear")]
    for node in left:
        if node.outputs[0].outputs or node.outputs[0].name in outputs:
            raise _refused(where, node, "feeds integers to other nodes")
    remove_nodes(graph, left)


def _refused(where: str, node: gs.Node, reason: str) -> ModelError:
    name = node.name or node.outputs[0].name
    return ModelError(
        f"{where}: {node.op} '{name}' {reason}. Give the float model, or one in the Q/DQ format."
    )


def take_over(
    plan: QuantPlan, graph: gs.Graph, foreign: Mapping[str, ForeignParams]
) -> tuple[dict[str, QuantParams], list[str]]:
    """Choose the parameters that fit a plan of the prepared float graph.

    Returns
    -------
    params : dict of str to QuantParams
        By `QuantPoint.parameters`.
    ignored : list of str
        Tensors with a point that their parameters do not fit.
    """
    tensors = graph.tensors()
    taken: dict[str, QuantParams] = {}
    ignored = []
    for point in plan.grid_points():
        if point.tensor in foreign:
            axis = point.spec.axis
            channels = None if axis is None else tensors[point.tensor].shape[axis]
            params = _fitting(point, foreign[point.tensor], channels)
            if params is None or not taken.setdefault(point.parameters, params).same_as(params):
                ignored.append(point.tensor)
    return taken, ignored


def _fitting(point: QuantPoint, foreign: ForeignParams, channels: int | None) -> QuantParams | None:
    """Return the parameters, of shape () or (channels,), if they fit the point's spec."""
    spec, params = point.spec, foreign.params
    kind = "signed" if params.signed else "unsigned"
    if (
        spec.signedness not in (kind, "from_range")
        or spec.bits not in (8, 16)
        or params.zero_point.dtype != storage_dtype(spec, signed=params.signed)
        or (spec.symmetric and np.any(params.zero_point))
        or params.scale.size != (channels or 1)
        or (params.scale.size > 1 and foreign.axis != spec.axis)
    ):
        return None
    shape = () if channels is None else (channels,)
    fitted = QuantParams(
        scale=params.scale.reshape(shape), zero_point=params.zero_point.reshape(shape)
    )
    if spec.fixed_range is None:
        return fitted
    forced = choose_qparams(np.zeros(shape, np.float32), np.ones(shape, np.float32), spec)
    return fitted if forced.same_as(fitted) else None


def mark_taken(model: Model, names: Iterable[str]) -> None:
    """Note in a Q/DQ model that calibration is to leave these parameters alone."""
    model.metadata[TAKEN_KEY] = msgspec.json.encode(sorted(names)).decode()


def taken_params(model: Model) -> dict[str, QuantParams]:
    """Return the parameters of a Q/DQ model that another tool chose."""
    if TAKEN_KEY not in model.metadata:
        return {}
    try:
        names = msgspec.json.decode(model.metadata[TAKEN_KEY], type=list[str])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        message = f"{model.name}: '{TAKEN_KEY}' cannot be read ({error}). Insert again."
        raise ModelError(message) from error
    found = read_params(model)
    return {name: found[name] for name in names if name in found}
