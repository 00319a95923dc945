"""Log a fine-tuning for other programs, as JSON lines, CSV or TensorBoard event files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from onnxqat.device import CPU, Device
from onnxqat.environment import runtime_distribution
from onnxqat.evaluation import Evaluation
from onnxqat.json_values import json_value
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
    """Writes the reports of `onnxqat.train.finetune` to files; a context manager.

    Parameters
    ----------
    path : str or Path or None
        A file of JSON lines (see `onnxqat.train.monitoring.events`), or of CSV if it ends with
        ``.csv``. It is replaced, or continued with ``resume``.
    start : QuantizedModel
        The Q/DQ model before training.
    batch : mapping of str to array
        Inputs with which clipped values are counted.
    every : int
        The number of steps between events.
    threads : int
        The number of threads (0: all cores).
    device : Device
        Where the run computes.
    tensorboard : str or Path, optional
        A folder of event files. Existing ones are removed, or continued with ``resume``.

    Files are opened at the first report. If a file cannot be written, for example because the disk
    is full, a warning is logged and training continues without it.
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
        device: Device = CPU,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.start, self.batch, self.every, self.threads = start, batch, every, threads
        self.device = device
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
        """Write one report."""
        of_block = progress.part == "block"
        step, epoch, loss = 0 if of_block else progress.step, progress.epoch, progress.loss
        if not self.begun:  # not earlier, so that a refused run leaves no files
            self.begun = True
            self._each(lambda writer: writer.open())
            # the checkpoint is from the step before, or from the last step of the epoch
            before = max(step - (progress.validation is None), 0)
            start = Start(
                metrics=_metrics(progress.before),
                engine=runtime_distribution(),
                device=self.device.name,
                precision=self.device.precision,
            )
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
        """Call ``act`` for each writer; a writer that fails is reported once and closed."""
        for writer in list(self.writers):
            try:
                act(writer)
            except OSError as error:
                self.writers.remove(writer)
                with suppress(OSError, AttributeError):  # an unopened writer has no file
                    writer.close()
                logger.warning(
                    "%s: cannot be written (%s). Training continues without this %s.",
                    writer.path,
                    error.strerror,
                    writer.option,
                )


def _metrics(evaluation: Evaluation | None) -> dict[str, float | None]:
    """Return the figures of a state, with None for values that are not finite."""
    found: dict[str, float | None] = json_value(figures_of(evaluation)) if evaluation else {}
    return found
