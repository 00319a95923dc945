"""Display of running jobs: a live table on a terminal, single lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from onnxqat.evaluation.metrics import figure_text
from onnxqat.jobs.outcome import Outcome, StepState, variants_of
from onnxqat.progress import Clock, time_left
from onnxqat.terminal import say, shown
from onnxqat.verbosity import is_quiet

__all__ = ["Board", "value_text"]

EVERY = 10.0  # seconds between two lines for one job
ENDED = ("done", "missed", "failed", "stopped")
MAX_ROWS = 40  # of the table; running jobs come first


def value_text(figure: str | None, value: float | None) -> str:
    """Return a figure as text for people; "-" if there is none."""
    return "-" if value is None or figure is None else figure_text(figure, value)


class Board:
    """Shows the state of all jobs; a context manager.

    Parameters
    ----------
    outcomes : sequence of Outcome
        The jobs.
    jobs : int
        Number of jobs that run at the same time.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(
        self, outcomes: Sequence[Outcome], jobs: int, clock: Clock = time.monotonic
    ) -> None:
        self._outcomes, self._jobs, self._clock = outcomes, jobs, clock
        self._lock = threading.Lock()
        # by job, step and title: start time and first count, which is not 0 for a resumed training
        self._begun: dict[tuple[str, str, str], tuple[float, int]] = {}
        self._said: dict[str, float] = {}  # time of the last line for a job
        console = Console(stderr=True)
        self._live = (
            Live(console=console, auto_refresh=False, transient=True)
            if console.is_terminal and not is_quiet()
            else None
        )

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def hear(self, outcome: Outcome, step: StepState | None) -> None:
        """Take a report about a step, or (without a step) about the start or end of a job."""
        with self._lock:
            if step is not None and step.state == "running":
                begun = self._clock(), step.done
                self._begun.setdefault((outcome.name, step.name, step.title), begun)
            if self._live is None and not is_quiet():
                self._say(outcome, step)

    def refresh(self) -> None:
        """Redraw the table."""
        if self._live:
            with self._lock:
                self._live.update(self.table(), refresh=True)

    def _say(self, outcome: Outcome, step: StepState | None) -> None:
        if step is None:
            if outcome.status in ENDED:
                say(f"{outcome.name}: {outcome.status} {outcome.message}".rstrip(), err=True)
            return
        now = self._clock()
        if step.state in ("done", "cached") and (step.seconds or step.state == "cached"):
            if step.state == "done":
                say(f"{outcome.name}: {step.name} done in {step.seconds:.1f} s", err=True)
            self._said[outcome.name] = now
        elif step.total and now - self._said.setdefault(outcome.name, now) >= EVERY:
            self._said[outcome.name] = now
            say(f"{outcome.name}: {self.progress(outcome)}", err=True)

    def progress(self, outcome: Outcome) -> str:
        """Return the current activity of a job, its progress, and the time left."""
        step = outcome.running
        if step is None:
            return ""
        usual = self._clock(), step.done
        begun, first = self._begun.get((outcome.name, step.name, step.title), usual)
        text = f"{step.name} {step.title}".rstrip()
        if not step.total:
            return text
        left = time_left(self._clock() - begun, step.done - first, step.total - first)
        return f"{text}: {step.done} of {step.total}, {left}"

    def table(self) -> Table:
        """Return the table of the current state."""
        table = Table(caption=self._caption(), caption_justify="left")
        variants = variants_of(self._outcomes)
        for head in ("job", "status", *variants):
            table.add_column(head, overflow="fold")
        rank = {"running": 0, "waiting": 2}
        ranked = sorted(self._outcomes, key=lambda one: rank.get(one.status, 1))
        for one in ranked[:MAX_ROWS]:
            figure = one.figure
            figures = [
                value_text(figure, one.figures.get(variant, {}).get(figure or ""))
                for variant in variants
            ]
            status = self.progress(one) or one.status
            table.add_row(*(Text(shown(cell)) for cell in (one.name, status, *figures)))
        return table

    def _caption(self) -> str:
        ended = [one for one in self._outcomes if one.status in ENDED]
        text = f"{len(ended)} of {len(self._outcomes)} jobs ended"
        took = [one.seconds for one in ended if one.seconds]
        if took and len(ended) < len(self._outcomes):
            left = sum(took) / len(took) * (len(self._outcomes) - len(ended)) / self._jobs
            text += f", about {left:.0f} s left"
        return text
