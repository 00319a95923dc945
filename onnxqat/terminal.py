"""Print lines on stdout and stderr, and handle streams that cannot be written.

Names come from files, and a file may be hostile. Characters that would move the cursor, change the
order of letters or begin a line are escaped. JSON stays exact.
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
    r"""Return a text in which all characters that cannot be printed on one line are escaped.

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
    """Print a JSON document in ASCII."""
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
    """A stream that records its failure.

    Parameters
    ----------
    stream : TextIO
        The underlying stream.
    heedless : bool
        Whether to ignore failures: a training of several days must not end because its terminal
        was closed, or because the disk with its messages is full.
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
    """In the block, ignore a stderr that cannot be written, and end at such a stdout.

    The process then ends with exit code 1 and one line on stderr (none if the reader of a pipe has
    ended).
    """
    _open_standard_files()
    stdout, stderr = sys.stdout, sys.stderr
    if hasattr(stdout, "reconfigure"):  # its encoding may lack characters of names
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
        # Python would try to write the remaining output again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        click.echo(f"Error: stdout: cannot be written ({error.strerror}).", err=True)
        sys.exit(1)
    finally:
        sys.stderr = stderr
        if sys.stdout is watched:  # click has replaced the stream if the reader has ended
            sys.stdout = stdout


def _open_standard_files() -> None:
    """Open missing standard streams, so that no file opened later becomes one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free file descriptor
