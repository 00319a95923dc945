"""A log of a fine-tuning, for programs: as JSON lines, CSV or TensorBoard's event files."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from onnxqat.evaluation import Evaluation
from onnxqat.quantized import QuantizedModel
from onnxqat.train.monitoring.drift import clipped_shares, scale_drift
from onnxqat.train.monitoring.events import Epoch, Event, Note, Resume, Start, Step
from onnxqat.train.monitoring.tensorboard import EventFiles
from onnxqat.train.monitoring.writers import LogWriter, file_writer
from onnxqat.train.records import Progress
from onnxqat.train.selection import figures_of

__all__ = ["TrainingLog"]

logger = logging.getLogger(__name__)


class TrainingLog:
    """Writes what `onnxqat.train.finetune` reports; a context manager.

    Parameters
    ----------
    path : str or Path or None
        A file of JSON lines, see `onnxqat.train.monitoring.events`, or of CSV by its ending.
        Replaced, or with ``resume`` continued.
    start : QuantizedModel
        The Q/DQ model before training.
    batch : mapping of str to array
        Inputs that the clipped values are counted on.
    every : int
        Steps between events.
    threads : int
        0 takes all cores.
    tensorboard : str or Path, optional
        A folder of event files. Those that are there are removed, or with ``resume`` continued.

    Files are opened at the first report. One that cannot be written, on a full disk for instance,
    is left as it is with a warning: training is worth more than its log.
    """

    def __init__(
        self,
        path: str | Path | None,
        start: QuantizedModel,
        batch: Mapping[str, NDArray[Any]],
        *,
        every: int = 20,
        resume: bool = False,
        threads: int = 0,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.start, self.batch, self.every, self.threads = start, batch, every, threads
        self.note, self.resume, self.begun = "", resume, False
        self.writers: list[LogWriter] = []
        if path is not None:
            self.writers.append(file_writer(Path(path), option="--log", resume=resume))
        if tensorboard is not None:
            folder = Path(tensorboard)
            self.writers.append(EventFiles(folder, option="--tensorboard", resume=resume))

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.begun:
            self._each(lambda writer: writer.close())

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        of_block = progress.part == "block"
        step, epoch, loss = 0 if of_block else progress.step, progress.epoch, progress.loss
        if not self.begun:  # only now, so that a run that is refused leaves nothing behind
            self.begun = True
            self._each(lambda writer: writer.open())
            # the checkpoint is of the step before, or of the last of the epoch
            before = max(step - (progress.validation is None), 0)
            start = Start(metrics=_metrics(progress.before))
            self._write(Resume(step=before) if self.resume else start)
        if progress.note != self.note:
            self.note = progress.note
            self._write(Note(step=step, note=progress.note))
        if of_block:
            return
        if progress.validation is None or progress.model is None:
            if step % self.every == 0:
                rates = {"lr": progress.lr, "scale_lr": progress.scale_lr}
                self._write(Step(step=step, epoch=epoch, loss=loss, **rates))
            return
        self._write(
            Epoch(
                step=step,
                epoch=epoch,
                loss=loss,
                metrics=_metrics(progress.validation),
                scale_drift=scale_drift(self.start, progress.model),
                clipped=clipped_shares(progress.model, self.batch, threads=self.threads),
            )
        )

    def _write(self, event: Event) -> None:
        self._each(lambda writer: writer.write(event))

    def _each(self, act: Callable[[LogWriter], None]) -> None:
        """Let every writer act; one that cannot is told of once, and ends."""
        for writer in list(self.writers):
            try:
                act(writer)
            except OSError as error:
                self.writers.remove(writer)
                with suppress(OSError, AttributeError):  # one that was never opened has no file
                    writer.close()
                logger.warning(
                    "%s: cannot be written (%s). Training goes on without this %s.",
                    writer.path,
                    error.strerror,
                    writer.option,
                )


def _metrics(evaluation: Evaluation | None) -> dict[str, float | None]:
    """Return the figures of a state as JSON has them."""
    found = {} if evaluation is None else figures_of(evaluation)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
