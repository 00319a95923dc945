"""The Q/DQ model that RKNN-Toolkit2 loads with ``build(do_quantization=False)``.

Weights become integers followed by DequantizeLinear, biases become int32, activations keep their
pairs, as in the model for onnxruntime. Two things differ, which change no value:

- One channel of each symmetric weight gets the zero_point -1, and its integers are one lower. The
  loader takes a tensor whose zero_points are all 0 (128 for uint8) for a symmetric one, and gives
  it a scale that is larger by 128 / 127. A weight that fills the whole range gets +1 instead.
- Attributes that the toolkit reads without their defaults are written out.

An activation with its zero_point at the center cannot be written, nor a weight with scales that are
more than `RATIO` times apart: the loader raises the smaller ones. Rules avoid these by
``off_center`` and ``scale_ratio``. Found by running RKNN-Toolkit2 2.5.0; no document describes how
it reads Q/DQ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.formats.format import Calibrated, Format, Found, Table, Written, refuse
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.formats.qdq_table import read_qdq
from onnxqat.model import Model, constant
from onnxqat.nodes import state_attributes
from onnxqat.pairs import has_clip, node_name, zero_point_name
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams, center
from onnxqat.quantized import QuantizedModel

__all__ = ["ROCKCHIP", "rockchip_model"]

# Version 2.5.0 raises KeyError without them.
STATED = {"HardSigmoid": ("alpha", "beta"), "LayerNormalization": ("epsilon",)}

RATIO = 2**14


def rockchip_model(model: QuantizedModel) -> Model:
    """Return the model for RKNN-Toolkit2.

    Raises
    ------
    PlanError
        The model is not calibrated.
    FormatError
        The loader would not keep the grid of a tensor: an activation has other than 8 bits, a Clip
        between Q and DQ, or its zero_point at the center; a weight has scales that are more than
        `RATIO` times apart, or fills the range of its integers in all channels.
    """
    source = Calibrated(model)
    refuse(_unreadable(source), "RKNN-Toolkit2 would give these tensors another grid")
    result = integer_model(model)
    nodes = {node.name: node for node in result.graph.nodes}
    full = [p.tensor for p, params in source.points("weight") if not _shift(p, params, nodes)]
    refuse(
        (f"'{name}' uses all 256 levels in every channel" for name in full),
        "Leave one out: --set weight.narrow_range=true",
    )
    state_attributes(result.graph, STATED)
    return result


def _unreadable(source: Calibrated) -> Iterator[str]:
    for point, params in source.points("activation"):
        middle = center(params.zero_point.dtype)
        if point.spec.bits != 8:
            yield f"'{point.tensor}' has {point.spec.bits} bits"
        elif has_clip(point, params):
            yield f"'{point.tensor}' needs a Clip between Q and DQ"
        elif np.all(params.zero_point == middle):
            yield f"'{point.tensor}' has a zero_point of {middle}, the center of its integers"
    for point, params in source.points("weight"):
        if point.spec.bits > 8:
            yield f"'{point.tensor}' has {point.spec.bits} bits"
        elif params.scale.min() * np.float32(RATIO) < params.scale.max():
            yield (
                f"'{point.tensor}' has scales more than {RATIO} times apart "
                f"(insert again with weight.scale_ratio={RATIO})"
            )


def _shift(point: QuantPoint, params: QuantParams, nodes: dict[str, gs.Node]) -> bool:
    """Move the zero_point of one channel by one; return False if no channel has a free level."""
    zero_point = np.atleast_1d(params.zero_point)
    limits = np.iinfo(zero_point.dtype)
    if np.any(zero_point != center(zero_point.dtype)):
        return True
    node = nodes[node_name(point.tensor, "DequantizeLinear")]
    integers: NDArray[Any] = node.inputs[0].values.astype(np.int32)
    axis = 0 if point.spec.axis is None else point.spec.axis
    rows = np.moveaxis(integers, axis, 0).reshape(zero_point.size, -1)
    lower, upper = rows.min(axis=1) > limits.min, rows.max(axis=1) < limits.max
    if not (lower.any() or upper.any()):
        return False
    step = -1 if lower.any() else 1
    channel = int(np.argmax(lower if step == -1 else upper))
    moved = zero_point.astype(np.int32)
    moved[channel] += step
    at = [slice(None)] * integers.ndim
    if zero_point.size > 1:
        at[axis] = slice(channel, channel + 1)
    integers[tuple(at)] += step
    dtype, shape = zero_point.dtype, params.zero_point.shape
    # its own constant: tensors of one group share the parameters of their pairs
    name = zero_point_name(f"{point.tensor}/integers")
    node.inputs[0].values = integers.astype(dtype)
    node.inputs[2] = constant(name, moved.astype(dtype).reshape(shape))
    return True


def _write(source: Calibrated) -> Written:
    exported = rockchip_model(source.model).to_proto()
    return Written(files={"table": exported.SerializeToString(deterministic=True)})


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    return read_qdq(table, graph, plan, as_planned=_planned)


def _planned(point: QuantPoint, zero_point: NDArray[Any]) -> NDArray[Any]:
    """Return the zero_points before `_shift`."""
    if point.role != "weight" or not point.spec.symmetric:
        return zero_point
    middle = center(zero_point.dtype)
    distance = zero_point.astype(np.int32) - middle
    shifted = np.count_nonzero(distance) == 1 and np.abs(distance).max() == 1
    return np.full_like(zero_point, middle) if shifted else zero_point


ROCKCHIP = Format(
    summary="Q/DQ model for Rockchip's RKNN-Toolkit2",
    files={"table": "rockchip_qdq.onnx"},
    writer=_write,
    read=_read,
)
