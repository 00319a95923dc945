"""Who is told what a verb does meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from onnxqat.train import Progress

__all__ = ["Listener", "TrainingListener"]

logger = logging.getLogger(__name__)


class TrainingListener(Protocol):
    """Who is told how a fine-tuning goes; see the parameters of `onnxqat.train.finetune`."""

    def __call__(self, progress: Progress) -> None:
        """Take a step or an epoch."""

    def stage(self, title: str, done: int, total: int) -> None:
        """Take what is done between the steps."""

    def say(self, line: str) -> None:
        """Take a line for people."""


class _Silent:
    """Logs the lines, and leaves the figures."""

    def __call__(self, progress: Progress) -> None:
        pass

    def stage(self, title: str, done: int, total: int) -> None:
        pass

    def say(self, line: str) -> None:
        logger.info("%s", line)


class Listener:
    """Logs what a verb notes. Subclass it to show progress too, as the command line does."""

    def note(self, text: str) -> None:
        """Take a line for people."""
        logger.info("%s", text)

    def batches(self, title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Return a context that yields what is called after each of ``total`` batches."""
        del title, total
        return _counted()

    def training(self) -> AbstractContextManager[TrainingListener]:
        """Return a context that yields who is told how the fine-tuning goes."""
        return nullcontext(_Silent())


@contextmanager
def _counted() -> Iterator[Callable[[], None]]:
    yield lambda: None
