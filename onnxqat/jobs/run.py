"""Run jobs from job files, and summarize their results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxqat.errors import JobError, OnnxQatError
from onnxqat.jobs.board import Board
from onnxqat.jobs.file import Draft, drafts
from onnxqat.jobs.job import Job, Order, make_job
from onnxqat.jobs.outcome import Outcome
from onnxqat.jobs.pool import run_side_by_side
from onnxqat.jobs.records import key_of_step, read_record
from onnxqat.jobs.rows import steps_of
from onnxqat.jobs.summary import document_of, rows_of, write_summary

__all__ = ["Planned", "Summary", "plan_jobs", "run_jobs"]


@dataclass(frozen=True)
class Summary:
    """The results of a run of jobs.

    Attributes
    ----------
    outcomes : tuple of Outcome
        Results of each job, in order.
    fast : bool
        Whether only a few samples were read and tolerances were not checked.
    files : tuple of Path
        The summary files.
    """

    outcomes: tuple[Outcome, ...]
    fast: bool
    files: tuple[Path, ...]

    @property
    def passed(self) -> bool:
        """Whether all jobs are done and meet their tolerances."""
        return all(one.status == "done" for one in self.outcomes)

    @property
    def document(self) -> dict[str, Any]:
        """The summary as a JSON document."""
        return document_of(self.outcomes, fast=self.fast)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The summary as rows of a table, headings first."""
        return rows_of(self.outcomes)


@dataclass(frozen=True)
class Planned:
    """A step that would run.

    Attributes
    ----------
    job, step : str
        Names of the job and the step.
    state : {"run", "done"}
        ``done``: an earlier run did it on the same inputs.
    """

    job: str
    step: str
    state: str


def run_jobs(
    files: Iterable[str | Path],
    *,
    output: str | Path = "runs",
    jobs: int = 1,
    variables: Mapping[str, Any] | None = None,
    fast: bool = False,
    again: bool = False,
) -> Summary:
    """Run job files, as ``onnxqat run`` does: each job in a process of its own.

    Steps that an earlier run finished on the same inputs are not run again. If a job fails or its
    file is invalid, the other jobs still run.

    Parameters
    ----------
    files : iterable of str or Path
        Job files, see docs/jobs.md.
    output : str or Path
        Folder of the results: a folder for each job, and the summary.
    jobs : int
        Number of jobs to run at the same time.
    variables : mapping, optional
        Values that replace those of the files' variables.
    fast : bool
        Run every stage on a few samples only, and do not check tolerances.
    again : bool
        Also run finished steps.

    Raises
    ------
    JobError
        There is no job, or two jobs have the same name.
    OnnxQatError
        Nothing can be written to ``output``.
    """
    found = list(_read_all(files, variables))
    work, outcomes = [], []
    for name, file, draft, problem in found:
        outcome = Outcome(name=name, file=str(file), folder=Path(output).absolute() / name)
        outcomes.append(outcome)
        if draft is None:
            outcome.end("failed", problem)
            continue
        order = Order(
            name=draft.name,
            file=str(draft.file.resolve()),
            table=draft.table,
            threads=_threads(jobs),
            fast=fast,
            again=again,
        )
        if _accept(order, outcome):
            work.append((order, outcome))
    root = _folder(Path(output))
    with Board(outcomes, jobs) as board:
        for outcome in outcomes:
            if outcome.status == "failed":
                board.hear(outcome, None)
        try:
            run_side_by_side(work, jobs, board.hear, board.refresh)
        finally:
            written = write_summary(root, outcomes, fast=fast)
    return Summary(tuple(outcomes), fast, tuple(written))


def _accept(order: Order, outcome: Outcome) -> bool:
    """Check a job and create its folder; on an error, record it and return False."""
    try:
        job = order.job()
        outcome.name, outcome.tolerance, outcome.judged = job.name, job.tolerance, not job.fast
        outcome.folder = _folder(outcome.folder.parent / job.name)
    except OnnxQatError as error:
        outcome.end("failed", str(error))
        return False
    return True


def _read_all(
    files: Iterable[str | Path], variables: Mapping[str, Any] | None
) -> Iterable[tuple[str, Path, Draft | None, str]]:
    """Yield the jobs of all files; for an invalid file, yield the error instead of a job."""
    seen: dict[str, Path] = {}
    for file in map(Path, files):
        try:
            found = drafts(file, variables)
        except OnnxQatError as error:
            yield file.stem, file, None, str(error)
            continue
        for draft in found:
            if draft.name in seen:
                raise JobError(
                    f"{file}: a job of {seen[draft.name]} also has the name '{draft.name}'. Set "
                    "name = '...' in one of them."
                )
            seen[draft.name] = file
            yield draft.name, file, draft, ""


def plan_jobs(
    files: Iterable[str | Path],
    *,
    output: str | Path = "runs",
    variables: Mapping[str, Any] | None = None,
    fast: bool = False,
) -> list[Planned]:
    """Return the steps that `run_jobs` would run, as ``onnxqat run --dry-run`` prints them.

    Parameters
    ----------
    files, output, variables, fast
        See `run_jobs`.

    Raises
    ------
    OnnxQatError
        A job file is invalid, or a file that it names is missing.
    """
    planned: list[Planned] = []
    for _, _, draft, problem in _read_all(files, variables):
        if draft is None:
            raise JobError(problem)
        planned += _planned(make_job(draft, fast=fast), Path(output))
    return planned


def _planned(job: Job, root: Path) -> Iterable[Planned]:
    keys: dict[str, str] = {}
    for step in steps_of(job):
        keys[step.name] = key_of_step(job, step, keys)
        record = read_record(root / job.name, step, keys[step.name])
        yield Planned(job.name, step.name, "run" if record is None else "done")


def _folder(path: Path) -> Path:
    """Create a folder for results.

    Raises
    ------
    OnnxQatError
        The folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxQatError(
            f"{path}: cannot be created ({error.strerror}). Choose another --output."
        ) from error
    return path


def _threads(jobs: int) -> int:
    """Return the threads for each of ``jobs`` jobs, so that together they use all cores."""
    if jobs == 1:
        return 0
    return max(1, (os.cpu_count() or 1) // jobs)
