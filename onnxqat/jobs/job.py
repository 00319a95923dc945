"""A job: the checked contents of its file, and the JSON Schema of job files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from onnxqat.choices import nearest
from onnxqat.errors import JobError, RuleError
from onnxqat.jobs.file import Draft
from onnxqat.jobs.rows import ROWS, Row
from onnxqat.jobs.tables import OptionTable, converted, params_of
from onnxqat.options import data_options, truth_options
from onnxqat.rules import load_rule

__all__ = [
    "BASELINES",
    "FAST_SAMPLES",
    "VARIANTS",
    "Job",
    "Order",
    "Tolerance",
    "json_schema",
    "make_job",
]

BASELINES = (
    "symmetric",
    "asymmetric",
)  # post-training, in the second mode of the chip
VARIANTS = ("float", "post-training", *BASELINES, "repaired", "tuned", "integer")
FAST_SAMPLES = 30  # samples of each split in a fast test
SPLITS = {
    "train": "Samples to fine-tune on.",
    "calibration": "Samples to calibrate on (default: those of train).",
    "validation": "Samples that choose the best state (default: a tenth of train).",
    "test": "Samples on which the figures are measured; nothing is chosen on them.",
}

Tolerance: TypeAlias = dict[str, dict[str, float]]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work on one model for one chip.

    Attributes
    ----------
    draft : Draft
        The file and its contents.
    model : str
        Path of the float model; relative paths start at the folder of the file.
    data : dict
        Parsed ``[data]``: options of the command line, and the splits.
    options : dict of str to dict
        Parsed options of each stage that runs, by name of the stage.
    tolerance : dict
        By variant and figure: how far the figure may fall below that of the float model.
    skip : tuple of str
        Stages and baselines that do not run.
    threads : int
        Number of threads; 0 uses all cores.
    fast : bool
        Whether to read only `FAST_SAMPLES` samples of each split.
    """

    draft: Draft
    model: str
    data: dict[str, Any]
    options: dict[str, dict[str, Any]]
    tolerance: Tolerance = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    threads: int = 0
    fast: bool = False

    @property
    def name(self) -> str:
        """Name of the job, and of its folder."""
        return f"{self.draft.name}.fast-test" if self.fast else self.draft.name

    @property
    def base(self) -> Path:
        """The folder that relative paths start at."""
        return self.draft.file.resolve().parent

    def runs(self, stage: str) -> bool:
        """Return whether a stage is part of the job."""
        return stage in self.options

    @property
    def samples(self) -> int | None:
        """Maximum number of samples to read from each split; None reads all."""
        return FAST_SAMPLES if self.fast else None

    @property
    def repairs(self) -> bool:
        """Whether the job equalizes the model or corrects its biases."""
        corrected = self.options["calibrate"]["bias_correction"]
        return bool(corrected or self.options["insert"]["equalize"])

    @functools.cached_property
    def baselines(self) -> dict[str, tuple[str, ...]]:
        """The rule's overrides for each further post-training baseline, by variant."""
        name = self.options["insert"]["rules"]
        try:
            rule = load_rule(str(self.base / name) if name.endswith(".toml") else name)
        except RuleError:  # the stage `insert` says what is wrong
            return {}
        found = {variant: getattr(rule, variant) for variant in BASELINES}
        return {name: texts for name, texts in found.items() if texts and name not in self.skip}

    @property
    def last(self) -> str:
        """The variant that is deployed to the chip."""
        if self.runs("finetune"):
            return "tuned"
        return "repaired" if self.repairs else "post-training"

    def split(self, name: str) -> str:
        """Return the data of a split, or of the training split where that is its default."""
        given = self.data.get(name)
        if given is None and name in ("calibration", "validation"):
            given = self.data.get("train")
        if given is None:
            raise JobError(f"{self.draft.file}: [data] '{name}' is missing. Name the data.")
        return str(given)


def make_job(draft: Draft, *, threads: int = 0, fast: bool = False) -> Job:
    """Check the contents of a job file, and return the job.

    Parameters
    ----------
    draft : Draft
        A job from `onnxqat.jobs.file.drafts`.
    threads : int
        Number of threads if the file does not set it.
    fast : bool
        See `Job`.

    Raises
    ------
    JobError
        A key is unknown, a value is wrong, or something is missing. The message names file, table
        and key.
    """
    where = str(draft.file)
    tables = {name: value for name, value in draft.table.items() if name in _tables()}
    rest = {name: value for name, value in draft.table.items() if name not in _tables()}
    keys = [field.encode_name for field in msgspec.structs.fields(_plain())]
    for key in rest:
        if key not in keys:
            raise JobError(f"{where}: '{key}' is unknown. {nearest(key, [*keys, *_tables()])}")
    plain = converted(rest, _plain(), keys, f"{where}:")
    if "model" not in plain:
        raise JobError(f"{where}: 'model' is missing. Name the float model.")
    usual = {"threads": plain.get("threads", threads), "seed": plain.get("seed", 0)}
    data = _tables()["data"].parse(tables.get("data", {}), where)
    job = Job(
        draft=draft,
        model=plain["model"],
        data=data,
        options={
            row.name: _tables()[row.name].parse(tables.get(row.name, {}), where, usual)
            for row in ROWS
            if row.name not in plain.get("skip", ()) and (row.always or row.name in tables)
        },
        tolerance=plain.get("tolerance", {}),
        skip=plain.get("skip", ()),
        threads=usual["threads"],
        fast=fast,
    )
    for row in ROWS:
        if job.runs(row.name) and row.reads is not None:
            job.split(row.reads)
    return job


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The message that starts the process of a job: a draft and how to run it; see `Job`."""

    name: str
    file: str
    table: dict[str, Any]
    threads: int = 0
    fast: bool = False
    again: bool = False  # also run finished steps

    def job(self) -> Job:
        """Return the job."""
        draft = Draft(name=self.name, file=Path(self.file), table=self.table)
        return make_job(draft, threads=self.threads, fast=self.fast)


@functools.cache
def _tables() -> dict[str, OptionTable]:
    texts = {name: Annotated[Text, Meta(description=text)] for name, text in SPLITS.items()}
    # a job names each split by a key of its own
    params = params_of([data_options, truth_options], without=["split"])
    found = {"data": OptionTable("data", params, texts)}
    return found | {row.name: _table(row) for row in ROWS}


def _table(row: Row) -> OptionTable:
    return OptionTable(row.name, params_of(row.options, without=row.without))


@functools.cache
def _plain() -> type[msgspec.Struct]:
    """Return the struct of a job file's keys outside of the tables of options."""
    stages = (row.name for row in ROWS if row.name not in ("insert", "calibrate"))
    skipped = (*stages, *BASELINES)
    quantized = VARIANTS[1:]
    limits = dict[str, Annotated[float, Meta(ge=0)]]
    said: dict[str, tuple[Any, str]] = {
        "model": (Text, "The float ONNX model."),
        "skip": (
            tuple[Literal[skipped], ...],  # type: ignore[valid-type]
            "Stages and second post-training baselines that are left out.",
        ),
        "seed": (Annotated[int, Meta(ge=0)], "Seed of every random choice (default 0)."),
        "threads": (Annotated[int, Meta(ge=0)], "Number of threads (default 0: all cores)."),
        "tolerance": (
            dict[Literal[quantized], limits],  # type: ignore[valid-type]
            "By variant and figure: how far the figure may fall below that of the float model.",
        ),
    }
    fields = [
        (name, Annotated[kind, Meta(description=text)] | UnsetType, UNSET)
        for name, (kind, text) in said.items()
    ]
    return msgspec.defstruct("Job", fields, kw_only=True, frozen=True, forbid_unknown_fields=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of job files, for editors."""
    anything = dict[str, Any]
    entries = Annotated[list[str | int | float | anything], Meta(min_length=1)]
    said: list[tuple[str, Any, str]] = [
        ("name", str, "Name of the job (default: that of the file)."),
        ("extends", str, "Job file that this one changes; the path is relative to this file."),
        ("variables", dict[str, str | int | float | bool], "Values that replace ${NAME}."),
        ("matrix", dict[str, entries], "Values of variables: one job for each combination."),
    ]
    fields: list[Any] = [
        (name, Annotated[kind, Meta(description=text)] | UnsetType, UNSET)
        for name, kind, text in said
    ]
    fields += [(name, table.kind | UnsetType, UNSET) for name, table in _tables().items()]
    kind = msgspec.defstruct("JobFile", fields, bases=(_plain(),), kw_only=True, frozen=True,
                             forbid_unknown_fields=True)  # fmt: skip
    schema = msgspec.json.schema(kind)
    for definition in schema["$defs"].values():
        properties: Mapping[str, Any] = definition.get("properties", {})
        definition["properties"] = {key: _or_variable(one) for key, one in properties.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _or_variable(kind: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that may also be a variable."""
    if kind.get("type") not in ("integer", "number", "boolean") and "enum" not in kind:
        return kind
    described = {"description": kind.pop("description", "")}
    return {"anyOf": [kind, {"type": "string", "pattern": r"^\$\{[^{}]+\}$"}], **described}
