"""Compare each quantized tensor with the float model's, and describe its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.analysis.channels import ChannelRanges, channels_of
from onnxqat.analysis.histogram import Histogram, LevelCounts
from onnxqat.data import Batch
from onnxqat.device import CPU, Device
from onnxqat.ends import TensorReader
from onnxqat.errors import DataError, ModelError
from onnxqat.evaluation.similarity import Similarity
from onnxqat.model import Model
from onnxqat.nodes import is_constant
from onnxqat.pairs import dequantized_name, source_name
from onnxqat.plan import QuantPoint
from onnxqat.qparams import (
    FloatArray,
    QuantParams,
    clipping_range,
    dequantize,
    fake_quantize,
    quantized_range,
    rounded_levels,
)
from onnxqat.quantized import QuantizedModel
from onnxqat.requantizations import with_requantizations

__all__ = ["PointFigures", "compare_points"]


@dataclass(frozen=True, kw_only=True)
class PointFigures:
    """Figures of one quantized tensor, compared with the same tensor of the float model.

    Attributes
    ----------
    tensor, role, bits : str, {"weight", "activation"}, int
        Name, role and width of the tensor.
    sqnr, cosine : float
        Signal-to-noise ratio (dB; infinite if both are equal) and cosine of the fake-quantized
        model's tensor. The errors of all earlier layers are included.
    alone_sqnr, alone_cosine : float
        The same for the float model's tensor when only this tensor is fake-quantized.
    clipped : float
        Fraction of the float model's values that are clipped.
    outlier : float
        Largest magnitude of the float model's values, divided by their root mean square.
    clipping_range, values : (float, float)
        Clipping range (of the widest channel), and the smallest and largest of the float model's
        values (NaN if it has none).
    scales : int
        Number of scales: 1, or one for each channel.
    histogram : Histogram
        Histogram of the float model's values over the integers.
    channels, dead_channels : int or None
        Number of channels, and number of dead ones: channels of an activation with the same value
        in all samples, channels of a weight with only zeros. None if the channels are unknown.
    """

    tensor: str
    role: Literal["weight", "activation"]
    bits: int
    sqnr: float
    cosine: float
    alone_sqnr: float
    alone_cosine: float
    clipped: float
    outlier: float
    clipping_range: tuple[float, float]
    values: tuple[float, float]
    scales: int
    histogram: Histogram
    channels: int | None
    dead_channels: int | None


class _Counts:
    """Running sums of one point."""

    def __init__(self, point: QuantPoint, params: QuantParams, axis: int | None) -> None:
        self.point, self.params = point, params
        self.together, self.alone = Similarity(), Similarity()
        self.count = self.clipped = 0
        self.largest, self.values = 0.0, (math.inf, -math.inf)
        self.low, self.high = quantized_range(point.spec, signed=params.signed)
        self.levels = LevelCounts(self.low, self.high)
        self.ranges = ChannelRanges(axis)

    def add(self, x: FloatArray, y: FloatArray) -> None:
        """Add values of the float model's tensor (x) and the fake-quantized model's (y)."""
        if x.shape != y.shape:
            raise ModelError(
                f"'{self.point.tensor}' has the shape {x.shape} in the float model and {y.shape} "
                "in the quantized one. Give the float model that the quantized one was made from."
            )
        spec = self.point.spec
        levels = rounded_levels(x, self.params, spec)
        rounded = np.clip(levels, self.low, self.high).astype(self.params.zero_point.dtype)
        self.together.add(x, y)
        self.alone.add(x, dequantize(rounded, self.params, spec))
        self.clipped += int(np.count_nonzero((levels < self.low) | (levels > self.high)))
        self.levels.add(levels)
        self.count += x.size
        low, high = x.min(initial=self.values[0]), x.max(initial=self.values[1])
        self.values = float(low), float(high)
        self.largest = float(np.max([self.largest, -low, high]))
        self.ranges.add(x)

    def result(self) -> PointFigures:
        rms = math.sqrt(self.together.signal / self.count) if self.count else 0.0
        weight = self.point.role == "weight"
        return PointFigures(
            tensor=self.point.tensor,
            role="weight" if weight else "activation",
            bits=self.point.spec.bits,
            sqnr=self.together.sqnr,
            cosine=self.together.cosine,
            alone_sqnr=self.alone.sqnr,
            alone_cosine=self.alone.cosine,
            clipped=self.clipped / max(self.count, 1),
            outlier=self.largest / rms if rms else math.nan,
            clipping_range=clipping_range(self.params, self.point.spec),
            values=self.values if self.count else (math.nan, math.nan),
            scales=self.params.scale.size,
            histogram=self.levels.result(),
            channels=self.ranges.count,
            dead_channels=self.ranges.zeros if weight else self.ranges.constant,
        )


def compare_points(
    model: QuantizedModel,
    batches: Iterable[Batch],
    *,
    floats: Model,
    threads: int = 0,
    device: Device = CPU,
    progress: Callable[[], None] = lambda: None,
) -> tuple[PointFigures, ...]:
    """Return the figures of each weight and activation, in the order of the plan.

    The tensors of one batch of both models are in memory at a time. Between batches, only a few
    numbers for each tensor and two for each channel are kept.

    Parameters
    ----------
    model : QuantizedModel
        Calibrated or fine-tuned.
    floats : Model
        The prepared float model to compare with, often ``model.floats``.
    device : Device
        Where the models run.

    Raises
    ------
    DataError
        There are no samples.
    ModelError
        The float model lacks a tensor of the plan, or onnxruntime cannot run one of the models.
    """
    model.check_calibrated()
    floats = with_requantizations(floats, model.plan)
    tensors, ours = floats.graph.tensors(), model.floats.graph.tensors()
    points = model.plan.grid_points()
    _check_tensors(floats, points, ours)
    counts = {
        point.tensor: _Counts(
            point, model.params[point.parameters], channels_of(model.floats.graph, point)
        )
        for point in points
    }
    for point in points:
        if is_constant(ours[point.tensor]):
            values, params = ours[point.tensor].values, model.params[point.parameters]
            rounded = fake_quantize(values, params, point.spec)
            counts[point.tensor].add(tensors[point.tensor].values, rounded)
    computed = [point for point in points if not is_constant(ours[point.tensor])]
    open_reader = partial(TensorReader, threads=threads, device=device)
    _compare_computed(model, floats, computed, counts, batches, open_reader, progress)
    return tuple(counts[point.tensor].result() for point in points)


def _check_tensors(
    floats: Model, points: Iterable[QuantPoint], ours: Mapping[str, gs.Tensor]
) -> None:
    tensors = floats.graph.tensors()
    for point in points:
        found = tensors.get(point.tensor)
        if found is None or is_constant(found) != is_constant(ours[point.tensor]):
            raise ModelError(
                f"{floats.name}: lacks the quantized tensor '{point.tensor}'. Give the float model "
                "that the quantized one was made from."
            )


def _compare_computed(
    model: QuantizedModel,
    floats: Model,
    points: list[QuantPoint],
    counts: Mapping[str, _Counts],
    batches: Iterable[Batch],
    open_reader: Callable[..., TensorReader],
    progress: Callable[[], None],
) -> None:
    outputs = {tensor.name for tensor in model.floats.graph.outputs}
    names = {}
    for point in points:
        renamed = source_name(point, outputs) != point.tensor
        names[point.tensor] = point.tensor if renamed else dequantized_name(point.tensor)
    fed = {tensor.name for tensor in floats.graph.inputs}
    fetched = [point.tensor for point in points if point.tensor not in fed]
    theirs = open_reader(floats.to_proto(), fetched, optimization="basic", name=floats.name)
    ours = open_reader(model.to_proto(), names.values(), optimization="none", name=model.name)
    seen = False
    for batch in batches:
        seen = True
        expected: Mapping[str, NDArray[Any]] = {**batch.inputs, **theirs.run(batch.inputs)}
        found = ours.run(batch.inputs)
        for point in points:
            values = (expected[point.tensor], found[names[point.tensor]])
            counts[point.tensor].add(*map(batch.counting, values))
        progress()
    if not seen:
        raise DataError("There are no samples to analyze.")
