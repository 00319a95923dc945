"""The graphs of clipping ranges that follow the observed extremes.

The arithmetic is that of `onnxqat.train.optimization.ranges` and `onnxqat.qparams.choose_qparams`,
operation by operation, for all ranges with the same spec at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.qparams import QuantSpec, center, quantized_range, storage_dtype
from onnxqat.train.resident.graphs import GraphBuilder, smallest_power

__all__ = ["Followed", "ranges_graph", "seen_graph"]


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A scale, and its zero_point, that follow observed ranges.

    Attributes
    ----------
    name : str
        The name of the quantization parameters.
    spec : QuantSpec
        Their spec; its signedness is known.
    row : int or None
        The index of the range of activations; None if only the extremes of a weight count.
    weights : dict of str to tuple of int
        The shapes of the constants that count too, by the inputs of their names.
    moves_zero_point : bool
        Whether the zero_point follows.
    """

    name: str
    spec: QuantSpec
    row: int | None
    weights: Mapping[str, tuple[int, ...]]
    moves_zero_point: bool

    @property
    def length(self) -> int:
        """The number of scales."""
        axis = self.spec.axis
        return (
            1 if axis is None or self.row is not None else next(iter(self.weights.values()))[axis]
        )


def seen_graph(size: int, places: Sequence[NDArray[np.int64]]) -> onnx.ModelProto:
    """Return the graph that widens the ranges of a step by the extremes of one batch.

    Parameters
    ----------
    size : int
        Length of the input ``found``, which has the extremes.
    places : two int64 of shape (n, m)
        The indices in ``found`` of the smallest and of the largest values of each range. -1: none.

    The inputs ``low`` and ``high``, of shape (n,), become ``low_out`` and ``high_out``.
    """
    b = GraphBuilder()
    found = b.input("found", size)
    for end, at, op in (("low", places[0], "Min"), ("high", places[1], "Max")):
        value, count = b.input(end, len(at)), np.array([at.shape[1]], np.int64)
        padded = np.where(at < 0, at[:, :1], at)  # the first place again
        given = b.op("Gather", found, np.maximum(padded, 0).reshape(-1))
        rows = b.op("Reshape", given, np.concatenate([[len(at)], count]))
        extreme = b.op(f"Reduce{op}", rows, axes=[1], keepdims=0)
        wider = b.op(op, value, extreme)
        b.op("Where", at[:, 0] >= 0, wider, value, output=f"{end}_out")
        b.output(f"{end}_out", len(at))
    return b.model()


def ranges_graph(moving: Sequence[Followed], count: int, constant: float) -> onnx.ModelProto:
    """Return the graph that moves the ranges of a step.

    Parameters
    ----------
    moving : sequence of Followed
        The parameters that move.
    count : int
        The number of ranges of activations.
    constant : float
        The averaging constant.

    Inputs: ``low`` and ``high``, ``seen_low`` and ``seen_high``, of shape (count,); the constants,
    flat, by the names in `Followed`. Outputs: ``low_out`` and ``high_out``; the scales and
    zero_points by their names; ``numbers``: 0 if all ranges are finite, else NaN; and the smallest
    scale.
    """
    b = GraphBuilder()
    sizes = {name: math.prod(shape) for f in moving for name, shape in f.weights.items()}
    for name, size in sizes.items():
        b.input(name, size)
    ends = {end: _averaged(b, end, moving, count, constant) for end in ("low", "high")}
    checks, smallest = [], []
    ordered = sorted(moving, key=_group_key)
    for (_, of_weights, _), found in groupby(ordered, key=_group_key):
        group = list(found)
        low, high = (
            _extremes(b, group, end) if of_weights else _rows(b, group, ends[end])
            for end in ("low", "high")
        )
        checks += [b.op("Mul", low, 0.0), b.op("Mul", high, 0.0)]
        scale, zero_point = _chosen(b, low, high, group[0].spec)
        smallest.append(b.op("ReduceMin", scale, axes=[0], keepdims=1))
        _parted(b, group, scale, scale_name)
        if zero_point and group[0].moves_zero_point:
            _parted(b, group, zero_point, zero_point_name)
    total = b.op("ReduceSum", b.op("Concat", *checks, axis=0), np.array([0], np.int64), keepdims=1)
    least = b.op("ReduceMin", b.op("Concat", *smallest, axis=0), axes=[0], keepdims=1)
    b.op("Concat", total, least, output="numbers", axis=0)
    b.output("numbers", 2)
    return b.model()


def _group_key(followed: Followed) -> tuple[str, bool, str]:
    """Return what the parameters of a group share; a ``scale_ratio`` is within one tensor."""
    spec = followed.spec
    return str(spec), followed.row is None, followed.name if spec.scale_ratio else ""


def _averaged(
    b: GraphBuilder, end: str, moving: Sequence[Followed], count: int, constant: float
) -> str:
    """Return one end of the ranges of activations after the step; empty if none moves."""
    rows = {f.row: f for f in moving if f.row is not None}
    if not rows:
        return ""
    value, seen = b.input(end, count), b.input(f"seen_{end}", count)
    if any(f.weights for f in rows.values()):
        others = [_with_constants(b, rows.get(row), end) for row in range(count)]
        seen = b.op("Min" if end == "low" else "Max", seen, b.op("Concat", *others, axis=0))
    step = b.op("Mul", b.op("Sub", seen, value), float(constant))
    moved = b.op("Add", value, step)
    chosen = np.array([row in rows for row in range(count)])
    result = b.op("Where", chosen, moved, value, output=f"{end}_out")
    b.output(result, count)
    return result


def _with_constants(b: GraphBuilder, followed: Followed | None, end: str) -> str:
    """Return the extreme of the constants that share a range, of shape (1,)."""
    if followed is None or not followed.weights:
        return b.constant(np.array([np.inf if end == "low" else -np.inf], np.float32))
    op = "Min" if end == "low" else "Max"
    found = [b.op(f"Reduce{op}", name, axes=[0], keepdims=1) for name in followed.weights]
    return b.op(op, *found) if len(found) > 1 else found[0]


def _rows(b: GraphBuilder, group: Sequence[Followed], values: str) -> str:
    """Return the ranges of a group of activations."""
    return b.op("Gather", values, np.array([f.row for f in group], np.int64))


def _extremes(b: GraphBuilder, group: Sequence[Followed], end: str) -> str:
    """Return the extremes of a group of weights, per index of their axis."""
    parts = list(_extremes_of_each(b, group, "ReduceMin" if end == "low" else "ReduceMax"))
    return b.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]


def _extremes_of_each(b: GraphBuilder, group: Sequence[Followed], op: str) -> Iterator[str]:
    for followed in group:
        ((name, shape),) = followed.weights.items()
        axis = followed.spec.axis
        axes = [i for i in range(len(shape)) if axis is None or i != axis % len(shape)]
        if not axes:  # a vector with a range for each value
            yield b.op("Identity", name)
            continue
        shaped = b.op("Reshape", name, np.array(shape, np.int64))
        reduced = b.op(op, shaped, axes=axes, keepdims=0)
        yield b.op("Reshape", reduced, np.array([-1], np.int64))


def _chosen(b: GraphBuilder, low: str, high: str, spec: QuantSpec) -> tuple[str, str]:
    """Return scale and zero_point (empty if it is 0) of `onnxqat.qparams.choose_qparams`."""
    low, high = b.op("Min", low, 0.0), b.op("Max", high, 0.0)
    signed = spec.signedness == "signed"
    qmin, qmax = quantized_range(spec, signed=signed)
    if spec.symmetric:
        reach = b.op("Max", b.op("Neg", low), high) if signed else high
        scale = b.op("Div", b.op("Max", reach, float(spec.min_range)), float(qmax))
    else:
        wide = [b.op("Cast", value, to=TensorProto.DOUBLE) for value in (high, low)]
        floor = np.array(np.float32(spec.min_range), np.float64)
        width = b.op("Max", b.op("Sub", *wide), floor)
        levels = b.op("Div", width, np.array(qmax - qmin, np.float64))
        scale = b.op("Cast", levels, to=TensorProto.FLOAT)
    scale = b.op("Max", scale, float(spec.min_scale))
    if spec.scale_ratio:
        largest = b.op("ReduceMax", scale, axes=[0], keepdims=1)
        scale = b.op("Max", scale, b.op("Div", largest, float(spec.scale_ratio)))
    if spec.power_of_two:
        scale = smallest_power(b, scale)
    if spec.symmetric:
        return scale, ""
    position = b.op("Sub", float(qmin), b.op("Div", low, scale))
    zero_point = b.op("Clip", b.op("Round", position), float(qmin), float(qmax))
    if spec.off_center:
        return _off_center(b, (low, high), scale, zero_point, spec)
    return scale, zero_point


def _off_center(
    b: GraphBuilder, ends: tuple[str, str], scale: str, zero_point: str, spec: QuantSpec
) -> tuple[str, str]:
    """Move zero_points at the center by one, to the side where the scale grows least."""
    signed = spec.signedness == "signed"
    qmin, qmax = quantized_range(spec, signed=signed)
    middle = center(storage_dtype(spec, signed=signed))
    scales = []
    for moved in (middle - 1, middle + 1):
        if not qmin < moved < qmax:  # no level is left on one side (2 bits)
            scales.append(b.op("Add", scale, math.inf))
            continue
        below = b.op("Div", b.op("Neg", ends[0]), float(moved - qmin))
        above = b.op("Div", ends[1], float(qmax - moved))
        scales.append(b.op("Max", below, above, scale))
    up = b.op("Greater", *scales)
    at_center = b.op("Equal", zero_point, float(middle))
    grown = b.op("Where", up, scales[1], scales[0])
    away = b.op("Where", up, float(middle + 1), float(middle - 1))
    return (
        b.op("Where", at_center, grown, scale),
        b.op("Where", at_center, away, zero_point),
    )


def _parted(
    b: GraphBuilder, group: Sequence[Followed], values: str, named: Callable[[str], str]
) -> None:
    """Make the part of each parameter an output."""
    names, lengths = [named(f.name) for f in group], [f.length for f in group]
    b.split(values, names, lengths)
