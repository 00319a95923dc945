"""Make the report on a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from onnxqat.analysis import Analysis, analysis_document
from onnxqat.data import DataSet
from onnxqat.errors import OptionError, RuleError
from onnxqat.evaluation import Evaluation
from onnxqat.evaluation import evaluate as run
from onnxqat.evaluation.metrics import AnyMetric, Metric, fitted, read_metric
from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel
from onnxqat.reporting import (
    AnalysisDocument,
    Comparison,
    Log,
    Report,
    Row,
    check_log,
    figures_of_evaluation,
    floats_of,
    kind_of,
    log_of,
    make_report,
    read_analysis,
    runs_of,
    source_of,
    typed_analysis,
)
from onnxqat.rules import HardwareRule
from onnxqat.settings import Settings
from onnxqat.train import read_log
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, float_model, quantized_model
from onnxqat.verbs.opening import TO_MEASURE, AnyData, opened, read_alike
from onnxqat.verbs.planning import AnyRule, rule_of
from onnxqat.verbs.repairing import repairs

__all__ = ["report"]


def report(
    model: AnySource,
    data: AnyData | None = None,
    *,
    against: AnySource | None = None,
    beside: Iterable[AnySource] = (),
    log: str | Path | None = None,
    analysis: str | Path | Analysis | None = None,
    rules: AnyRule | None = None,
    metrics: Sequence[AnyMetric] = (),
    decode: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    threads: int = 0,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> Report:
    """Return the report on a model, like ``onnxqat report``.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        The model; its history contains the figures of its fine-tunings.
    data : path, arrays or DataSet, optional
        Samples on which the float model, the models ``beside``, this model and its integer
        arithmetic are compared.
    against : str, Path or Model, optional
        The float model (default: the one inside ``model``, if its weights were not changed).
    beside : iterable of str, Path or QuantizedModel
        The model at earlier stages, for example before repair or training.
    log : str or Path, optional
        The file of ``finetune --log FILE.jsonl`` of the last fine-tuning.
    analysis : str, Path or Analysis, optional
        The result of `onnxqat.analyze`, or the output of ``onnxqat analyze --json``.
    rules : str, Path or HardwareRule, optional
        The rule of the integer arithmetic (default: the rule that the model was made with).
    metrics : sequence of str or callable
        Further metrics, see `onnxqat.evaluate`; the first one is the most important.
    decode : str, optional
        How outputs are decoded to boxes, see `onnxqat.evaluate`.
    settings : Settings
        How data become model inputs, for settings that the model does not store.
    batch_size : int, optional
        Samples per batch (default: the model's fixed batch size, or 32).
    threads : int
        The number of threads (0: all cores).
    listener : Listener
        Gets messages and progress.

    Raises
    ------
    OnnxQatError
        A file cannot be read, the log or the analysis belongs to another model, the data do not fit
        the model, or a compared model is not calibrated.
    """
    loaded, others = quantized_model(model), [quantized_model(one) for one in beside]
    if data is None and (against is not None or others):
        raise OptionError("against, beside: models are compared on data. Give data.")
    if data is None and metrics:
        raise OptionError("metrics: need data. Give data.")
    chosen = [read_metric(metric) for metric in metrics]
    reference = None if against is None else float_model(against)
    floats = reference or next(filter(None, map(floats_of, [*others, loaded])), None)
    compare = partial(
        _compared,
        [*others, loaded],
        floats,
        rule=None if rules is None else rule_of(rules),
        threads=threads,
    )
    known, found = _log(log, loaded), _analysis(analysis, loaded)
    measured = None
    if data is not None:
        for one in (*others, loaded):
            one.check_calibrated()
        for other in (*others, reference):
            read_alike(loaded, other, settings)
        with opened(
            loaded, data, settings, listener, beside=reference, splits=TO_MEASURE
        ) as samples:
            names = [tensor.name for tensor in loaded.floats.graph.outputs]
            samples, wanted = fitted(
                samples, chosen, names, compared=floats is not None, decode=decode
            )
            size = samples.batch_size(batch_size)
            total = (len(others) + 2) * -(-len(samples) // size)
            with listener.batches("evaluating", total) as advance:
                measured = compare(samples, size, metrics=wanted, progress=advance)
    lines = repairs(loaded.floats, loaded.plan, source_of(loaded))
    return make_report(loaded, measured=measured, log=known, analysis=found, repairs=lines)


def _log(path: str | Path | None, model: QuantizedModel) -> Log | None:
    if path is None:
        return None
    found, runs = log_of(read_log(path)), runs_of(model)
    if runs:
        check_log(found, runs[-1], str(path), model.name)
    return found


def _analysis(
    given: str | Path | Analysis | None, model: QuantizedModel
) -> AnalysisDocument | None:
    if isinstance(given, Analysis):
        return typed_analysis(analysis_document(given, model), model, "analysis")
    return None if given is None else read_analysis(given, model)


def _compared(
    models: list[QuantizedModel],
    reference: Model | None,
    samples: DataSet,
    size: int,
    *,
    rule: HardwareRule | None,
    metrics: Sequence[Metric],
    threads: int,
    progress: Callable[[], None],
) -> Comparison:
    """Evaluate the models, and the last one in integer arithmetic, on the same samples."""
    evaluated = partial(run, against=reference, metrics=metrics, threads=threads, progress=progress)
    results = [(one, evaluated(one, samples.batches(size))) for one in models]
    rows = [_float_row(results[0][1], reference)]
    rows += [
        Row(kind=kind_of(one), file=one.name, figures=figures_of_evaluation(result))
        for one, result in results
    ]
    last = models[-1]
    try:
        result = evaluated(last, samples.batches(size), mode="integer", rule=rule)
        found = figures_of_evaluation(result)
        if reference is None:  # integers are then compared with the model itself
            found = {name: found[name] for name in result.metrics}
        rows.append(Row(kind="integer", file=last.name, figures=found, note=result.assumption))
    except RuleError as error:  # its arithmetic is not documented
        rows.append(Row(kind="integer", file=last.name, figures={}, note=str(error)))
    data = f"samples of {Path(samples.name).name}"
    measured = results[0][1]
    return Comparison(
        data=data,
        samples=measured.samples,
        rows=tuple(rows),
        asked=next(iter(measured.first.values()), None),
    )


def _float_row(result: Evaluation, reference: Model | None) -> Row:
    if reference is None:
        note = "Training or repair changed its weights. Give the float model with --against."
        return Row(kind="float", file="", figures={}, note=note)
    figures: dict[str, float | None] = dict(result.reference)
    note = "" if figures else "the reference of the others"
    return Row(kind="float", file=reference.name, figures=figures, note=note)
