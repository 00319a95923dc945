"""What the stages of a running job share: where things are, and who is told how far they are."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxqat.arguments import take_settings
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
    """What a step gave.

    Attributes
    ----------
    figures : dict of str to float or None
        What was measured; None where it is not finite.
    notes : tuple of str
        What people should know.
    files : tuple of Path
        What was written.
    """

    figures: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


class Ending:
    """Whether a job is to end.

    Attributes
    ----------
    asked : Event
        Set when it is.
    saves : bool
        Whether a training runs, which saves its state before.
    """

    def __init__(self) -> None:
        self.asked, self.saves = threading.Event(), False

    @contextmanager
    def saving(self) -> Iterator[Callable[[], bool]]:
        """Yield what says whether to stop; the process lives on until the block is left."""
        self.saves = True
        try:
            yield self.asked.is_set
        finally:
            self.saves = False


class Work:
    """A job at work; relative paths begin at the current directory, which is the job file's.

    Parameters
    ----------
    job : Job
        What to do.
    folder : Path
        Where its results go.
    tell : callable
        Takes the progress of the running step: ``done`` of ``total``.
    ending : Ending
        Whether to stop.
    """

    def __init__(self, job: Job, folder: Path, tell: Tell, ending: Ending) -> None:
        self.job, self.folder, self.tell, self.ending = job, folder, tell, ending
        self.keys: dict[str, str] = {}  # of the steps so far, see `onnxqat.jobs.records`

    @property
    def listener(self) -> Listener:
        """Who is told what a verb does."""
        return _Teller(self.tell)

    @property
    def settings(self) -> Settings:
        """What is said about the data, for the model to remember."""
        return take_settings(dict(self.job.data))

    def options(self, stage: str) -> dict[str, Any]:
        """Return a copy of the parsed options of a stage."""
        return dict(self.job.options[stage])

    def source(self, split: str) -> DataSource:
        """Return the data of a split."""
        said = {name: self.job.data[name] for name in ("layout", "skip_broken", "truth", "boxes")}
        return DataSource(source=self.job.split(split), samples=self.job.samples, **said)

    def model(self, step: str | None) -> Path:
        """Return where the model of a step lies; the float one without a step."""
        return Path(self.job.model) if step is None else self.folder / "models" / f"{step}.onnx"

    def made(self, step: Step) -> Path:
        """Return where a step writes its model, in a folder that is there."""
        path = self.model(step.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def chip(self, step: Step) -> Path:
        """Return the folder of what leaves for the chip, made where it is missing."""
        name = "chip" if step.variant == self.job.last else f"chip-{step.variant}"
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class _Teller(Listener):
    """Tells how far a verb is, and logs its notes."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._told = tell, 0.0

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def progress(self, title: str, done: int, total: int) -> None:
        """Tell, unless that was done a moment ago."""
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
    """Tells how a fine-tuning goes."""

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
