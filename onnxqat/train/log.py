"""A log of a fine-tuning for programs: one JSON document per line.

================  ===============================================================================
``event``         other keys
================  ===============================================================================
start, resume     ``schema``; a run begins, or goes on: steps behind its checkpoint come again
step              ``step``, ``epoch``, ``loss`` (mean of the last 20 steps), ``lr``, ``scale_lr``
epoch             ``step``, ``epoch``, ``loss``, ``metrics`` (figures on the held-out data; null
                  where not finite), ``scale_drift`` (log2, by set of parameters), ``clipped``
                  (fraction of the values beyond the clipping range, by point)
note              ``step``, ``note``
================  ===============================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from onnxqat.errors import OnnxQatError
from onnxqat.model import Model
from onnxqat.train.records import Progress
from onnxqat.train.selection import figures_of
from onnxqat.train.watch import clipped_shares, scale_drift

__all__ = ["TrainingLog"]


class TrainingLog:
    """Writes what `onnxqat.train.finetune` reports; a context manager.

    Parameters
    ----------
    path : str or Path
        Replaced, or with ``resume`` continued.
    start : Model
        The Q/DQ model before training.
    batch : mapping of str to array
        Inputs that the clipped values are counted on.
    every : int
        Steps between lines.
    threads : int
        0 takes all cores.

    Raises
    ------
    OnnxQatError
        The file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        start: Model,
        batch: Mapping[str, NDArray[Any]],
        *,
        every: int = 20,
        resume: bool = False,
        threads: int = 0,
    ) -> None:
        self.start, self.batch, self.every, self.threads = start, batch, every, threads
        self.path, self.note = Path(path), ""
        with self._writing():
            self.file = self.path.open("a" if resume else "w", encoding="utf-8")
        self._write(event="resume" if resume else "start", schema="onnxqat.log/1")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        where = {"step": progress.step, "epoch": progress.epoch, "loss": progress.loss}
        if progress.note != self.note:
            self.note = progress.note
            self._write(event="note", step=progress.step, note=progress.note)
        if progress.validation is None or progress.model is None:
            if progress.step % self.every == 0:
                rates = {"lr": progress.lr, "scale_lr": progress.scale_lr}
                self._write(event="step", **where, **rates)
            return
        figures = figures_of(progress.validation)
        self._write(
            event="epoch",
            **where,
            metrics={n: v if math.isfinite(v) else None for n, v in figures.items()},
            scale_drift=scale_drift(self.start, progress.model),
            clipped=clipped_shares(progress.model, self.batch, threads=self.threads),
        )

    def _write(self, **document: Any) -> None:
        with self._writing():
            self.file.write(json.dumps(document, allow_nan=False) + "\n")
            self.file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{self.path}: cannot be written ({error.strerror}). Choose another --log."
            raise OnnxQatError(message) from error
