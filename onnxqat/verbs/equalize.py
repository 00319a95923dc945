"""Equalize the channel ranges of a float model."""

from __future__ import annotations

from dataclasses import replace

from onnxqat.choices import check_choice
from onnxqat.preparation import prepare
from onnxqat.preparation.float16 import FLOAT16_KEY, narrow_to_float16
from onnxqat.quantized import without_notes
from onnxqat.repair import RELU6, Equalized, Relu6
from onnxqat.repair import equalize as run
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, float_model
from onnxqat.verbs.opening import AnyData, opened
from onnxqat.verbs.repairing import compared_batches

__all__ = ["equalize"]


def equalize(
    model: AnySource,
    data: AnyData | None = None,
    *,
    relu6: Relu6 = "auto",
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    threads: int = 0,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> Equalized:
    """Return the model with equalized channel ranges, like ``onnxqat equalize``.

    Parameters
    ----------
    model : str, Path or Model
        The float model. It is not changed.
    data : path, arrays or DataSet, optional
        Samples on which outputs are compared, normalizations smoothed and ReLU6 replaced. Without
        them, outputs are compared on random values.
    relu6 : {"auto", "keep", "replace"}
        See `onnxqat.repair.equalize`.
    settings : Settings
        How data become model inputs.
    batch_size : int, optional
        Samples per batch.
    threads : int
        The number of threads (0: all cores).
    listener : Listener
        Gets messages and progress.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, or the data do not fit the model.
    """
    check_choice("relu6", relu6, RELU6)
    prepared = prepare(float_model(model))
    batches = None
    if data is not None:
        with opened(prepared, data, settings, listener, labels=False) as source:
            batches = compared_batches(source, batch_size)
    result = run(prepared, batches, relu6=relu6, threads=threads)
    floats, narrow = result.model, result.model.metadata.get(FLOAT16_KEY)
    floats.metadata = without_notes(floats.metadata)
    return replace(result, model=floats if narrow is None else narrow_to_float16(floats, narrow))
