"""A page about a quantized model: what was done, what it reached, and what to do."""

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
    """Return a page about a model, as ``onnxqat report`` writes it.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        Its history has the figures of its fine-tunings.
    data : path, arrays or DataSet, optional
        The float model, those ``beside``, this one and its integers are compared on them.
    against : str, Path or Model, optional
        The float model; by default that inside of a model whose weights are still its own.
    beside : iterable of str, Path or QuantizedModel
        The model at earlier stages, before repair or training for instance.
    log : str or Path, optional
        What ``finetune --log FILE.jsonl`` wrote, of the last fine-tuning.
    analysis : str, Path or Analysis, optional
        What `onnxqat.analyze` returns, or ``onnxqat analyze --json`` printed.
    rules : str, Path or HardwareRule, optional
        Of the integers; the rule that the model was made with by default.
    metrics : sequence of str or callable
        What to measure on the data besides, see `onnxqat.evaluate`; the first says most.
    decode : str, optional
        How outputs become boxes, see `onnxqat.evaluate`.
    settings : Settings
        What becomes of the data, where the model does not remember it.
    batch_size : int, optional
        Samples at a time; those of the model where it is fixed, else 32.
    threads : int
        0 takes all cores.
    listener : Listener
        Is told what is done.

    Raises
    ------
    OnnxQatError
        A file cannot be read, the log or the analysis is of another model, the data do not fit the
        model, or a model that is compared is not calibrated.
    """
    loaded, others = quantized_model(model), [quantized_model(one) for one in beside]
    if data is None and (against is not None or others):
        raise OptionError("against, beside: are compared on data. Give data.")
    if data is None and metrics:
        raise OptionError("metrics: are measured on data. Give data.")
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
            loaded, data, settings, listener, beside=reference, parts=TO_MEASURE
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
    """Evaluate the models and the integers of the last one on the same samples."""
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
        if reference is None:  # without one, integers are compared with the model itself
            found = {name: found[name] for name in result.metrics}
        rows.append(Row(kind="integer", file=last.name, figures=found))
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
        note = "Its weights were changed in training or repair. Give the float model: --against."
        return Row(kind="float", file="", figures={}, note=note)
    figures: dict[str, float | None] = dict(result.reference)
    note = "" if figures else "what the others are compared with"
    return Row(kind="float", file=reference.name, figures=figures, note=note)
