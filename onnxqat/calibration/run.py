"""Measure clipping ranges over data and turn them into parameters, one batch at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.calibration.biases import fit_bias_range
from onnxqat.calibration.observers import OBSERVERS, Observer, Range, weight_method, weight_range
from onnxqat.choices import check_choice
from onnxqat.data import Batch
from onnxqat.ends import TensorReader
from onnxqat.errors import ModelError
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import FloatArray, QuantParams, choose_qparams
from onnxqat.quantized import QuantizedModel

__all__ = ["calibrate", "placeholder_params", "resolved_plan"]

logger = logging.getLogger(__name__)


def calibrate(
    model: QuantizedModel,
    batches: Iterable[Batch | Mapping[str, NDArray[Any]]],
    *,
    observer: str = "mse",
    threads: int = 0,
    progress: Callable[[], None] = lambda: None,
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> QuantizedModel:
    """Return a Q/DQ model with parameters measured on data.

    Parameters that were taken over from another tool stay.

    Parameters
    ----------
    model : QuantizedModel
        As `insert` made it, not fine-tuned.
    batches : iterable of Batch, or of mapping of str to array
        Batches of the data, or model inputs by name. One batch is held at a time.
    observer : str
        A name in `OBSERVERS`, for the points whose spec has none. Weights take the range of least
        squared error with ``mse`` and ``auto``, their extremes with all others.
    progress : callable
        Called after each batch.
    workers : Workers
        The processes that calibrate together, see `onnxqat.parallel`. All call this function with
        their share of the batches, that of a lower rank coming first, and all return the model
        that one process with all batches returns.

    Raises
    ------
    ModelError
        The model is fine-tuned: its scales are trained, not measured.
    DataError
        A tensor holds NaN or infinity, or there is no data.
    """
    check_choice("observer", observer, OBSERVERS)
    if model.state == "finetuned":
        raise ModelError(
            f"{model.name}: is fine-tuned; calibrating would replace its trained scales. "
            "Calibrate the file that 'onnxqat insert' wrote."
        )
    plan, floats = model.plan, model.floats
    tensors = floats.graph.tensors()
    params = _weight_params(plan, tensors, observer)
    taken = {name: model.params[name] for name in model.taken}
    params |= taken
    watched, ranges = _observe(floats, plan, batches, observer, threads, progress, workers)

    def measured() -> tuple[dict[str, QuantParams], QuantPlan]:
        for point in plan.grid_points():
            if point.role == "activation" and point.parameters not in params:
                low, high = _range_of(watched[point.parameters], empty=point.tensor in ranges)
                params[point.parameters] = choose_qparams(low, high, point.spec)
        _warn_of_constants(ranges)
        return params, fit_bias_range(plan, params, tensors, kept=taken)

    params, fitted = workers.first(measured)
    return model.with_params(params, state="calibrated", plan=resolved_plan(fitted, params))


def placeholder_params(model: Model, plan: QuantPlan) -> dict[str, QuantParams]:
    """Return parameters without data: weights by magnitude, scale 1 for every activation."""
    params = _weight_params(plan, model.graph.tensors(), "minmax")
    for point in plan.grid_points():
        if point.role == "activation":
            high = np.asarray(2 ** (point.spec.bits - 1) - 1, np.float32)
            low = np.zeros_like(high) if point.spec.signedness == "unsigned" else -high
            params.setdefault(point.parameters, choose_qparams(low, high, point.spec))
    return params


def _weight_params(
    plan: QuantPlan, tensors: Mapping[str, gs.Tensor], observer: str
) -> dict[str, QuantParams]:
    params = {}
    for point in plan.grid_points():
        if point.role == "weight" and point.group is None:
            method = weight_method(point.spec, observer)
            low, high = weight_range(tensors[point.tensor].values, point.spec, method)
            params[point.parameters] = choose_qparams(low, high, point.spec)
    return params


def _observe(
    floats: Model,
    plan: QuantPlan,
    batches: Iterable[Batch | Mapping[str, NDArray[Any]]],
    observer: str,
    threads: int,
    progress: Callable[[], None],
    workers: Workers,
) -> tuple[dict[str, Observer], dict[str, Range]]:
    """Show every activation of the float model to the observer of its parameters.

    Worker 0 returns the observers of all batches, the others those of their own; and likewise the
    smallest and the largest value of each activation.
    """
    points = [p for p in plan.grid_points() if p.role == "activation" or p.group]
    watched: dict[str, Observer] = {}
    for point in points:
        if point.parameters not in watched:
            kind = OBSERVERS[point.spec.observer or observer]
            watched[point.parameters] = kind(point.spec, name=point.parameters)
    tensors = floats.graph.tensors()
    activations = []
    for point in points:
        if isinstance(tensors[point.tensor], gs.Constant):  # in a group; it is seen once
            if workers.rank == 0:
                watched[point.parameters].update(tensors[point.tensor].values)
        elif point.observed:
            activations.append(point)
    fed = {t.name for t in floats.graph.inputs}
    fetched = [p.tensor for p in activations if p.tensor not in fed]
    reader = TensorReader(
        floats.to_proto(), fetched, optimization="basic", threads=threads, name=floats.name
    )
    ranges: dict[str, Range] = {}
    for batch in batches:
        inputs, counting = _opened(batch)
        values = reader.run(inputs)
        for point in activations:
            known = values if point.tensor in values else inputs
            seen = watched[point.parameters].update(counting(known[point.tensor]))
            _widen(ranges, {point.tensor: seen})
        progress()
    for others in workers.gather(ranges)[1:]:
        _widen(ranges, others)
    return {name: _merged(own, workers) for name, own in watched.items()}, ranges


def _widen(ranges: dict[str, Range], seen: Mapping[str, Range]) -> None:
    """Widen the ranges by others, which may be of other tensors."""
    for name, (low, high) in seen.items():
        known = ranges.get(name, (low, high))
        ranges[name] = min(known[0], low), max(known[1], high)


def _range_of(observer: Observer, *, empty: bool) -> tuple[FloatArray, FloatArray]:
    """Return what was observed; of an empty tensor, such as a cache at the start, the point 0."""
    if empty and observer.saw_nothing:
        return np.zeros((), np.float32), np.zeros((), np.float32)
    return observer.range()


def _warn_of_constants(ranges: Mapping[str, Range]) -> None:
    """Name the activations whose data say nothing of the values they may take."""
    constants = [f"'{name}' ({low:g})" for name, (low, high) in ranges.items() if low == high]
    constants += [f"'{name}' (empty)" for name, (low, high) in ranges.items() if low > high]
    if constants:
        logger.warning(
            "%d activations had one value in all of the calibration data: %s. Their scales fit no "
            "other value. Give data in which they vary, or keep them float "
            "(--set tensor:NAME.quantize=false).",
            len(constants),
            ", ".join(constants),
        )


def _opened(
    batch: Batch | Mapping[str, NDArray[Any]],
) -> tuple[Mapping[str, NDArray[Any]], Callable[[NDArray[Any]], NDArray[Any]]]:
    """Return model inputs, and what takes from a tensor the samples that count."""
    if isinstance(batch, Batch):
        return batch.inputs, batch.counting
    return batch, lambda values: values


def _merged(own: Observer, workers: Workers) -> Observer:
    first, *others = workers.gather(own) or [own]
    for other in others:
        first.merge(other)
    return first


def resolved_plan(plan: QuantPlan, params: Mapping[str, QuantParams]) -> QuantPlan:
    """Return the plan with the signedness that the parameters have."""

    def resolve(point: QuantPoint) -> QuantPoint:
        if point.spec.signedness != "from_range":
            return point
        kind = "signed" if params[point.parameters].signed else "unsigned"
        spec = msgspec.structs.replace(point.spec, signedness=kind)
        return msgspec.structs.replace(point, spec=spec)

    points = tuple(resolve(p) if p.role != "bias" else p for p in plan.points)
    return msgspec.structs.replace(plan, points=points)
