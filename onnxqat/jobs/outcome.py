"""The state of a job and its results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxqat.jobs.job import BASELINES, VARIANTS, Tolerance

__all__ = ["Outcome", "StepState", "Verdict", "variants_of"]

Status = Literal["waiting", "running", "done", "missed", "failed", "stopped"]
# figures where smaller is better; their tolerance is the largest permitted value
ERRORS = ("error",)
# figures that compare with the float model; the float model's own value would be 1
LIKENESS = ("agreement", "cosine")


@dataclass
class StepState:
    """The progress of a step.

    Attributes
    ----------
    name : str
        Name of the step.
    state : {"waiting", "running", "cached", "done"}
        ``cached``: an earlier run did it.
    title : str
        Current activity.
    done, total : int
        Progress of this activity, in batches or training steps.
    seconds : float
        Time that it took, in this run or an earlier one.
    notes : list of str
        Remarks for the user.
    """

    name: str
    state: str = "waiting"
    title: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A tolerance, and whether the job met it.

    Attributes
    ----------
    variant, figure : str
        The variant and its figure.
    limit : float
        How far the figure may fall below that of the float model; for errors, the largest value.
    value : float or None
        How far it fell, or the error. None if it was not measured, which does not meet the
        tolerance.
    """

    variant: str
    figure: str
    limit: float
    value: float | None

    @property
    def held(self) -> bool:
        """Whether the tolerance was met."""
        return self.value is not None and self.value <= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.variant} {self.figure}: was not measured"
        drop = "is" if self.figure in ERRORS else "fell by"
        word = "within" if self.held else "more than"
        return f"{self.variant} {self.figure}: {drop} {self.value:.4f}, {word} {self.limit:g}"


@dataclass
class Outcome:
    """The state of a job, and its results so far.

    Attributes
    ----------
    name, file : str
        Name of the job, and path of its file.
    folder : Path
        Folder of its results.
    tolerance : dict
        See `Job`.
    judged : bool
        Whether to check the tolerances.
    status : str
        State of the job. ``missed``: it is done, but does not meet a tolerance.
    message : str
        Why it failed or was stopped.
    steps : dict of str to StepState
        Steps by name, in order.
    figures : dict of str to dict
        Figures of the evaluation, by variant.
    """

    name: str
    file: str
    folder: Path
    tolerance: Tolerance = field(default_factory=dict)
    judged: bool = True
    status: Status = "waiting"
    message: str = ""
    steps: dict[str, StepState] = field(default_factory=dict)
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    started: float | None = None
    seconds: float = 0.0

    def begin(self) -> None:
        """Record the start of the job's process."""
        self.status, self.started = "running", time.monotonic()

    def end(self, status: Status, message: str) -> None:
        """Record the end of the job; one that is done but misses a tolerance becomes ``missed``."""
        self.message = message
        if self.started is not None:
            self.seconds = time.monotonic() - self.started
        missed = status == "done" and not all(verdict.held for verdict in self.verdicts)
        self.status = "missed" if missed else status

    def take(self, document: dict[str, Any]) -> StepState | None:
        """Record a message from the job's process; return the step that it is about, or None.

        Parameters
        ----------
        document : dict
            A message of `onnxqat.jobs.process`.
        """
        if "status" in document:
            self.end(document["status"], document["message"])
            return None
        name = document["step"]
        step = self.steps.setdefault(name, StepState(name))
        was_cached = step.state == "cached"
        for key in ("state", "title", "done", "total", "seconds", "notes"):
            setattr(step, key, document.get(key, getattr(step, key)))
        step.state = "cached" if was_cached else step.state
        stage, _, variant = name.partition(".")
        if stage == "evaluate" and "figures" in document:
            self.figures[variant] = document["figures"]
        return step

    @property
    def running(self) -> StepState | None:
        """The running step, or None."""
        if self.status != "running":
            return None
        return next((step for step in self.steps.values() if step.state == "running"), None)

    @property
    def notes(self) -> list[str]:
        """The notes of all steps, without repetitions."""
        return list(dict.fromkeys(note for step in self.steps.values() for note in step.notes))

    @property
    def figure(self) -> str | None:
        """Name of the figure to show in a table: the first one that was measured, or None."""
        shown = (self.figures.get(variant, {}) for variant in ("float", "tuned", "post-training"))
        return next((name for figures in shown for name in figures), None)

    @property
    def verdicts(self) -> list[Verdict]:
        """The tolerances with their measured values."""
        if not self.judged:
            return []
        return [
            Verdict(variant, figure, limit, self._drop(variant, figure))
            for variant, limits in self.tolerance.items()
            for figure, limit in limits.items()
        ]

    def _drop(self, variant: str, figure: str) -> float | None:
        value = self.figures.get(variant, {}).get(figure)
        if value is None or figure in ERRORS:
            return value
        alike = figure.partition(":")[0] in LIKENESS  # the part after ":" is an output
        usual = 1.0 if alike else self.figures.get("float", {}).get(figure)
        return None if usual is None else usual - value


def variants_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the variants that a table has columns for; baselines only if a job measured them."""
    measured = {variant for one in outcomes for variant in one.figures}
    return [name for name in VARIANTS if name not in BASELINES or name in measured]
