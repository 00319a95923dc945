"""Biases as integers of the chip, ``round(b / (s_x s_w))``, and how many saturate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.evaluation.similarity import Similarity
from onnxqat.plan import QuantPoint
from onnxqat.qparams import QuantParams
from onnxqat.quantized import QuantizedModel

__all__ = ["BiasFigures", "look_at_biases"]


@dataclass(frozen=True, kw_only=True)
class BiasFigures:
    """One bias as integers.

    Attributes
    ----------
    tensor, node, bits : str, str, int
        Name of the bias, name of the node that adds it, and width of its integers.
    sqnr : float
        Signal-to-noise ratio of the rounded bias, in dB; infinite if rounding changes nothing.
    values, saturated : int
        Number of values, and how many of them saturate.
    """

    tensor: str
    node: str
    bits: int
    sqnr: float
    values: int
    saturated: int


def look_at_biases(model: QuantizedModel) -> tuple[BiasFigures, ...]:
    """Return the figures of each bias, in the order of the plan."""
    points = {point.tensor: point for point in model.plan.grid_points()}
    tensors = model.floats.graph.tensors()
    return tuple(
        _figures(bias, points, model.params, tensors)
        for bias in model.plan.points
        if bias.derived_from is not None
    )


def _figures(
    bias: QuantPoint,
    points: Mapping[str, QuantPoint],
    params: Mapping[str, QuantParams],
    tensors: Mapping[str, gs.Tensor],
) -> BiasFigures:
    x, w = (params[points[name].parameters] for name in bias.derived_from or ())
    step = float(x.scale) * w.scale.astype(np.float64)
    values = _beside(np.asarray(tensors[bias.tensor].values, np.float64), step)
    largest = 2.0 ** (bias.spec.bits - 1) - 1
    with np.errstate(over="ignore", divide="ignore"):
        levels = np.rint(values / step)
    similarity = Similarity()
    similarity.add(values, np.clip(levels, -largest - 1, largest) * step)
    return BiasFigures(
        tensor=bias.tensor,
        node=bias.consumers[0].node,
        bits=bias.spec.bits,
        sqnr=similarity.sqnr,
        values=values.size,
        saturated=int(np.count_nonzero((levels < -largest - 1) | (levels > largest))),
    )


def _beside(values: NDArray[np.float64], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values of a bias in a shape whose last axis matches its scales.

    All groups of a ConvTranspose have the same scales. A bias of one value is repeated for all
    channels.
    """
    flat = values.reshape(-1)
    if flat.size % step.size:
        return np.broadcast_to(flat, step.shape)
    return flat.reshape(-1, *step.shape)
