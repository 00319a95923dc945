"""Measure the accuracy of a model on data, and its agreement with a reference model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from onnxqat.choices import check_choice
from onnxqat.data import DataSet
from onnxqat.data.beside import BOXES
from onnxqat.device import CPU, find_device
from onnxqat.errors import DataError, OptionError
from onnxqat.evaluation import Evaluation
from onnxqat.evaluation import evaluate as run
from onnxqat.evaluation.integer import check_documented
from onnxqat.evaluation.labels import CAUSES
from onnxqat.evaluation.metrics import AnyMetric, fitted, read_metric
from onnxqat.evaluation.run import MODES, Mode
from onnxqat.quantized import AnyModel, QuantizedModel, float_part, require_quantized
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, any_model
from onnxqat.verbs.opening import TO_MEASURE, AnyData, opened, read_alike, warn_if_unlike_training
from onnxqat.verbs.planning import AnyRule, rule_of

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)


def evaluate(
    model: AnySource,
    data: AnyData,
    *,
    mode: Mode = "qdq",
    against: AnySource | None = None,
    rules: AnyRule | None = None,
    metrics: Sequence[AnyMetric] = (),
    decode: str | None = None,
    labelled: bool = False,
    decides: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    threads: int = 0,
    device: str = "cpu",
    precision: str | None = None,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> Evaluation:
    """Return the figures of a model on data, like ``onnxqat evaluate``.

    Parameters
    ----------
    model : str, Path, Model or QuantizedModel
        A model, float or with Q/DQ pairs.
    data : path, arrays or DataSet
        The samples, with labels to measure accuracy.
    mode : {"float", "qdq", "integer"}
        The arithmetic: float without Q/DQ, that of the file (unfused), or the chip's integers.
    against : str, Path, Model or QuantizedModel, optional
        A reference model, with which agreement and the largest difference are measured.
    rules : str, Path or HardwareRule, optional
        The rule for ``mode="integer"`` (default: the rule that the model was made with).
    metrics : sequence of str or callable
        Further metrics: names of built-in metrics, or your own functions or their names, see
        `onnxqat.evaluation.metrics.named`.
    decode : str, optional
        How outputs are decoded to boxes, see `onnxqat.evaluation.decoders` (default: chosen by
        their shapes).
    labelled : bool
        Refuse data without labels.
    decides : str, optional
        What the figures decide, as the subject of a sentence. Integer figures of a rule that
        assumes a part of its arithmetic are then refused.
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
        cannot run in this mode.
    """
    check_choice("mode", mode, MODES)
    if rules is not None and mode != "integer":
        raise OptionError("rules: apply to mode 'integer' only. Leave them out.")
    if mode == "integer" and device not in ("cpu", "auto"):
        raise OptionError("--device: the integer mode runs on the CPU. Leave --device out.")
    place = CPU if mode == "integer" else find_device(device, precision)
    chosen = [read_metric(metric) for metric in metrics]
    loaded = any_model(model)
    reference = None if against is None else any_model(against)
    rule = None if rules is None else rule_of(rules)
    if decides is not None and mode == "integer":
        check_documented(require_quantized(loaded), rule, decides)
    read_alike(loaded, reference, settings)
    with opened(loaded, data, settings, listener, beside=reference, splits=TO_MEASURE) as samples:
        if labelled and not samples.has_labels:
            raise DataError(
                f"{samples.name}: has no labels, which are needed here. Name them with --label."
            )
        size = samples.batch_size(batch_size)
        names = [tensor.name for tensor in float_part(loaded).graph.outputs]
        compared = reference is not None or mode == "integer"
        samples, wanted = fitted(samples, chosen, names, compared=compared, decode=decode)
        warn_if_unlike_training(loaded, samples, batch_size=size, threads=threads)
        with listener.batches("evaluating", -(-len(samples) // size)) as advance:
            result = run(
                loaded,
                samples.batches(size),
                mode=mode,
                against=reference,
                rule=rule,
                metrics=wanted,
                threads=threads,
                device=place,
                progress=advance,
            )
    if result.doubt is not None:
        _warn_of_labels(loaded, result, mode)
    if not (result.metrics or compared):
        listener.note(_nothing_measured(samples))
    return result


def _nothing_measured(data: DataSet) -> str:
    """Say why there are no figures, and what to do."""
    if BOXES in data.array_names:
        return f"{data.name}: nothing was measured. It has boxes: pass --metric map."
    return (
        f"{data.name}: nothing was measured, because it has no class labels. Name them with "
        "--label, compare with --against MODEL, or choose what to measure with --metric."
    )


def _warn_of_labels(model: AnyModel, result: Evaluation, mode: str) -> None:
    """Warn if the model is so often wrong that the labels may not belong to it."""
    judged = "the reference" if result.reference else model.name
    rounded = isinstance(model, QuantizedModel) and mode != "float" and not result.reference
    other = " Or quantization is the cause: check with --mode float." if rounded else ""
    logger.warning("%s %s. %s%s", judged, result.doubt, CAUSES, other)
