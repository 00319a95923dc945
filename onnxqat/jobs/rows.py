"""The stages of a job, one row each; a new stage is a new row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxqat.jobs import stages
from onnxqat.jobs.tables import Options
from onnxqat.options import (
    analysis_options,
    bias_correction_option,
    calibration_options,
    camera_options,
    checkpoint_options,
    device_options,
    equalize_option,
    export_options,
    log_options,
    metric_options,
    relu6_option,
    rule_options,
    run_options,
    search_options,
    seed_option,
    shape_options,
    table_option,
    teacher_option,
    trainable_option,
    training_options,
    weights_option,
)

if TYPE_CHECKING:
    from onnxqat.jobs.job import Job
    from onnxqat.jobs.work import Result, Work

__all__ = ["ROWS", "Row", "Step", "steps_of"]


def _quantized(job: Job) -> tuple[str, ...]:
    repaired = ("repaired",) if job.repairs else ()
    return ("post-training", *job.baselines, *repaired)


def _tuned(job: Job) -> tuple[str, ...]:
    del job
    return ("tuned",)


def _leaving(job: Job) -> tuple[str, ...]:
    """Return the variants to deploy: the last one, and the post-training baselines."""
    first = ("post-training",) if job.last != "post-training" else ()
    return (job.last, *first, *job.baselines)


def _measured(job: Job) -> tuple[str, ...]:
    tuned = ("tuned",) if job.runs("finetune") else ()
    return ("float", *_quantized(job), *tuned, "integer")


def _calibrated(job: Job) -> tuple[str, ...]:
    del job
    return ("post-training",)


def _always(job: Job, variant: str) -> bool:
    del job, variant
    return True


def _last(job: Job) -> tuple[str, ...]:
    return (job.last,)


def _whole(job: Job) -> tuple[str, ...]:
    del job
    return ("",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage.

    Attributes
    ----------
    name : str
        Name of the stage and of its table in a job file.
    run : callable
        Calls the verb and writes its result.
    options : tuple
        Decorators of `onnxqat.options` that define the keys of the table.
    without : tuple of str
        Options that are not keys of the table: the job sets them, or they belong to ``[data]``.
    also : tuple of str
        Names of other tables whose options it reads.
    variants : callable
        Job -> the variants of the model that the stage runs on.
    reads : str or None
        Split of the data that it reads.
    reads_for : callable
        Job, variant -> whether it reads the split for this variant.
    makes : bool
        Whether it writes a model for later stages.
    always : bool
        Whether it runs even if the file has no table for it.
    """

    name: str
    run: Callable[[Work, Step], Result]
    options: tuple[Options, ...] = ()
    without: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    variants: Callable[[Job], tuple[str, ...]] = _whole
    reads: str | None = None
    reads_for: Callable[[Job, str], bool] = _always
    makes: bool = False
    always: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage applied to one variant.

    Attributes
    ----------
    row : Row
        The stage.
    variant : str
        Variant of the model; empty if the stage runs once for all variants.
    source : str or None
        Name of the step whose model it reads; None for the float model.
    after : tuple of str
        Names of the steps whose results it depends on.
    beside : tuple of str
        Names of the steps whose models it compares with.
    """

    row: Row
    variant: str
    source: str | None
    after: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the step, for people and for files."""
        return f"{self.row.name}.{self.variant}" if self.variant else self.row.name


ROWS = (
    Row(
        name="check",
        run=stages.check,
        options=(trainable_option,),
        also=("insert",),
        always=True,
    ),
    Row(
        name="insert",
        run=stages.insert,
        options=(rule_options, equalize_option, relu6_option, table_option),
        variants=_quantized,
        reads="calibration",
        reads_for=stages.equalizes,
        makes=True,
        always=True,
    ),
    Row(
        name="calibrate",
        run=stages.calibrate,
        options=(
            calibration_options,
            bias_correction_option,
            run_options(32),
            device_options("auto"),
            seed_option,
        ),
        variants=_quantized,
        reads="calibration",
        makes=True,
        always=True,
    ),
    Row(
        name="finetune",
        run=stages.finetune,
        options=(
            *(teacher_option, training_options, checkpoint_options, log_options),
            *(run_options(16), device_options("auto"), seed_option),
        ),
        without=("resume", "log", "tensorboard", "truth", "boxes", "masks"),
        variants=_tuned,
        reads="train",
        makes=True,
    ),
    Row(
        name="evaluate",
        run=stages.evaluate,
        options=(metric_options, run_options(32), device_options("cpu")),
        without=("truth", "boxes", "masks"),
        variants=_measured,
        reads="test",
        always=True,
    ),
    Row(
        name="analyze",
        run=stages.analyze,
        options=(analysis_options, run_options(32), device_options("cpu"), seed_option),
        without=("truth", "boxes", "masks"),
        variants=_last,
        reads="validation",
    ),
    Row(
        name="search",
        run=stages.search,
        options=(search_options, run_options(32), seed_option),
        without=("truth", "boxes", "masks", "val-data"),
        also=("insert",),
        variants=_calibrated,
        reads="validation",
    ),
    Row(
        name="strip",
        run=stages.strip,
        options=(table_option, weights_option, shape_options, camera_options),
        variants=_leaving,
        always=True,
    ),
    Row(
        name="export",
        run=stages.export,
        options=(export_options, camera_options),
        variants=_leaving,
    ),
    Row(
        name="report",
        run=stages.report,
        options=(run_options(32),),
        also=("insert",),
        variants=_last,
        reads="test",
    ),
)


def steps_of(job: Job) -> list[Step]:
    """Return the steps of a job, in order."""
    steps: list[Step] = []
    latest: dict[str, str] = {}  # by variant: the last step so far that wrote its model
    for row in (row for row in ROWS if job.runs(row.name)):
        for variant in row.variants(job):
            given = latest.get(variant)
            if given is None and variant in ("tuned", "integer"):
                given = latest.get(job.last) or latest.get("repaired") or latest["post-training"]
            others = tuple(
                name for one, name in latest.items() if name != given and one not in job.baselines
            )
            whole = row.name == "report"  # it covers all earlier steps
            after = tuple(step.name for step in steps) if whole else (given,) if given else ()
            beside = others if whole else ()
            steps.append(step := Step(row=row, variant=variant, source=given, after=after,
                                      beside=beside))  # fmt: skip
            if row.makes:
                latest[variant] = step.name
    return steps
