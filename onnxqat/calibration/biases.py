"""Make integer biases fit their range: raise weight scales, or leave biases float.

A bias is stored as ``round(b / (s_x * s_w))``. If x hardly varies in the calibration data, or the
weights are almost zero, the product of the scales is so small that this integer overflows.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import FloatArray, QuantParams, power_of_two, raised_scales

__all__ = ["fit_bias_range", "without_large_biases"]

logger = logging.getLogger(__name__)

DEAD = 2.0**-16


def fit_bias_range(
    plan: QuantPlan,
    params: dict[str, QuantParams],
    tensors: Mapping[str, gs.Tensor],
    *,
    kept: Collection[str] = (),
) -> QuantPlan:
    """Raise weight scales whose integer bias would overflow; change ``params`` in place.

    After BN folding, a channel with almost zero weights has a tiny scale but an ordinary bias. Its
    weights have no effect at a coarser scale either. Therefore the scale of a channel whose weights
    are all below `DEAD` times the largest weight may be raised up to the largest scale, and the
    scale of an all-zero channel as far as needed. Other scales are not raised, because that would
    round relevant weights away; nor are those of heads, which the chip's compiler computes.

    Parameters
    ----------
    kept : collection of str
        Names of parameters that must not change.

    Returns
    -------
    QuantPlan
        The plan without the biases that still do not fit; these stay float.
    """
    points = {p.tensor: p for p in plan.grid_points()}
    for bias in plan.points:
        if bias.derived_from is None:
            continue
        x, w = (points[name] for name in bias.derived_from)
        fixed = w.spec.heads is not None  # the compiler computes the scale
        if w.group is None and w.parameters not in kept and not fixed:
            _raise_scale(bias, params[x.parameters], w, params, tensors)
    return without_large_biases(plan, params, tensors)


def _raise_scale(
    bias: QuantPoint,
    x: QuantParams,
    w: QuantPoint,
    params: dict[str, QuantParams],
    tensors: Mapping[str, gs.Tensor],
) -> None:
    weight, old = tensors[w.tensor].values, params[w.parameters]
    scale = old.scale
    # use half of the range, so that training can change the bias
    limit = 2.0 ** (bias.spec.bits - 2)
    with np.errstate(over="ignore"):
        needed = _magnitudes(tensors[bias.tensor].values, scale) / (float(x.scale) * limit)
        raised = np.maximum(scale, needed.astype(np.float32))
    if w.spec.power_of_two:
        raised = power_of_two(raised)
    others = tuple(i for i in range(weight.ndim) if i != w.spec.axis)
    largest = np.abs(weight).max(axis=others if scale.ndim else None)
    allowed = (largest <= DEAD * largest.max()) & ((largest == 0) | (raised <= scale.max()))
    allowed &= np.isfinite(raised)
    raised = np.asarray(np.where(allowed, raised, scale), np.float32)
    raised = raised_scales(raised, w.spec)
    if count := int(np.count_nonzero(raised > scale)):
        logger.info(
            "%s: %d weight scales raised so that the bias fits its integers", w.tensor, count
        )
        params[w.parameters] = QuantParams(scale=raised, zero_point=old.zero_point)


def _magnitudes(bias: FloatArray, scale: FloatArray) -> NDArray[np.float64]:
    """Return the largest magnitude of a bias for each scale of its weight, in the scale's shape.

    All groups of a ConvTranspose have the same scales.
    """
    values = np.abs(np.asarray(bias, np.float64)).reshape(-1)
    if values.size % scale.size:  # one value for all channels
        return np.full(scale.shape, values.max(initial=0.0))
    return np.asarray(values.reshape(-1, *scale.shape).max(axis=0, initial=0.0))


def without_large_biases(
    plan: QuantPlan, params: Mapping[str, QuantParams], tensors: Mapping[str, gs.Tensor]
) -> QuantPlan:
    """Return the plan without the biases that overflow their integers; log their names."""
    points = {p.tensor: p for p in plan.grid_points()}
    large: dict[str, QuantPoint] = {}
    for bias in plan.points:
        if bias.derived_from is None:
            continue
        x, w = (params[points[name].parameters] for name in bias.derived_from)
        with np.errstate(over="ignore", divide="ignore"):
            step = float(x.scale) * w.scale.astype(np.float64)
            levels = _magnitudes(tensors[bias.tensor].values, w.scale) / step
        if not np.all(levels < 2.0 ** (bias.spec.bits - 1) - 1):
            large[bias.consumers[0].node] = bias
    if not large:
        return plan
    names = ", ".join(f"'{bias.tensor}' of '{node}'" for node, bias in large.items())
    logger.warning(
        "%d biases stay float, because s_x * s_w is too small for their integers: %s. Give "
        "calibration data in which their inputs vary.",
        len(large),
        names,
    )
    kept = tuple(p for p in plan.points if p.role != "bias" or p.consumers[0].node not in large)
    return msgspec.structs.replace(plan, points=kept)
