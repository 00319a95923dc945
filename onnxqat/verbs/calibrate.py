"""Measure the scales of a Q/DQ model on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from onnxqat.calibration import Calibration
from onnxqat.calibration import calibrate as run
from onnxqat.data import Batch, DataSet
from onnxqat.device import find_device
from onnxqat.errors import DataError
from onnxqat.parallel import Workers
from onnxqat.quantized import QuantizedModel, Stage
from onnxqat.repair import bias_passes, correct_biases, correct_biases_analytically
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, quantized_model
from onnxqat.verbs.opening import AnyData, opened, warn_if_unlike_training

__all__ = ["DEFAULT_SIZE", "calibrate"]

DEFAULT_SIZE = 32  # samples per batch
# Few samples are enough: a mean is over many positions, and both models see the same samples.
BIAS_SAMPLES = 128


def calibrate(
    model: AnySource,
    data: AnyData,
    *,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
    listener: Listener = Listener(),  # noqa: B008 (without state)
    workers: Workers = Workers(),  # noqa: B008 (without state)
    default_size: int = DEFAULT_SIZE,
) -> QuantizedModel:
    """Return the model with scales measured on data, like ``onnxqat calibrate``.

    Several workers share complete batches between them, because the result of a runtime for a
    sample can depend on its batch.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        A model from `insert`. It is not changed.
    data : path, arrays or DataSet
        The samples, of which a seeded random choice is read.
    settings : Settings
        How data become model inputs, for settings that the model does not store.
    calibration : Calibration
        The calibration settings.
    listener : Listener
        Gets messages and progress.
    workers : Workers
        The processes that calibrate together, see `onnxqat.parallel`.
    default_size : int
        Samples per batch, if neither the calibration settings nor the model determine it.

    Raises
    ------
    OnnxQatError
        A file cannot be read, the model is float or fine-tuned, or the data do not fit it.
    """
    loaded = quantized_model(model)
    with opened(loaded, data, settings, listener, labels=False) as samples:
        return _calibrated(loaded, samples, calibration, listener, workers, default_size)


def _calibrated(
    model: QuantizedModel,
    data: DataSet,
    calibration: Calibration,
    listener: Listener,
    workers: Workers,
    default_size: int,
) -> QuantizedModel:
    threads = calibration.threads
    device = find_device(
        calibration.device, calibration.precision, rank=workers.rank, size=workers.size
    )
    rng = np.random.default_rng(calibration.seed)
    chosen = rng.permutation(len(data))[: calibration.samples]
    size = data.batch_size(calibration.batch_size, default=default_size)
    if workers.rank == 0:
        warn_if_unlike_training(model, data, batch_size=size, threads=threads)
    share = workers.share(-(-len(chosen) // size))
    mine = np.sort(chosen)[share.start * size : share.stop * size]
    with listener.batches("calibrating", share.stop - share.start) as advance:
        result = run(
            model,
            data.batches(size, indices=mine),
            observer=calibration.observer,
            threads=threads,
            device=device,
            progress=advance,
            workers=workers,
        )
    if calibration.bias_correction:
        few = np.sort(chosen[: max(BIAS_SAMPLES, size)])
        batches = partial(data.batches, size, indices=few)
        how, total = calibration.bias_correction, -(-len(few) // size)
        result, corrected = _with_corrected_biases(
            result, how, batches, total, listener, workers, threads
        )
    broken = workers.gather(data.broken(mine))
    seen = workers.first(lambda: len(chosen) - sum(broken))
    said = {name: getattr(calibration, name) for name in ("observer", "samples", "seed")}
    said |= {"batch_size": size} if size != DEFAULT_SIZE else {}
    usual = Calibration()
    for name in ("device", "precision"):
        if (value := getattr(calibration, name)) != getattr(usual, name):
            said[name] = value
    figures: dict[str, float | None] = {"samples": float(seen)}
    if calibration.bias_correction:
        said["bias_correction"] = calibration.bias_correction
        figures["corrected"] = float(corrected)
    inputs = {"data": Path(data.name).name}
    stage = Stage(
        name="calibrate", settings=said, figures=figures, inputs=inputs, device=str(device)
    )
    return result.with_stage(stage)


def _with_corrected_biases(
    model: QuantizedModel,
    how: str,
    batches: Callable[[], Iterator[Batch]],
    count: int,
    listener: Listener,
    workers: Workers,
    threads: int,
) -> tuple[QuantizedModel, int]:
    """Correct biases; return the model and the number of corrected layers."""
    if how == "analytic":
        result = correct_biases_analytically(model)
    elif workers.size > 1:
        raise DataError("--bias-correction runs in one process only. Start it without mpirun.")
    else:
        with listener.batches("correcting biases", count * bias_passes(model)) as advance:
            result = correct_biases(model, batches, threads=threads, progress=advance)
    layers, skips = result.layers, result.skips
    if layers:
        listener.note(f"Corrected the biases of {len(layers)} layers; {len(skips)} are unchanged.")
    else:
        reasons = sorted({skip.reason for skip in skips}) or ["no layer is quantized"]
        listener.note(f"No bias was corrected: {'; '.join(reasons)}.")
    return result.model, len(layers)
