"""A log of a fine-tuning, for programs: as JSON lines, CSV or TensorBoard's event files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from onnxqat.errors import OnnxQatError
from onnxqat.model import Model
from onnxqat.train.events import Epoch, Event, Note, Resume, Start, Step
from onnxqat.train.records import Progress
from onnxqat.train.selection import figures_of
from onnxqat.train.tensorboard import EventFiles
from onnxqat.train.watch import clipped_shares, scale_drift
from onnxqat.train.writers import LogWriter, file_writer

__all__ = ["TrainingLog"]


class TrainingLog:
    """Writes what `onnxqat.train.finetune` reports; a context manager.

    Parameters
    ----------
    path : str or Path or None
        A file of JSON lines, see `onnxqat.train.events`, or of CSV by its ending. Replaced, or
        with ``resume`` continued.
    start : Model
        The Q/DQ model before training.
    batch : mapping of str to array
        Inputs that the clipped values are counted on.
    every : int
        Steps between events.
    threads : int
        0 takes all cores.
    tensorboard : str or Path, optional
        A folder of event files. Those that are there are removed, or with ``resume`` continued.

    Raises
    ------
    OnnxQatError
        A file cannot be written, or what writes it is not installed.
    """

    def __init__(
        self,
        path: str | Path | None,
        start: Model,
        batch: Mapping[str, NDArray[Any]],
        *,
        every: int = 20,
        resume: bool = False,
        threads: int = 0,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.start, self.batch, self.every, self.threads = start, batch, every, threads
        self.note, self.resuming = "", resume
        self.writers: list[LogWriter] = []
        if path is not None:
            self._open("--log", Path(path), file_writer)
        if tensorboard is not None:
            self._open("--tensorboard", Path(tensorboard), EventFiles)
        if not resume:
            self._write(Start())

    def _open(self, option: str, path: Path, make: Callable[..., LogWriter]) -> None:
        with _writing(option, path):
            self.writers.append(make(path, option=option, resume=self.resuming))

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self.writers:
            with _writing(writer.option, writer.path):  # what was not written may fail once more
                writer.close()

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        step, epoch, loss = progress.step, progress.epoch, progress.loss
        if self.resuming:  # the checkpoint is of the step before, or of the last of the epoch
            self.resuming = False
            self._write(Resume(step=step - (progress.validation is None)))
        if progress.note != self.note:
            self.note = progress.note
            self._write(Note(step=step, note=progress.note))
        if progress.validation is None or progress.model is None:
            if step % self.every == 0:
                rates = {"lr": progress.lr, "scale_lr": progress.scale_lr}
                self._write(Step(step=step, epoch=epoch, loss=loss, **rates))
            return
        found = figures_of(progress.validation)
        self._write(
            Epoch(
                step=step,
                epoch=epoch,
                loss=loss,
                metrics={n: v if math.isfinite(v) else None for n, v in found.items()},
                scale_drift=scale_drift(self.start, progress.model),
                clipped=clipped_shares(progress.model, self.batch, threads=self.threads),
            )
        )

    def _write(self, event: Event) -> None:
        for writer in self.writers:
            with _writing(writer.option, writer.path):
                writer.write(event)


@contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}). Choose another {option}."
        raise OnnxQatError(message) from error
