"""What several commands do on the way: open the data, calibrate, print the result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from onnxqat.data import DataSet
    from onnxqat.evaluation import Evaluation
    from onnxqat.model import Model
    from onnxqat.parallel import Workers
    from onnxqat.plan import QuantPlan
    from onnxqat.quantized import AnyModel, QuantizedModel
    from onnxqat.rules import HardwareRule
    from onnxqat.settings import Settings

__all__ = [
    "calibrated",
    "join",
    "load_float",
    "load_quantized",
    "note",
    "open_for",
    "output_documents",
    "output_rows",
    "percentages",
    "plan_document",
    "planned",
    "print_result",
    "renamed",
    "take_settings",
    "warn_if_unlike_training",
]

logger = logging.getLogger(__name__)
QUIET = "onnxqat.quiet"  # in click's context: another process prints the notes


def join() -> Workers:
    """Join the processes that work together; the first one speaks for all."""
    from onnxqat.parallel import join_workers

    workers = join_workers()
    if workers.rank > 0:
        logging.disable(logging.WARNING)
        click.get_current_context().meta[QUIET] = True
    return workers


def note(text: str) -> None:
    """Print a line beside the result, unless another process does."""
    context = click.get_current_context(silent=True)
    if context is None or not context.meta.get(QUIET):
        say(text, err=True)


def take_settings(options: dict[str, Any]) -> Settings:
    """Take what is stored about the data out of a command's arguments."""
    from onnxqat.data import read_classes
    from onnxqat.settings import Settings

    names = [name for name in Settings.__struct_fields__ if name in options]
    taken = {name: options.pop(name) for name in names}
    if taken.get("classes") is not None:
        taken["classes"] = read_classes(taken["classes"])
    return Settings(**taken)


def open_for(
    model: AnyModel,
    source: str,
    given: Settings,
    *,
    layout: Any,
    skip_broken: bool,
    beside: AnyModel | None = None,
    labels: bool = True,
) -> DataSet:
    """Open a data source for a model, and store what was said about it in the model.

    ``layout`` and ``skip_broken`` are not stored: they speak of this one source. ``beside`` is a
    model that runs on the same batches. ``labels`` says whether the command reads any.
    """
    from onnxqat.data import open_data
    from onnxqat.settings import Settings, class_count, input_specs, settle

    settings = settle(model, given)
    data = open_data(
        source,
        input_specs(model, beside),
        preprocessing=settings.preprocessing(layout),
        label=settings.label,
        input_map=settings.input_map,
        labels=labels,
        classes=settings.classes,
        class_count=class_count(model),
        skip_broken=skip_broken,
    )
    try:
        if data.classes is not None:
            settle(model, Settings(classes=dict(data.classes)))
    except BaseException:
        data.close()
        raise
    if data.classes is not None and settings.classes is None:
        _tell_classes(source, data.classes)
    return data


def _tell_classes(source: str, classes: Mapping[str, int]) -> None:
    """Say which class the first folders were taken for; nobody gave a list."""
    first = ", ".join(f"{name} -> {index}" for name, index in list(classes.items())[:3])
    note(f"{source}: folders in sorted order are the classes: {first}, ...")


def warn_if_unlike_training(
    model: AnyModel, data: DataSet, source: str, *, batch_size: int | None, threads: int
) -> None:
    """Say if the data reach the network in another range than those it was trained with."""
    from onnxqat.calibration import unlike_training

    found = unlike_training(model, data, batch_size=batch_size, threads=threads)
    if found is not None:
        logger.warning("%s: %s. Check --mean, --scale and --layout.", source, found)


def load_float(path: str) -> Model:
    """Read a float model; refuse one with Q/DQ pairs of ours."""
    from onnxqat.errors import ModelError
    from onnxqat.quantized import QuantizedModel, load_model

    model = load_model(path)
    if isinstance(model, QuantizedModel):  # preparing would fold what the plan names
        raise ModelError(f"{model.name}: already holds Q/DQ pairs. Give the float model.")
    return model


def load_quantized(path: str) -> QuantizedModel:
    """Read a Q/DQ model of ours."""
    from onnxqat.quantized import load_model, require_quantized

    return require_quantized(load_model(path))


def planned(
    model: Model,
    rules: str,
    overrides: tuple[str, ...],
    overrides_file: str | None,
    *,
    repair: Callable[[Model], Model] = lambda prepared: prepared,
) -> tuple[Model, QuantPlan]:
    """Prepare a float model and plan for it; ``--set`` lies over the overrides file.

    ``repair`` changes the prepared model before it is planned for.
    """
    from onnxqat.overrides import parse_override, read_overrides
    from onnxqat.plan import make_plan
    from onnxqat.preparation import prepare
    from onnxqat.preparation.float16 import refuse_other_floats
    from onnxqat.quantized import OPSET_OF_16_BITS, needs_16_bits
    from onnxqat.rules import load_rule

    rule = load_rule(rules)
    parsed = read_overrides(overrides_file) if overrides_file else []
    parsed += [parse_override(text) for text in overrides]
    prepared = prepare(model)
    refuse_other_floats(prepared.graph, model.name)
    prepared = repair(prepared)
    plan = make_plan(prepared.graph, rule, parsed)
    if prepared.graph.opset < OPSET_OF_16_BITS and needs_16_bits(plan):
        prepared = repair(prepare(model, opset=OPSET_OF_16_BITS))
        plan = make_plan(prepared.graph, rule, parsed)
    _warn_of_widths(plan, rule)
    return prepared, plan


def plan_document(plan: QuantPlan) -> dict[str, Any]:
    """Return a plan as JSON that scripts read."""
    document: dict[str, Any] = json.loads(plan.to_json())
    unsupported = [skip for skip in document["skips"] if skip["unsupported"]]
    return {"schema": "onnxqat.insert/1", **document, "unsupported": unsupported}


def _warn_of_widths(plan: QuantPlan, rule: HardwareRule) -> None:
    for role, widths in (("weight", rule.weight_bits), ("activation", rule.activation_bits)):
        known = {*widths, *(spec.bits for spec in rule.specs.values())}
        others = sorted({p.spec.bits for p in plan.points if p.role == role} - known)
        if others:
            logger.warning(
                "%s bits of %ss are for study: %s runs %s.",
                _listed(others),
                role,
                rule.name,
                _listed(widths),
            )


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))


def calibrated(
    model: QuantizedModel,
    source: str,
    given: Settings,
    *,
    layout: Any,
    skip_broken: bool,
    observer: str,
    samples: int,
    batch_size: int | None,
    seed: int,
    threads: int,
    workers: Workers,
    default_size: int = 32,
    bias_correction: bool = False,
) -> tuple[QuantizedModel, int]:
    """Calibrate on a seeded choice of samples; return the model, and how many samples it saw.

    The workers share whole batches between them, since what a runtime computes for a sample may
    depend on the batch it is in.
    """
    import numpy as np

    from onnxqat.calibration import calibrate
    from onnxqat.progress import progress_bar

    with open_for(
        model, source, given, layout=layout, skip_broken=skip_broken, labels=False
    ) as data:
        chosen = np.random.default_rng(seed).permutation(len(data))[:samples]
        size = data.batch_size(batch_size, default=default_size)
        if workers.rank == 0:
            warn_if_unlike_training(model, data, source, batch_size=size, threads=threads)
        share = workers.share(-(-len(chosen) // size))
        mine = np.sort(chosen)[share.start * size : share.stop * size]
        batches = data.batches(size, indices=mine)
        with progress_bar("calibrating", share.stop - share.start) as advance:
            result = calibrate(
                model, batches, observer=observer, threads=threads, progress=advance,
                workers=workers,
            )  # fmt: skip
        if bias_correction:
            result = _with_corrected_biases(
                result, lambda: data.batches(size, indices=mine), workers=workers, threads=threads
            )
        seen = len(chosen) - data.broken(chosen)
    return result, seen


def _with_corrected_biases(
    model: QuantizedModel, batches: Callable[[], Any], *, workers: Workers, threads: int
) -> QuantizedModel:
    """Correct biases on the calibration data, and say how many."""
    from onnxqat.errors import DataError
    from onnxqat.repair import correct_biases

    if workers.size > 1:
        raise DataError("--bias-correction runs in one process. Start it without mpirun.")
    result = correct_biases(model, batches, threads=threads)
    note(
        f"Corrected the biases of {len(result.layers)} layers; {len(result.skips)} have none. "
        "Fine-tuning needs --teacher now."
    )
    return result.model


def print_result(document: dict[str, Any], as_json: bool, rows: list[tuple[str, Any]]) -> None:
    """Print the result: a JSON document, or a short table."""
    if as_json:
        say_document(document)
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}")


def percentages(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Return rows of fractions as percentages."""
    return [(name, f"{100 * value:.2f} %") for name, value in metrics.items()]


def output_documents(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the figures of each output as JSON that scripts read; null where not finite."""
    import math
    from dataclasses import asdict

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{k: finite(v) for k, v in asdict(one).items()} for one in evaluation.outputs]


def output_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return a row for each output that was compared: what the figure is, and what it means."""
    rows = []
    for one in evaluation.outputs:
        if one.agreement is not None:
            rows.append(("agreement", f"{100 * one.agreement:.2f} %  {one.meaning}"))
        elif one.relative_error is not None:
            rows.append(("error", f"{100 * one.relative_error:.2f} %  {one.meaning}"))
        elif one.max_abs_diff is None:
            reason = "its length depends on the values, and differs"
            rows.append(("agreement", f"none of '{one.output}': {reason}"))
    return rows


def renamed(path: str, word: str) -> str:
    """Return ``model.onnx`` -> ``model.<word>.onnx``; an earlier stage's word is replaced."""
    name = Path(path)
    stem = name.stem
    for earlier in (".qdq", ".calibrated"):
        stem = stem.removesuffix(earlier)
    return str(name.with_name(f"{stem}.{word}.onnx"))
