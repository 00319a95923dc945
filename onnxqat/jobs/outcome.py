"""How far a job is, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxqat.jobs.job import Tolerance

__all__ = ["Outcome", "StepState", "Verdict"]

Status = Literal["waiting", "running", "done", "missed", "failed", "stopped"]
# figures of which less is better; their tolerance is the largest value itself
ERRORS = ("error",)
# figures that compare with the float model, whose own would be 1
LIKENESS = ("agreement", "cosine")


@dataclass
class StepState:
    """How far a step is.

    Attributes
    ----------
    name : str
        Of the step.
    state : {"waiting", "running", "cached", "done"}
        ``cached``: done by an earlier run.
    title : str
        What it does at the moment.
    done, total : int
        Batches or steps of that.
    seconds : float
        How long it took, also in an earlier run.
    notes : list of str
        What people should know.
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
    """One tolerance, and whether it was held.

    Attributes
    ----------
    variant, figure : str
        What is judged.
    limit : float
        How far below the float model's it may be; of errors, the largest value.
    value : float or None
        How far it is; None where it was not measured, which misses it.
    """

    variant: str
    figure: str
    limit: float
    value: float | None

    @property
    def held(self) -> bool:
        """Whether the tolerance was held."""
        return self.value is not None and self.value <= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.variant} {self.figure}: was not measured"
        drop = "is" if self.figure in ERRORS else "fell by"
        word = "within" if self.held else "more than"
        return f"{self.variant} {self.figure}: {drop} {self.value:.4f}, {word} {self.limit:g}"


@dataclass
class Outcome:
    """A job: waiting, at work or ended.

    Attributes
    ----------
    name, file : str
        Of the job, and its file.
    folder : Path
        Where its results are.
    tolerance : dict
        See `Job`.
    judged : bool
        Whether the tolerances are looked at.
    status : str
        ``missed``: it is done, and does not hold a tolerance.
    message : str
        Why it failed or was stopped.
    steps : dict of str to StepState
        By name, in order.
    figures : dict of str to dict
        Of the evaluation, by variant.
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
        """Note that the job's process starts."""
        self.status, self.started = "running", time.monotonic()

    def end(self, status: Status, message: str) -> None:
        """Note how it ended; the tolerances decide whether one that is done is as it should be."""
        self.message = message
        if self.started is not None:
            self.seconds = time.monotonic() - self.started
        missed = status == "done" and not all(verdict.held for verdict in self.verdicts)
        self.status = "missed" if missed else status

    def take(self, document: dict[str, Any]) -> StepState | None:
        """Take what the job's process tells; return the step that it tells of.

        Parameters
        ----------
        document : dict
            See `onnxqat.jobs.process`.
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
        """The step at work."""
        if self.status != "running":
            return None
        return next((step for step in self.steps.values() if step.state == "running"), None)

    @property
    def notes(self) -> list[str]:
        """What people should know of all steps, each once."""
        return list(dict.fromkeys(note for step in self.steps.values() for note in step.notes))

    @property
    def figure(self) -> str | None:
        """The figure that a table shows: the first metric, or else how like the float model."""
        shown = (self.figures.get(variant, {}) for variant in ("float", "tuned", "post-training"))
        return next((name for figures in shown for name in figures), None)

    @property
    def verdicts(self) -> list[Verdict]:
        """The tolerances, and what was measured."""
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
        alike = figure.partition(":")[0] in LIKENESS  # behind it stands an output
        usual = 1.0 if alike else self.figures.get("float", {}).get(figure)
        return None if usual is None else usual - value
