"""Find the tensors and layers that cost the most accuracy, and advise what to do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from onnxqat.analysis import Analysis, metrics_of, passes
from onnxqat.analysis import analyze as run
from onnxqat.device import find_device
from onnxqat.evaluation.metrics import AnyMetric, fitted
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, float_model, quantized_model
from onnxqat.verbs.opening import AnyData, opened, read_alike, warn_if_unlike_training
from onnxqat.verbs.planning import AnyRule, rule_of

__all__ = ["analyze"]


def analyze(
    model: AnySource,
    data: AnyData,
    *,
    against: AnySource | None = None,
    metric: AnyMetric = "error",
    decode: str | None = None,
    rules: AnyRule | None = None,
    samples: int = 64,
    seed: int = 0,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    threads: int = 0,
    device: str = "cpu",
    precision: str | None = None,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> Analysis:
    """Return the tensors and layers that differ most between quantized and float model.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        A calibrated or fine-tuned model.
    data : path, arrays or DataSet
        The samples, with labels if the metric needs them.
    against : str, Path or Model, optional
        The original float model (default: the float part of ``model``, whose weights fine-tuning
        has changed).
    metric : str or callable
        The cost of a layer: ``error``, the name of a built-in metric, or your own function or its
        name, see `onnxqat.analysis.sensitivity`.
    decode : str, optional
        How outputs are decoded to boxes, see `onnxqat.evaluation.decoders` (default: chosen by
        their shapes).
    rules : str, Path or HardwareRule, optional
        The rule that the model was made with (default: the bundled rule of that name).
    samples : int
        The number of samples that are read, chosen at random.
    seed : int
        The seed of that choice.
    settings : Settings
        How data become model inputs, for settings that the model does not store.
    batch_size : int, optional
        Samples per batch (default: the model's fixed batch size, or 32).
    threads : int
        The number of threads (0: all cores).
    device : str
        ``cpu``, ``cuda``, ``cuda:1`` and so on, or ``auto``: a usable GPU, else the CPU.
    precision : {"tf32", "fp32"}, optional
        Precision of matrix products on a GPU, see `onnxqat.device.Device`; ``tf32`` by default.
    listener : Listener
        Gets messages and progress.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, the data do not fit the model, or the model
        does not run.
    """
    place = find_device(device, precision)
    wanted = metrics_of(metric)
    loaded = quantized_model(model)
    reference = None if against is None else float_model(against)
    read_alike(loaded, reference, settings)
    labels = any(one.needs in ("labels", "everything") for one in wanted)
    with opened(loaded, data, settings, listener, beside=reference, labels=labels) as found:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(found))[:samples])
        names = [tensor.name for tensor in loaded.floats.graph.outputs]
        found, wanted = fitted(found, wanted, names, decode=decode)
        size = found.batch_size(batch_size)
        warn_if_unlike_training(loaded, found, batch_size=size, threads=threads)
        total = passes(loaded) * -(-len(chosen) // size)
        with listener.batches("analyzing", total) as advance:
            result = run(
                loaded,
                partial(found.batches, size, indices=chosen),
                against=reference,
                metric=wanted[0] if wanted else metric,
                rule=None if rules is None else rule_of(rules),
                threads=threads,
                device=place,
                progress=advance,
            )
    return replace(result, data=Path(found.name).name)
