"""The functions of the stages: each calls the verb of its name and writes the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxqat import verbs
from onnxqat.analysis import analysis_document, overrides_file
from onnxqat.arguments import take_calibration, take_config, take_overrides
from onnxqat.errors import FormatError, JobError, RuleError
from onnxqat.evaluation import Evaluation
from onnxqat.evaluation.metrics import read_metric
from onnxqat.files import write_text
from onnxqat.jobs.work import Result, Work
from onnxqat.json_values import json_value
from onnxqat.overrides import overrides_text, parse_override
from onnxqat.quantized import load_model, require_quantized
from onnxqat.train import Checkpoints

if TYPE_CHECKING:
    from onnxqat.jobs.job import Job
    from onnxqat.jobs.rows import Step

__all__ = [
    "analyze",
    "calibrate",
    "check",
    "equalizes",
    "evaluate",
    "export",
    "finetune",
    "insert",
    "report",
    "search",
    "strip",
]

NAMED = 3  # nodes that a message names
LOG, ANALYSIS, WIDTHS = "finetune.jsonl", "analysis.json", "widths.toml"


def check(work: Work, step: Step) -> Result:
    """Refuse a model that the chip cannot run, or that cannot be fine-tuned as the job asks."""
    del step
    insert, train = work.options("insert"), work.options("check")["train"]
    found = verbs.check(
        work.job.model,
        rules=insert["rules"],
        overrides=take_overrides(insert),
        train=train or work.job.runs("finetune"),
    )
    wrong = [f"'{skip.node}' ({skip.op_type}): {skip.reason}" for skip in found.unsupported]
    wrong += [f"the table cannot hold {name}" for name in found.names]
    wrong += [f"'{n.node}' ({n.op_type}) cannot be trained: {n.reason}" for n in found.untrainable]
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise JobError(
            f"{work.job.model}: does not fit rule '{found.plan.rule}': "
            f"{'; '.join(wrong[:NAMED])}{more}. See 'onnxqat check'."
        )
    figures = {
        "tensors quantized": float(len(found.plan.grid_points())),
        "nodes in float": float(len(found.plan.skips)),
    }
    advice = () if insert["equalize"] else found.advice
    return Result(figures=dict(figures), notes=advice)


def insert(work: Work, step: Step) -> Result:
    """Insert the pairs; equalize the repaired variant first, if the job asks for it."""
    options = work.options("insert")
    equalize = equalizes(work.job, step.variant)
    strip_format = work.options("strip")["format_name"] if work.job.runs("strip") else None
    baseline = work.job.baselines.get(step.variant, ())
    made = work.made(step)
    verbs.insert(
        work.job.model,
        rules=options["rules"],
        overrides=[*take_overrides(options), *map(parse_override, baseline)],
        data=work.source("calibration") if equalize else None,
        settings=work.settings,
        calibration=None,  # the next stage
        equalize=equalize,
        relu6=options["relu6"],
        format_name=strip_format or options["format_name"],
        listener=work.listener,
    ).save(made, force=True)
    return Result(files=_model_files(made))


def equalizes(job: Job, variant: str) -> bool:
    """Return whether inserting pairs into a variant equalizes it first, and so reads data."""
    return variant == "repaired" and bool(job.options["insert"]["equalize"])


def calibrate(work: Work, step: Step) -> Result:
    """Calibrate; correct the biases of the repaired variant, if the job asks for it."""
    options = work.options("calibrate")
    if step.variant != "repaired":
        options["bias_correction"] = None
    made = work.made(step)
    result = verbs.calibrate(
        work.model(step.source),
        work.source("calibration"),
        settings=work.settings,
        calibration=take_calibration(options),
        listener=work.listener,
    )
    result.save(made, force=True)
    return Result(figures=dict(result.history[-1].figures), files=_model_files(made))


def finetune(work: Work, step: Step) -> Result:
    """Fine-tune; continue from the checkpoint of a stopped run with the same settings."""
    options = work.options("finetune")
    # a repaired model may compute a different function than the float model
    teacher = options.pop("teacher") or (work.job.model if work.job.repairs else None)
    every, log_every = options.pop("checkpoint_every"), options.pop("log_every")
    made, log = work.made(step), work.folder / LOG
    run = f"{work.keys[step.name][:16]}.{options['threads']}"  # threads change the order of sums
    kept = made.with_suffix(f".{run}.checkpoint")
    resume = kept.is_file()
    for other in made.parent.glob(f"{made.stem}.*.checkpoint"):
        if other != kept:  # it belongs to other settings
            other.unlink()
    if not resume:
        log.unlink(missing_ok=True)
    checkpoints = Checkpoints(kept, **(every or {}), resume=resume)
    with work.ending.saving() as stop:
        result = verbs.finetune(
            work.model(step.source),
            work.source("train"),
            validation=work.source("validation") if "validation" in work.job.data else None,
            teacher=teacher,
            settings=work.settings,
            config=take_config(options),
            logs=verbs.TrainingLogs(path=log, every=log_every),
            checkpoints=checkpoints,
            listener=work.listener,
            stop=stop,
        )
    result.model.save(made, force=True)
    checkpoints.remove()
    figures = {"epochs": float(result.epochs), "best epoch": float(result.best_epoch)}
    return Result(figures=dict(figures), notes=result.notes, files=(*_model_files(made), log))


def evaluate(work: Work, step: Step) -> Result:
    """Measure a variant on the test data, and compare it with the float model."""
    variant, options = step.variant, work.options("evaluate")
    if variant == "float":  # it has no reference
        options["metrics"] = [m for m in options["metrics"] if not read_metric(m).compares]
    if variant == "integer":  # which the CPU computes
        options["device"] = "cpu"
    modes: dict[str, Any] = {"float": "float", "integer": "integer"}
    rules = work.options("insert")["rules"]
    own_rule = variant == "integer" and rules.endswith(".toml")
    try:
        found = verbs.evaluate(
            work.model(step.source),
            work.source("test"),
            mode=modes.get(variant, "qdq"),
            against=None if variant == "float" else work.job.model,
            rules=rules if own_rule else None,
            decides=f"A tolerance of {variant}" if work.job.tolerance.get(variant) else None,
            settings=work.settings,
            listener=work.listener,
            **options,
        )
    except RuleError as error:
        if variant != "integer":
            raise
        return Result(notes=(f"integer: not measured. {error}",))
    notes = tuple(filter(None, (found.note, found.assumption)))
    return Result(figures=_figures(found), notes=notes)


def _figures(found: Evaluation) -> dict[str, float | None]:
    """Return the figures of a variant: its metrics, and its agreement and error."""
    errors = [one.relative_error for one in found.outputs if one.relative_error is not None]
    figures: dict[str, float | None] = dict(found.metrics)
    if found.agreement is not None:
        figures["agreement"] = found.agreement
    if errors:
        figures["error"] = max(errors)
    finite: dict[str, float | None] = json_value(figures)
    return finite


def analyze(work: Work, step: Step) -> Result:
    """Write the analysis, and an overrides file with its advice."""
    options = work.options("analyze")
    if work.job.samples is not None:
        options["samples"] = min(options["samples"], work.job.samples)
    model = require_quantized(load_model(work.model(step.source)))
    found = verbs.analyze(
        model,
        work.source("validation"),
        settings=work.settings,
        listener=work.listener,
        **options,
    )
    overrides, figures = work.folder / "advice.toml", work.folder / ANALYSIS
    write_text(overrides, overrides_file(model, found.advice), force=True)
    write_text(figures, json.dumps(analysis_document(found, model), indent=1), force=True)
    worst = [f"'{one.layer.node}' costs most." for one in found.layers[:1]]
    return Result(
        figures={"cost": json_value(found.cost)}, notes=tuple(worst), files=(overrides, figures)
    )


def search(work: Work, step: Step) -> Result:
    """Write a width for each weight within a budget, as overrides for another job."""
    options = work.options("search")
    if (options["max_loss"] is None) == (options["bits"] is None):
        raise JobError(f"{work.job.draft.file}: [search] needs either 'max-loss' or 'bits'.")
    for name in ("samples", "val_samples"):
        options[name] = min(options[name], work.job.samples or options[name])
    rules = work.options("insert")["rules"]
    found = verbs.search(
        work.model(step.source),
        work.source("validation"),
        rules=rules if rules.endswith(".toml") else None,
        settings=work.settings,
        listener=work.listener,
        **options,
    )
    widths, chosen = work.folder / WIDTHS, found.search.chosen
    write_text(widths, overrides_text(found.search.overrides), force=True)
    figures = {"average bits": chosen.average, "cost": json_value(chosen.cost)}
    note = f"{WIDTHS}: {chosen.average:.2f} bits on average. Give it as 'overrides' of [insert]."
    return Result(figures=figures, notes=(note,), files=(widths,))


def strip(work: Work, step: Step) -> Result:
    """Write the float model and the calibration table."""
    options = work.options("strip")
    table = options.pop("format_name") or work.options("insert")["format_name"]
    try:
        found = verbs.strip(
            work.model(step.source), work.chip(step), format_name=table, force=True, **options
        )
    except FormatError as error:
        return _not_written(work, step, error)
    left_out = (
        f"The table does not hold {len(names)} {kind}." for kind, names in found.left_out.items()
    )
    models = _model_files(found.files["model"])
    others = (path for kind, path in found.files.items() if kind != "model")
    return Result(notes=tuple(left_out), files=(*models, *others))


def export(work: Work, step: Step) -> Result:
    """Write the model with integer weights into the folder for the chip."""
    made = work.chip(step) / "model.int8.onnx"
    try:
        verbs.export(work.model(step.source), **work.options("export")).save(made, force=True)
    except FormatError as error:
        return _not_written(work, step, error)
    return Result(files=_model_files(made))


def _not_written(work: Work, step: Step, error: FormatError) -> Result:
    """Return a note if the variant is a baseline; otherwise raise the error."""
    if step.variant not in work.job.baselines:
        raise error
    return Result(notes=(f"{step.variant}: not written for the chip. {error}",))


def report(work: Work, step: Step) -> Result:
    """Write a page about the deployed variant, which compares it with the earlier ones."""
    options, rules = work.options("report"), work.options("insert")["rules"]
    log, found = work.folder / LOG, work.folder / ANALYSIS
    page = work.folder / "report.html"
    verbs.report(
        work.model(step.source),
        work.source("test"),
        against=work.job.model,
        beside=[work.model(name) for name in step.beside],
        log=log if work.job.runs("finetune") else None,
        analysis=found if work.job.runs("analyze") else None,
        rules=rules if rules.endswith(".toml") else None,
        metrics=work.options("evaluate")["metrics"] if work.job.runs("evaluate") else (),
        settings=work.settings,
        listener=work.listener,
        **options,
    ).save(page, force=True)
    return Result(files=(page,))


def _model_files(path: Path) -> tuple[Path, ...]:
    """Return the path of a model and those of its external data."""
    return (path, *sorted(path.parent.glob(f"{path.name}.*.data")))
