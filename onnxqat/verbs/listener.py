"""The objects to which a verb reports messages and progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from onnxqat.train import Progress

__all__ = ["Listener", "TrainingListener"]

logger = logging.getLogger(__name__)


class TrainingListener(Protocol):
    """Gets the progress of a fine-tuning; see the parameters of `onnxqat.train.finetune`."""

    def __call__(self, progress: Progress) -> None:
        """Receive the report of a step or an epoch."""

    def stage(self, title: str, done: int, total: int) -> None:
        """Receive the progress of work between the steps."""

    def say(self, line: str) -> None:
        """Take a line for people."""


class _Silent:
    """Logs the messages, and ignores the progress."""

    def __call__(self, progress: Progress) -> None:
        pass

    def stage(self, title: str, done: int, total: int) -> None:
        pass

    def say(self, line: str) -> None:
        logger.info("%s", line)


class Listener:
    """Logs the messages of a verb. A subclass can also show progress, like the command line."""

    def note(self, text: str) -> None:
        """Take a line for people."""
        logger.info("%s", text)

    def batches(self, title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Return a context that yields a function to call after each of ``total`` batches."""
        del title, total
        return _counted()

    def training(self) -> AbstractContextManager[TrainingListener]:
        """Return a context that yields the listener of a fine-tuning."""
        return nullcontext(_Silent())


@contextmanager
def _counted() -> Iterator[Callable[[], None]]:
    yield lambda: None
