"""Show progress on stderr: a bar with an ETA on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from onnxqat.evaluation.metrics import figure_text
from onnxqat.terminal import shown
from onnxqat.verbosity import is_quiet

__all__ = ["FinetuneReport", "Pulse", "progress_bar", "time_left"]

EVERY = 10.0  # seconds between two lines

Clock = Callable[[], float]


def _bar(*fields: str) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    columns += [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    console = Console(stderr=True, quiet=is_quiet())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _print(bar: Progress, line: str) -> None:
    # unformatted: a log file has no width, and names may look like rich's markup
    bar.console.print(shown(line), soft_wrap=True, markup=False, highlight=False)


def time_left(seconds: float, done: int, total: int) -> str:
    """Return the elapsed time and the estimated remaining time, as text."""
    text = f"{seconds:.0f} s"
    if not done:
        return text
    return f"{text}, about {seconds / done * (total - done):.0f} s left"


class Pulse:
    """A context manager that writes a line every `EVERY` seconds, from its own thread.

    Parameters
    ----------
    line : callable
        Returns the current line.
    write : callable
        Writes a line.
    clock : callable
        Returns the time in seconds.
    wait : callable, optional
        Waits for at most the given number of seconds, and returns whether to end.
    """

    def __init__(
        self,
        line: Callable[[], str],
        write: Callable[[str], None],
        *,
        clock: Clock = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._line, self._write, self._clock = line, write, clock
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def run(self) -> None:
        """Write lines until the block ends."""
        due = self._clock() + EVERY
        while not self._wait(max(due - self._clock(), 0.0)):
            try:
                self._write(self._line())
            except (OSError, ValueError):  # stderr is closed or full
                return
            due += EVERY


@contextmanager
def progress_bar(
    title: str, total: int, *, clock: Clock = time.monotonic
) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` batches, or lines; yield a function that advances it by one."""
    done, started = 0, clock()

    def line() -> str:
        seconds = clock() - started
        if done >= total:
            return f"{title}: all {total} batches seen, {seconds:.0f} s, finishing"
        return f"{title}: {done} of {total} batches, {time_left(seconds, done, total)}"

    with _bar() as bar:
        task = bar.add_task(title, total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)

        if bar.console.is_terminal:
            yield advance
            return
        with Pulse(line, lambda text: _print(bar, text), clock=clock):
            yield advance


class FinetuneReport:
    """Shows step, loss, validation figures and ETA of a fine-tuning.

    Parameters
    ----------
    clock : callable
        Returns the time in seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.bar = _bar("figures")
        self.task: Any = None
        self._clock, self.started = clock, clock()
        self.start = 0  # the step from which a resumed run continues
        self.note = ""
        self._last: Any = None  # the last report
        self._stage = "preparing"
        self._pulse = None if self.bar.console.is_terminal else Pulse(self.line, self.say)

    def __enter__(self) -> FinetuneReport:
        self.bar.start()
        if self._pulse:
            self._pulse.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pulse:
            self._pulse.__exit__(kind, error, trace)
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        _print(self.bar, line)

    def stage(self, title: str, done: int, total: int) -> None:
        """Show the progress of work between the training steps."""
        self._stage = f"{title}: {done} of {total} batches"
        if self.task is None:
            self.task = self.bar.add_task(title, total=total, figures="")
            self.start = -1  # no step yet
        if self.start < 0:
            self.bar.update(self.task, completed=done, total=total)
        else:
            self.bar.update(self.task, description=title)

    def line(self) -> str:
        """Return the state of the run as one line."""
        seconds, last = self._clock() - self.started, self._last
        if last is None:
            return f"{self._stage}, {time_left(seconds, 0, 0)}"
        done, total = last.step - self.start, last.steps - self.start
        where = f"step {last.step} of {last.steps}, {last.part} {last.epoch}/{last.epochs}"
        where += f", loss {last.loss:.4f}"
        where += f", {self._stage}" if self._stage else ""
        return f"{where}, {time_left(seconds, done, total)}"

    def __call__(self, progress: Any) -> None:
        """Show one report of `onnxqat.train.finetune`."""
        figures = f"loss {progress.loss:.4f}"
        if self._last is None or self._last.part != progress.part:
            self._begin(progress, figures)
        self._last, self._stage = progress, ""
        self.start = min(self.start, progress.step - 1)  # training may restart
        title = f"{progress.part} {progress.epoch}/{progress.epochs}"
        self.bar.update(
            self.task,
            completed=progress.step,
            total=progress.steps,
            description=title,
            figures=figures,
        )
        if progress.note != self.note:
            self.note = progress.note
            self.say(progress.note)
        if progress.validation is not None:
            self.say(self._epoch_line(progress))

    def _begin(self, progress: Any, figures: str) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task("fine-tuning", total=progress.steps, figures=figures)
        self.start, self.started = progress.step - 1, self._clock()

    def _epoch_line(self, progress: Any) -> str:
        words = [f"epoch {progress.epoch}/{progress.epochs}", f"loss {progress.loss:.4f}"]
        figures = progress.validation
        words += [f"{name} {figure_text(name, v)}" for name, v in figures.metrics.items()]
        if figures.agreement is not None and "agreement" not in figures.metrics:
            words.append(f"agreement {100 * figures.agreement:.2f} %")
        if figures.loss is not None:
            words.append(f"held-out loss {figures.loss:.4g}")
        seconds = self._clock() - self.started
        words.append(time_left(seconds, progress.step - self.start, progress.steps - self.start))
        return "  ".join(words)
