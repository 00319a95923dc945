"""Files that the events of a fine-tuning are written to, and JSON lines read from."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TextIO

import msgspec

from onnxqat.errors import DataError
from onnxqat.train.events import Epoch, Event, Start, Step, figures, stale_from

__all__ = ["LogWriter", "file_writer", "read_log"]

LARGEST = 2**28  # bytes of a log that is read


class LogWriter(ABC):
    """Writes events as they come, so that others can read what there is so far.

    Attributes
    ----------
    path, option : Path, str
        What is written, and the option that named it.
    """

    path: Path
    option: str

    @abstractmethod
    def write(self, event: Event) -> None:
        """Write one event."""

    @abstractmethod
    def close(self) -> None:
        """End the file."""


class _TextWriter(LogWriter):
    """A text file, replaced or continued."""

    def __init__(self, path: Path, *, option: str, resume: bool) -> None:
        self.path, self.option = path, option
        self.file: TextIO = path.open("a" if resume else "w", encoding="utf-8", newline="")

    def close(self) -> None:
        self.file.close()


class _JsonLines(_TextWriter):
    """One JSON document per line."""

    def write(self, event: Event) -> None:
        self.file.write(msgspec.json.encode(event).decode() + "\n")
        self.file.flush()


class _Csv(_TextWriter):
    """One number per row; what is logged again after a resumption stands in later rows."""

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        self.rows = csv.writer(self.file, lineterminator="\n")
        if self.file.tell() == 0:
            self.rows.writerow(("step", "epoch", "name", "value"))

    def write(self, event: Event) -> None:
        if isinstance(event, Step | Epoch):
            where = event.step, event.epoch
            self.rows.writerows((*where, name, repr(value)) for name, value in figures(event))
        self.file.flush()


def file_writer(path: Path, *, option: str, resume: bool) -> LogWriter:
    """Return the writer for a file: CSV by its ending, JSON lines otherwise."""
    kind = _Csv if path.suffix.lower() == ".csv" else _JsonLines
    return kind(path, option=option, resume=resume)


def read_log(path: str | Path) -> list[Event]:
    """Return the events of a log of JSON lines that hold: none that a resumed run logged again.

    A line that is still being written is left out.

    Raises
    ------
    DataError
        There is no such file, or it is not a log of this version.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: is larger than {LARGEST >> 20} MiB. Give the log of one run.")
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}). Give what --log wrote."
        raise DataError(message) from error
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = msgspec.json.decode(line, type=Event)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"{path}: line {number} is not of a log ({error})."
            raise DataError(f"{message} Give what --log FILE.jsonl wrote.") from error
        stale = stale_from(event, events[-1].step if events else 0)
        while stale is not None and events and events[-1].step >= stale:
            events.pop()
        events.append(event)
    if not events or not isinstance(events[0], Start):
        raise DataError(f"{path}: holds no run from its start. Give what --log FILE.jsonl wrote.")
    return events
