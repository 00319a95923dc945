"""Write TensorBoard event files: a run's numbers as scalars by step.

The format is TensorFlow's ``Event`` in TFRecords, written by tensorboardX (the optional extra
``tensorboard``). At a ``SessionLog.START``, in the same or in another file of the folder,
TensorBoard discards the events from that step on (``_CheckForRestartAndMaybePurge`` in
tensorboard's ``backend/event_processing/event_accumulator.py``).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from onnxqat.errors import OnnxQatError
from onnxqat.train.monitoring.events import Event, figures, stale_from
from onnxqat.train.monitoring.writers import LogWriter

__all__ = ["EventFiles", "check_event_folder"]

PATTERN = "events.out.tfevents.*"


class EventFiles(LogWriter):
    """Writes event files into a folder; a resumed run adds one, a new run removes the others."""

    def open(self) -> None:
        """Create the folder, and begin a file in it."""
        writer, self._proto, self._summary = _library()
        self.path.mkdir(exist_ok=True)
        earlier = list(self.path.glob(PATTERN))
        if not self.resume:
            for file in earlier:
                file.unlink()
        # numbered, because the time in their names is in whole seconds
        self._file = writer.EventsWriter(str(self.path / "events"), f".{len(earlier)}")
        self._last = 0

    def write(self, event: Event) -> None:
        """Write one event, after invalidating earlier ones if necessary."""
        stale = stale_from(event, self._last)
        if stale:
            again = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._add(stale, session_log=again)
        self._last = event.step
        value = self._summary.Summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in figures(event)]
        if scalars:
            self._add(event.step, summary=self._summary.Summary(value=scalars))
        self._file.flush()

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        """End the file."""
        self._file.close()


def check_event_folder(path: str | Path, *, force: bool) -> None:
    """Refuse a folder into which event files cannot be written, before the work begins.

    Raises
    ------
    OnnxQatError
        tensorboardX is not installed; the path is a file; the folder contains a run and ``force``
        is not set; or its parent is missing.
    """
    path = Path(path)
    _library()
    if path.exists() and not path.is_dir():
        raise OnnxQatError(f"{path}: is not a directory. Name another folder with --tensorboard.")
    if not path.parent.is_dir():
        raise OnnxQatError(f"{path}: directory '{path.parent}' does not exist. Create it first.")
    if not force and any(path.glob(PATTERN)):
        raise OnnxQatError(
            f"{path}: already contains a run's event files. Name another folder with "
            "--tensorboard, or pass --force to replace them."
        )


def _library() -> tuple[Any, Any, Any]:
    """Return tensorboardX's writer, and the modules of its messages."""
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2
    except ImportError as error:
        raise OnnxQatError(
            "--tensorboard: tensorboardX is not installed. Run pip install 'onnxqat[tensorboard]'."
        ) from error
    return event_file_writer, event_pb2, summary_pb2
