"""Write the events of a fine-tuning to files, and read them back from JSON lines."""

from __future__ import annotations

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from io import FileIO, StringIO
from pathlib import Path
from typing import Any, cast

import msgspec

from onnxqat.errors import DataError
from onnxqat.train.monitoring.events import Event, Start, figures, stale_from

__all__ = ["LogWriter", "file_writer", "read_log"]

LARGEST = 2**28  # bytes; larger logs are refused
BLOCK = 2**16  # bytes that are searched at a time for the end of the last line


class LogWriter(ABC):
    """Writes each event immediately, so that other programs can read the log during a run.

    Attributes
    ----------
    path, option : Path, str
        The file or folder, and the option that named it.
    resume : bool
        Whether to continue an existing log.

    All methods can raise an OSError.
    """

    def __init__(self, path: Path, *, option: str, resume: bool) -> None:
        self.path, self.option, self.resume = path, option, resume

    @abstractmethod
    def open(self) -> None:
        """Begin the file, or continue it with ``resume``."""

    @abstractmethod
    def write(self, event: Event) -> None:
        """Write one event."""

    @abstractmethod
    def close(self) -> None:
        """End the file."""


class _TextWriter(LogWriter):
    """A file of lines, replaced or continued, that never ends with a partial line."""

    file: FileIO

    def open(self) -> None:
        mode = "r+b" if self.resume and self.path.exists() else "wb"
        self.file = cast(FileIO, self.path.open(mode, buffering=0))
        self.file.seek(_end_of_lines(self.file))
        self.file.truncate()  # a killed run may have left a partial line

    def append(self, text: str) -> None:
        """Write either all lines or none."""
        start, data = self.file.tell(), text.encode()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError:
            self.file.truncate(start)
            raise

    def close(self) -> None:
        self.file.close()


class _JsonLines(_TextWriter):
    """One JSON document per line."""

    def write(self, event: Event) -> None:
        self.append(msgspec.json.encode(event).decode() + "\n")


class _Csv(_TextWriter):
    """One number per row; after a resumption, repeated steps follow in later rows."""

    def open(self) -> None:
        super().open()
        if self.file.tell() == 0:
            self._append_rows([("step", "epoch", "name", "value")])

    def write(self, event: Event) -> None:
        where = event.step, getattr(event, "epoch", 0)
        self._append_rows((*where, name, repr(value)) for name, value in figures(event))

    def _append_rows(self, rows: Iterable[Sequence[Any]]) -> None:
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self.append(text.getvalue())


def _end_of_lines(file: FileIO) -> int:
    """Return the length, in bytes, of the complete lines of a file."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - BLOCK, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def file_writer(path: Path, *, option: str, resume: bool) -> LogWriter:
    """Return the writer for a file: CSV if it ends with ``.csv``, otherwise JSON lines."""
    kind = _Csv if path.suffix.lower() == ".csv" else _JsonLines
    return kind(path, option=option, resume=resume)


def read_log(path: str | Path) -> list[Event]:
    """Return the valid events of a JSON lines log, without those that a resumed run repeated.

    A line that is still being written is left out.

    Raises
    ------
    DataError
        The file is missing, or is not a log of this version.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: is larger than {LARGEST >> 20} MiB. Give the log of one run.")
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}). Give a file that --log wrote."
        raise DataError(message) from error
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = msgspec.json.decode(line, type=Event)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"{path}: line {number} does not belong to a log ({error})."
            raise DataError(f"{message} Give a file that --log FILE.jsonl wrote.") from error
        stale = stale_from(event, events[-1].step if events else 0)
        while stale is not None and events and events[-1].step >= stale:
            events.pop()
        events.append(event)
    if not events or not isinstance(events[0], Start):
        raise DataError(
            f"{path}: contains no run from its start. Give a file that --log FILE.jsonl wrote."
        )
    return events
