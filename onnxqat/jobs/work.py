"""Context of a running job for its stages: paths, options, and reports of progress."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxqat.arguments import take_settings, take_source
from onnxqat.settings import Settings
from onnxqat.train import Progress
from onnxqat.verbs import DataSource, Listener, TrainingListener

if TYPE_CHECKING:
    from onnxqat.jobs.job import Job
    from onnxqat.jobs.rows import Step

__all__ = ["Ending", "Result", "Work"]

logger = logging.getLogger("onnxqat.jobs")

EVERY = 0.2  # seconds between two reports of progress

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a step.

    Attributes
    ----------
    figures : dict of str to float or None
        Measured figures; None if a figure is not finite.
    notes : tuple of str
        Remarks for the user.
    files : tuple of Path
        Written files.
    """

    figures: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


class Ending:
    """A request to end a job.

    Attributes
    ----------
    asked : Event
        Set when the job must end.
    saves : bool
        Whether a training runs, which must save its state first.
    """

    def __init__(self) -> None:
        self.asked, self.saves = threading.Event(), False

    @contextmanager
    def saving(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that tells whether to stop; the process does not end in the block."""
        self.saves = True
        try:
            yield self.asked.is_set
        finally:
            self.saves = False


class Work:
    """A running job. The current directory must be that of the job file, for relative paths.

    Parameters
    ----------
    job : Job
        The job.
    folder : Path
        Folder of its results.
    tell : callable
        Called with the progress of the running step: ``title``, ``done``, ``total``.
    ending : Ending
        Tells whether to stop.
    """

    def __init__(self, job: Job, folder: Path, tell: Tell, ending: Ending) -> None:
        self.job, self.folder, self.tell, self.ending = job, folder, tell, ending
        self.keys: dict[str, str] = {}  # keys of the steps so far, see `onnxqat.jobs.records`

    @property
    def listener(self) -> Listener:
        """The listener for verbs, which reports their progress."""
        return _Teller(self.tell)

    @property
    def settings(self) -> Settings:
        """Settings of the data, which the model's file stores."""
        return take_settings(dict(self.job.data))

    def options(self, stage: str) -> dict[str, Any]:
        """Return a copy of the parsed options of a stage."""
        return dict(self.job.options[stage])

    def source(self, split: str) -> DataSource:
        """Return the data of a split."""
        found: DataSource = take_source(self.job.split(split), dict(self.job.data))
        return replace(found, samples=self.job.samples)

    def model(self, step: str | None) -> Path:
        """Return the path of a step's model; without a step, that of the float model."""
        return Path(self.job.model) if step is None else self.folder / "models" / f"{step}.onnx"

    def made(self, step: Step) -> Path:
        """Return the path for a step's model; create its folder."""
        path = self.model(step.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def chip(self, step: Step) -> Path:
        """Return the folder of a variant's files for the chip; create it."""
        name = "chip" if step.variant == self.job.last else f"chip-{step.variant}"
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class _Teller(Listener):
    """Reports the progress of a verb, and logs its notes."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._told = tell, 0.0

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def progress(self, title: str, done: int, total: int) -> None:
        """Report progress, at most every `EVERY` seconds."""
        now = time.monotonic()
        if done >= total or now - self._told >= EVERY:
            self._told = now
            self._tell({"title": title, "done": done, "total": total})

    def batches(self, title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        return self._counted(title, total)

    @contextmanager
    def _counted(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.progress(title, done, total)

        self.progress(title, 0, total)
        yield advance

    @contextmanager
    def training(self) -> Iterator[TrainingListener]:
        yield _TrainingTeller(self)


class _TrainingTeller:
    """Reports the progress of a fine-tuning."""

    def __init__(self, teller: _Teller) -> None:
        self._teller = teller

    def __call__(self, progress: Progress) -> None:
        self._teller.progress("training", progress.step, progress.steps)
        if progress.validation is not None:
            figures = ", ".join(f"{k} {v:.4f}" for k, v in progress.validation.metrics.items())
            epoch = f"epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.4g}"
            logger.info("%s %s", epoch, figures)

    def stage(self, title: str, done: int, total: int) -> None:
        self._teller.progress(title, done, total)

    def say(self, line: str) -> None:
        logger.info("%s", line)
