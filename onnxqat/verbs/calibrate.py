"""A Q/DQ model with scales measured on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from onnxqat.calibration import Calibration
from onnxqat.calibration import calibrate as run
from onnxqat.data import Batch, DataSet
from onnxqat.errors import DataError
from onnxqat.parallel import Workers
from onnxqat.quantized import QuantizedModel, Stage
from onnxqat.repair import correct_biases
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, quantized_model
from onnxqat.verbs.opening import AnyData, opened, warn_if_unlike_training

__all__ = ["DEFAULT_SIZE", "calibrate"]

DEFAULT_SIZE = 32  # of a batch


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
    """Return the model with scales measured on data, as ``onnxqat calibrate`` does.

    The workers share whole batches between them, since what a runtime computes for a sample may
    depend on the batch it is in.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        As `insert` returns it. It is not changed.
    data : path, arrays or DataSet
        A seeded choice of their samples is read.
    settings : Settings
        What becomes of the data, where the model does not remember it.
    calibration : Calibration
        How it is done.
    listener : Listener
        Is told what is done.
    workers : Workers
        The processes that calibrate together, see `onnxqat.parallel`.
    default_size : int
        Samples at a time, where neither the calibration nor the model says.

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
            progress=advance,
            workers=workers,
        )
    if calibration.bias_correction:
        batches = partial(data.batches, size, indices=mine)
        result, corrected = _with_corrected_biases(result, batches, listener, workers, threads)
    broken = workers.gather(data.broken(mine))
    seen = workers.first(lambda: len(chosen) - sum(broken))
    said = {name: getattr(calibration, name) for name in ("observer", "samples", "seed")}
    said |= {"batch_size": size} if size != DEFAULT_SIZE else {}
    figures: dict[str, float | None] = {"samples": float(seen)}
    if calibration.bias_correction:
        said["bias_correction"] = True
        figures["corrected"] = float(corrected)
    inputs = {"data": Path(data.name).name}
    return result.with_stage(Stage(name="calibrate", settings=said, figures=figures, inputs=inputs))


def _with_corrected_biases(
    model: QuantizedModel,
    batches: Callable[[], Iterator[Batch]],
    listener: Listener,
    workers: Workers,
    threads: int,
) -> tuple[QuantizedModel, int]:
    """Correct biases on the calibration data; return the model, and of how many layers."""
    if workers.size > 1:
        raise DataError("--bias-correction runs in one process. Start it without mpirun.")
    result = correct_biases(model, batches, threads=threads)
    listener.note(
        f"Corrected the biases of {len(result.layers)} layers; {len(result.skips)} have none. "
        "Fine-tuning needs --teacher now."
    )
    return result.model, len(result.layers)
