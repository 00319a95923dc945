"""Measure clipping ranges on data, one batch at a time, and choose parameters from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.calibration.biases import fit_bias_range
from onnxqat.calibration.observers import OBSERVERS, Observer, Range, weight_method, weight_range
from onnxqat.choices import check_choice
from onnxqat.data import Batch
from onnxqat.device import CPU, Device
from onnxqat.ends import TensorReader
from onnxqat.errors import DataError, ModelError, PlanError
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
    device: Device = CPU,
    progress: Callable[[], None] = lambda: None,
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> QuantizedModel:
    """Return a Q/DQ model with parameters measured on data.

    Parameters that come from another tool are kept.

    Parameters
    ----------
    model : QuantizedModel
        A model that is not fine-tuned.
    batches : iterable of Batch, or of mapping of str to array
        Batches of the data, or model inputs by name. One batch is in memory at a time.
    observer : str
        A name in `OBSERVERS`, for the points whose spec has none. With ``mse`` and ``auto``,
        weights get the range with the least squared error; with others, their extremes.
    device : Device
        The device that runs the model; the observers process its tensors on the CPU.
    progress : callable
        Called after each batch.
    workers : Workers
        The processes that calibrate together, see `onnxqat.parallel`. Each process calls this
        function with its share of the batches; the shares are in the order of the ranks. All
        processes return the model that a single process with all batches would return.

    Raises
    ------
    ModelError
        The model is fine-tuned, so calibration would replace trained scales.
    DataError
        A tensor contains NaN or infinity, or there are no data.
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
    open_reader = partial(TensorReader, optimization="basic", threads=threads, device=device)
    watched, ranges = _observe(floats, plan, batches, observer, open_reader, progress, workers)

    def measured() -> tuple[dict[str, QuantParams], QuantPlan]:
        for point in plan.grid_points():
            if point.role == "activation" and point.parameters not in params:
                low, high = _range_of(watched[point.parameters], empty=point.tensor in ranges)
                with _named(point):
                    params[point.parameters] = choose_qparams(low, high, point.spec)
        _warn_of_constants(ranges)
        return params, fit_bias_range(plan, params, tensors, kept=taken)

    params, fitted = workers.first(measured)
    return model.with_params(params, state="calibrated", plan=resolved_plan(fitted, params))


def placeholder_params(model: Model, plan: QuantPlan) -> dict[str, QuantParams]:
    """Return parameters without data: weights by their extremes, activations with scale 1."""
    params = _weight_params(plan, model.graph.tensors(), "minmax")
    for point in plan.grid_points():
        if point.role == "activation":
            high = np.asarray(2 ** (point.spec.bits - 1) - 1, np.float32)
            low = np.zeros_like(high) if point.spec.signedness == "unsigned" else -high
            params.setdefault(point.parameters, choose_qparams(low, high, point.spec))
    return params


@contextmanager
def _named(point: QuantPoint) -> Iterator[None]:
    """Put the name of the tensor in front of an error."""
    try:
        yield
    except (DataError, PlanError) as error:
        raise type(error)(f"'{point.tensor}': {error}") from error


def _weight_params(
    plan: QuantPlan, tensors: Mapping[str, gs.Tensor], observer: str
) -> dict[str, QuantParams]:
    params = {}
    for point in plan.grid_points():
        if point.role == "weight" and point.group is None:
            method = weight_method(point.spec, observer)
            with _named(point):
                low, high = weight_range(tensors[point.tensor].values, point.spec, method)
                params[point.parameters] = choose_qparams(low, high, point.spec)
    return params


def _observe(
    floats: Model,
    plan: QuantPlan,
    batches: Iterable[Batch | Mapping[str, NDArray[Any]]],
    observer: str,
    open_reader: Callable[..., TensorReader],
    progress: Callable[[], None],
    workers: Workers,
) -> tuple[dict[str, Observer], dict[str, Range]]:
    """Feed every activation of the float model to the observer of its parameters.

    Return the observers, and the smallest and largest value of each activation. In worker 0 they
    cover all batches, in other workers only their own batches.
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
        if not point.observed:
            continue
        if isinstance(tensors[point.tensor], gs.Constant):  # part of a group; observe it once
            if workers.rank == 0:
                watched[point.parameters].update(tensors[point.tensor].values)
        else:
            activations.append(point)
    fed = {t.name for t in floats.graph.inputs}
    fetched = [p.tensor for p in activations if p.tensor not in fed]
    reader = open_reader(floats.to_proto(), fetched, name=floats.name)
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
    """Widen the ranges by those in ``seen``; add the tensors that are new."""
    for name, (low, high) in seen.items():
        known = ranges.get(name, (low, high))
        ranges[name] = min(known[0], low), max(known[1], high)


def _range_of(observer: Observer, *, empty: bool) -> tuple[FloatArray, FloatArray]:
    """Return the observed range; (0, 0) for a tensor that was always empty, such as a cache."""
    if empty and observer.saw_nothing:
        return np.zeros((), np.float32), np.zeros((), np.float32)
    return observer.range()


def _warn_of_constants(ranges: Mapping[str, Range]) -> None:
    """Warn about activations that had a single value, or none, in all of the data."""
    constants = [f"'{name}' ({low:g})" for name, (low, high) in ranges.items() if low == high]
    constants += [f"'{name}' (empty)" for name, (low, high) in ranges.items() if low > high]
    if constants:
        logger.warning(
            "%d activations had only one value in all of the calibration data: %s. Their scales "
            "do not fit other values. Give data in which they vary, or keep them float "
            "(--set tensor:NAME.quantize=false).",
            len(constants),
            ", ".join(constants),
        )


def _opened(
    batch: Batch | Mapping[str, NDArray[Any]],
) -> tuple[Mapping[str, NDArray[Any]], Callable[[NDArray[Any]], NDArray[Any]]]:
    """Return the model inputs of a batch, and a function that removes padding from a tensor."""
    if isinstance(batch, Batch):
        return batch.inputs, batch.counting
    return batch, lambda values: values


def _merged(own: Observer, workers: Workers) -> Observer:
    first, *others = workers.gather(own) or [own]
    for other in others:
        first.merge(other)
    return first


def resolved_plan(plan: QuantPlan, params: Mapping[str, QuantParams]) -> QuantPlan:
    """Return the plan with ``from_range`` replaced by the signedness of the parameters."""

    def resolve(point: QuantPoint) -> QuantPoint:
        if point.spec.signedness != "from_range":
            return point
        kind = "signed" if params[point.parameters].signed else "unsigned"
        spec = msgspec.structs.replace(point.spec, signedness=kind)
        return msgspec.structs.replace(point, spec=spec)

    points = tuple(resolve(p) if p.role != "bias" else p for p in plan.points)
    return msgspec.structs.replace(plan, points=points)
