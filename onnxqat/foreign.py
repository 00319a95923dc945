"""Take the Q/DQ pairs of another tool out of a graph, and keep their parameters.

::

    x -> QuantizeLinear [-> Clip] -> DequantizeLinear -> y   =>   x, its scale, zero_point, range
    integers [-> Clip] -> DequantizeLinear -> w              =>   w = (q - zero_point) * scale

PyTorch writes a Clip for ranges such as 0 to 127, and Brevitas for 2 to 7 bits and for -127 to 127.
onnxruntime.quantization removes a Relu if unsigned integers behind it clip at zero
(``onnxruntime/python/tools/quantization/operators/activation.py``), but the float model needs it.
So a Relu is restored behind a Conv, Gemm, MatMul or Add if the integers of its output begin at 0.0
and no Relu or Clip follows. This changes no value behind the pair. If a Clip was removed, only the
parameters contain its upper limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqat.errors import ModelError
from onnxqat.model import Model
from onnxqat.nodes import is_op
from onnxqat.operators import ONNX_DOMAINS, WEIGHTED
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.preparation.constants import lift_constants
from onnxqat.preparation.editing import constant_values, remove_nodes, scalar
from onnxqat.preparation.folding import evaluate
from onnxqat.preparation.order import sort_nodes
from onnxqat.preparation.passthrough import remove_passthroughs
from onnxqat.qparams import (
    QuantParams,
    QuantSpec,
    center,
    choose_qparams,
    power_of_two,
    quantized_range,
    raised_scales,
    rounded_levels,
    storage_dtype,
)

__all__ = ["ForeignParams", "read_foreign_qdq", "take_over"]


PAIR = ("QuantizeLinear", "DequantizeLinear")
INTEGER_KINDS = tuple(getattr(onnx.TensorProto, k) for k in ("INT8", "UINT8", "INT16", "UINT16"))
DOMAINS = (*ONNX_DOMAINS, "com.microsoft")
# Ops whose output can be negative. If its integers begin at 0.0, negative values are clipped.
CUT_BEHIND = (*WEIGHTED, "Add", "BatchNormalization", "Sub")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignParams:
    """The parameters that another tool chose for one tensor.

    Attributes
    ----------
    params : QuantParams
        Scale and zero_point, of shape () or (C,).
    axis : int or None
        The axis of a scale of shape (C,), counted from 0.
    limits : tuple of int
        The quantized range.
    """

    params: QuantParams
    axis: int | None
    limits: tuple[int, int]


def read_foreign_qdq(model: Model) -> tuple[Model, dict[str, ForeignParams]]:
    """Return the float model inside a Q/DQ model of another tool, and the parameters by tensor.

    A model without pairs is returned unchanged. A weight stored as integers is named after the
    output of its DequantizeLinear; int32 values are a bias, which has no parameters.

    Raises
    ------
    ModelError
        A QuantizeLinear or DequantizeLinear is not part of a pair with constant parameters.
    """
    if not any(_is(n, "DequantizeLinear") for n in model.graph.nodes):
        return model, {}
    result = model.copy()
    graph = result.graph
    lift_constants(graph)
    found: dict[str, ForeignParams] = {}
    folded, clips = [], list[gs.Node]()
    for node in list(graph.nodes):
        if not node.op.endswith("Linear") or not _is(node, node.op):
            continue
        _check_operands(node, model.name)
        if node.op == "DequantizeLinear":
            between = _clips_before(node)
            clips += between
            if isinstance((between[-1] if between else node).inputs[0], gs.Constant):
                _fold_weight(node, between, found, model.name)
                folded.append(node)
            else:
                _take_pair_out(graph, node, between, found, model.name)
    remove_nodes(graph, folded)
    _remove_unread(graph, clips, model.name)
    remove_passthroughs(graph)
    sort_nodes(graph)
    return result, found


def _is(node: gs.Node, op: str) -> bool:
    return node.op == op and node.domain in DOMAINS


def _check_operands(node: gs.Node, where: str) -> None:
    named = [tensor for tensor in node.inputs[:2] if tensor.name]
    if node.op in PAIR and (len(named) < 2 or len(node.outputs) != 1):
        raise _refused(where, node, "has no input, no scale or no output")


def _clips_before(node: gs.Node) -> list[gs.Node]:
    """Return the Clips between a DequantizeLinear and its integers, the last one first."""
    found: list[gs.Node] = []
    tensor = node.inputs[0]
    while tensor.inputs and is_op(tensor.inputs[0], "Clip") and tensor.inputs[0] not in found:
        found.append(tensor.inputs[0])
        tensor = tensor.inputs[0].inputs[0]
    return found


def _limits(
    node: gs.Node, clips: list[gs.Node], dtype: np.dtype[Any], where: str
) -> tuple[int, int]:
    """Return the quantized range that Clips leave of a type."""
    info = np.iinfo(dtype)
    low, high = info.min, info.max
    for clip in clips:
        ends = [*clip.inputs[1:3], *[gs.Variable.empty()] * (3 - len(clip.inputs))]
        given = [scalar(tensor) if tensor.name else None for tensor in ends]
        if any(t.name and value is None for t, value in zip(ends, given, strict=True)):
            raise _refused(where, node, f"follows '{clip.name}', whose limits are not constant")
        low = low if given[0] is None else max(low, int(given[0]))
        high = high if given[1] is None else min(high, int(given[1]))
    if low >= high:
        raise _refused(where, node, f"follows a Clip to [{low}, {high}], which leaves no range")
    return low, high


def _fold_weight(
    node: gs.Node, clips: list[gs.Node], found: dict[str, ForeignParams], where: str
) -> None:
    stored = constant_values((clips[-1] if clips else node).inputs[0])
    others = [constant_values(tensor) for tensor in node.inputs[1:] if tensor.name]
    values, limits = [], (0, 0)
    if stored is not None and stored.dtype.kind in "iu" and not any(v is None for v in others):
        limits = _limits(node, clips, stored.dtype, where)
        values = evaluate(node, [np.clip(stored, *limits), *others])
    if stored is None or not values:
        raise _refused(where, node, "does not read 8, 16 or 32-bit integers with a constant scale")
    target = node.outputs[0]
    if stored.dtype != np.int32:
        found[target.name] = _params(node, stored.dtype, stored.ndim, limits, where)
    target.to_constant(values[0])


def _take_pair_out(
    graph: gs.Graph,
    node: gs.Node,
    clips: list[gs.Node],
    found: dict[str, ForeignParams],
    where: str,
) -> None:
    """Make the readers of the DequantizeLinear read the input of the QuantizeLinear."""
    integers = (clips[-1] if clips else node).inputs[0]
    quantize = integers.inputs[0] if integers.inputs else None
    if quantize is None or not _is(quantize, "QuantizeLinear"):
        raise _refused(where, node, "does not follow a QuantizeLinear")
    _check_operands(quantize, where)
    source, target = quantize.inputs[0], node.outputs[0]
    rank = len(source.shape) if source.shape is not None else None
    dtype = _dtype(quantize, where)
    pair = [_params(n, dtype, rank, (0, 0), where) for n in (quantize, node)]
    if not pair[0].params.same_as(pair[1].params):
        raise _refused(where, node, f"has other parameters than '{quantize.name}' before it")
    limits = _limits(node, clips, pair[0].params.zero_point.dtype, where)
    foreign = replace(pair[0], limits=limits)
    _restore_relu(graph, quantize, node, foreign)
    found.setdefault(source.name, foreign)
    found.setdefault(target.name, foreign)  # a graph output keeps this name
    node.op, node.domain = "Identity", None
    node.attrs.clear()
    node.inputs = [source]


def _dtype(node: gs.Node, where: str) -> np.dtype[np.generic]:
    """Return the type of the integers that a QuantizeLinear writes without a zero_point."""
    kind = node.attrs.get("output_dtype", 0) or onnx.TensorProto.UINT8
    if kind not in INTEGER_KINDS:
        raise _refused(where, node, f"writes data type {kind}, not 8 or 16-bit integers")
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _params(
    node: gs.Node,
    dtype: np.dtype[np.generic],
    rank: int | None,
    limits: tuple[int, int],
    where: str,
) -> ForeignParams:
    scale = constant_values(node.inputs[1])
    zero_point = constant_values(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(node.inputs) < 3 and scale is not None:
        zero_point = np.zeros(scale.shape, dtype)
    if (
        scale is None
        or zero_point is None
        or scale.dtype != np.float32
        or zero_point.dtype.name not in ("int8", "uint8", "int16", "uint16")
        or scale.ndim > 1
        or scale.size == 0
        or not np.all((scale > 0) & np.isfinite(scale))
        or zero_point.size != scale.size
    ):
        raise _refused(where, node, "has no positive float32 scale with an integer zero_point")
    axis = None
    if scale.ndim:
        axis = node.attrs.get("axis", 1)
        axis = axis + rank if axis < 0 and rank is not None else axis
    params = QuantParams(scale=scale, zero_point=zero_point.reshape(scale.shape))
    return ForeignParams(params=params, axis=axis, limits=limits)


def _restore_relu(
    graph: gs.Graph, quantize: gs.Node, dequantize: gs.Node, foreign: ForeignParams
) -> None:
    """Insert a Relu before a pair whose integers begin at 0.0, if the producer needs it."""
    source = quantize.inputs[0]
    producer = source.inputs[0] if source.inputs else None
    readers = {reader.op for reader in dequantize.outputs[0].outputs}
    if (
        producer is None
        or producer.op not in CUT_BEHIND
        or foreign.params.zero_point.size != 1
        or int(foreign.params.zero_point.reshape(())) != foreign.limits[0]
        or readers & {"Clip", "Relu"}
        or len(source.outputs) > 1
        or any(t is source for t in graph.outputs)
    ):
        return
    uncut = gs.Variable(f"{source.name}/uncut", source.dtype, source.shape)
    producer.outputs[producer.outputs.index(source)] = uncut
    graph.nodes.append(gs.Node("Relu", f"{source.name}/Relu", {}, [uncut], [source]))


def _remove_unread(graph: gs.Graph, clips: list[gs.Node], where: str) -> None:
    """Remove the nodes before a DequantizeLinear; refuse them if they have other readers."""
    outputs = {tensor.name for tensor in graph.outputs}
    quantizes = [node for node in graph.nodes if _is(node, "QuantizeLinear")]
    for group in ([clip for clip in clips if clip.outputs], quantizes):
        for node in {id(node): node for node in group}.values():
            if node.outputs[0].outputs or node.outputs[0].name in outputs:
                raise _refused(where, node, "passes integers to other nodes")
            remove_nodes(graph, [node])


def _refused(where: str, node: gs.Node, reason: str) -> ModelError:
    name = node.name or node.outputs[0].name
    return ModelError(
        f"{where}: {node.op} '{name}' {reason}. Give the float model, or one in the Q/DQ format."
    )


def take_over(
    plan: QuantPlan, graph: gs.Graph, foreign: Mapping[str, ForeignParams]
) -> tuple[dict[str, QuantParams], list[str]]:
    """Return the parameters that fit a plan of the prepared float graph.

    Returns
    -------
    params : dict of str to QuantParams
        The parameters, by `QuantPoint.parameters`.
    ignored : list of str
        Tensors whose parameters do not fit their point.
    """
    tensors = graph.tensors()
    taken: dict[str, QuantParams] = {}
    ignored = []
    for point in plan.grid_points():
        if point.tensor in foreign:
            params = _fitting(point, foreign[point.tensor], tensors[point.tensor])
            if params is None or not taken.setdefault(point.parameters, params).same_as(params):
                ignored.append(point.tensor)
    return taken, ignored


def _fitting(point: QuantPoint, foreign: ForeignParams, tensor: gs.Tensor) -> QuantParams | None:
    """Return the parameters, of shape () or (channels,), if they fit the point's spec."""
    spec, params = point.spec, foreign.params
    shape = tensor.shape or ()
    if spec.axis is not None and spec.axis >= len(shape):
        return None  # a malformed model, which insert refuses
    channels = None if spec.axis is None else shape[spec.axis]
    kind = "signed" if params.signed else "unsigned"
    if (
        spec.heads is not None  # the compiler computes its scales from the weight
        or spec.signedness not in (kind, "from_range")
        or params.zero_point.dtype != storage_dtype(spec, signed=params.signed)
        or (spec.symmetric and np.any(params.zero_point))
        or (spec.off_center and np.any(params.zero_point == center(params.zero_point.dtype)))
        or not np.array_equal(raised_scales(params.scale, spec), params.scale)
        or params.scale.size != (channels or 1)
        or (params.scale.size > 1 and foreign.axis != spec.axis)
        or (spec.power_of_two and not np.array_equal(power_of_two(params.scale), params.scale))
    ):
        return None
    shape = () if channels is None else (channels,)
    fitted = QuantParams(
        scale=params.scale.reshape(shape), zero_point=params.zero_point.reshape(shape)
    )
    if not _same_range(fitted, spec, foreign.limits, tensor):
        return None
    if spec.fixed_range is None:
        return fitted
    forced = choose_qparams(np.zeros(shape, np.float32), np.ones(shape, np.float32), spec)
    return fitted if forced.same_as(fitted) else None


def _same_range(
    params: QuantParams, spec: QuantSpec, limits: tuple[int, int], tensor: gs.Tensor
) -> bool:
    """Whether a spec gives the same integers as the other tool's range.

    The range of a constant may differ by one level: some tools leave out the lowest integer.
    """
    limits_of_spec = quantized_range(spec, signed=params.signed)
    values = constant_values(tensor)
    if values is None or limits_of_spec == limits:
        return limits_of_spec == limits
    levels = rounded_levels(values, params, spec)
    differences = np.clip(levels, *limits_of_spec) - np.clip(levels, *limits)
    return bool(np.abs(differences).max(initial=0) <= 1)
