"""Progress on stderr: a bar with an ETA on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

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

__all__ = ["FinetuneReport", "progress_bar"]


def _bar(*fields: str) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    columns += [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` parts; yield the function that advances it."""
    with _bar() as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


class FinetuneReport:
    """Shows step, loss, validation figures and ETA of a fine-tuning."""

    def __init__(self) -> None:
        self.bar = _bar("figures")
        self.task: Any = None
        self.started = time.monotonic()
        self.start = 0  # the step a resumed run goes on from
        self.note = ""

    def __enter__(self) -> FinetuneReport:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def __call__(self, progress: Any) -> None:
        """Take one report of `onnxqat.train.finetune`."""
        figures = f"loss {progress.loss:.4f}"
        if self.task is None:
            self.start = progress.step - 1
            self.task = self.bar.add_task("fine-tuning", total=progress.steps, figures=figures)
        self.start = min(self.start, progress.step - 1)  # training may start again
        title = f"epoch {progress.epoch}/{progress.epochs}"
        self.bar.update(self.task, completed=progress.step, description=title, figures=figures)
        if progress.note != self.note:
            self.note = progress.note
            self._print(progress.note)
        if progress.validation is not None:
            self._print(self._epoch_line(progress))

    def _print(self, line: str) -> None:
        # as it is: a log file has no width, and names may look like rich's markup
        self.bar.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _epoch_line(self, progress: Any) -> str:
        seconds = time.monotonic() - self.started
        remaining = seconds / (progress.step - self.start) * (progress.steps - progress.step)
        words = [f"epoch {progress.epoch}/{progress.epochs}", f"loss {progress.loss:.4f}"]
        words += [f"{k} {100 * v:.2f} %" for k, v in progress.validation.metrics.items()]
        if progress.validation.agreement is not None:
            words.append(f"agreement {100 * progress.validation.agreement:.2f} %")
        words.append(f"{seconds:.0f} s, {remaining:.0f} s left")
        return "  ".join(words)
