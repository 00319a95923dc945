"""The door for what people read: lines on stdout and stderr, and how they end.

Names come from files, and a file may be hostile: what would move the cursor, change the order of
letters or begin a line is shown as its escape. JSON stays exact.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import click

__all__ = ["LineFormatter", "UsageLineError", "guarded_streams", "say", "say_document", "shown"]


def shown(text: str) -> str:
    r"""Return a text with whatever cannot be printed on one line as its escape.

    Examples
    --------
    >>> shown("größe\x1b[31m\n\u202e")
    'größe\\x1b[31m\\n\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def say(line: str, *, err: bool = False) -> None:
    """Print one line, to stderr with ``err``."""
    click.echo(shown(line), err=err)


def say_document(document: Any) -> None:
    """Print JSON, in ASCII."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


class UsageLineError(click.ClickException):
    """Wrong usage in one line, where click writes four."""

    exit_code = 2


class LineFormatter(logging.Formatter):
    """Formats a log message as one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of logging)
        """Return the line."""
        return shown(super().formatMessage(record))


class _Watched:
    """A stream that notes how it failed.

    Parameters
    ----------
    stream : TextIO
        What is written to.
    heedless : bool
        Whether to go on without it: a training that runs for days must not end since its terminal
        went away, or the disk with what it says is full.
    """

    def __init__(self, stream: TextIO, *, heedless: bool) -> None:
        self._stream, self._heedless = stream, heedless
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._noting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            if not self._heedless:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Let the block survive a stderr that cannot be written, and end at such a stdout.

    That ends the process with exit code 1, and one line on stderr unless the reader just left.
    """
    _open_standard_files()
    stdout, stderr = sys.stdout, sys.stderr
    if hasattr(stdout, "reconfigure"):  # its encoding may lack letters of names
        stdout.reconfigure(errors="backslashreplace")
    if stdout is not None:
        sys.stdout = cast(TextIO, _Watched(stdout, heedless=False))
    if stderr is not None:
        sys.stderr = cast(TextIO, _Watched(stderr, heedless=True))
    watched = sys.stdout
    try:
        yield
    except OSError as error:
        if error is not getattr(watched, "failure", None):
            raise
        # what could not be written would be written once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        click.echo(f"Error: stdout: cannot be written ({error.strerror}).", err=True)
        sys.exit(1)
    finally:
        sys.stderr = stderr
        if sys.stdout is watched:  # click has put a stream in its place where a reader left
            sys.stdout = stdout


def _open_standard_files() -> None:
    """Keep files that are opened later from becoming stdin, stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
