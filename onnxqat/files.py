"""Input files that are regular, output files that are whole or absent.

Reading a pipe or a device could last for ever. A file is written beside its destination under a temporary name and moved there when it is
complete, so that an interrupted or failing command leaves nothing half-written.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxqat.errors import OnnxQatError

__all__ = ["atomic_output", "check_readable", "check_writable", "write_text"]


def check_readable(path: str | Path, error: type[OnnxQatError] = OnnxQatError) -> None:
    """Refuse an input that is not a regular file, before it is opened.

    Parameters
    ----------
    path : str or Path
        The file; a link to a regular file is one.
    error : type of OnnxQatError
        What to raise: the error of what the file holds.

    Raises
    ------
    OnnxQatError
        The file is missing, cannot be looked at, or is a directory, a pipe, a socket or a device.
    """
    shown = str(path).encode(errors="backslashreplace").decode()
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - a path that no Path takes is an answer too
    except FileNotFoundError as cause:
        raise error(f"{shown}: no such file.") from cause
    except OSError as cause:  # a name too long, a folder that may not be searched
        raise error(f"{shown}: cannot be read ({cause.strerror}). Check the path.") from cause
    except ValueError as cause:  # a NUL character
        raise error(f"{shown}: cannot be read ({cause}). Check the path.") from cause
    if stat.S_ISDIR(mode):
        raise error(f"{shown}: is a directory. Name a file to read.")
    if not stat.S_ISREG(mode):
        raise error(f"{shown}: is not a regular file. Copy what it gives into one.")


def check_writable(path: str | Path, *, force: bool = False) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Raises
    ------
    OnnxQatError
        The file exists and ``force`` is not set, or its directory is missing or read-only.
    """
    path = Path(path)
    try:
        exists, regular = path.exists(), path.is_file()
    except OSError as error:  # a name too long, a folder that may not be searched
        message = f"{path}: cannot be written ({error.strerror}). Choose another output."
        raise OnnxQatError(message) from error
    if path.is_dir():
        raise OnnxQatError(f"{path}: is a directory. Name a file to write.")
    if exists and not regular:  # it would be replaced by a file: /dev/null for one
        raise OnnxQatError(f"{path}: is not a regular file. Choose another output.")
    if exists and not force:
        raise OnnxQatError(f"{path}: already exists. Pass --force to replace it.")
    folder = path.parent
    if not folder.is_dir():
        raise OnnxQatError(f"{path}: directory '{folder}' does not exist. Create it first.")
    if not os.access(folder, os.W_OK):
        raise OnnxQatError(f"{path}: directory '{folder}' is not writable. Choose another output.")


@contextmanager
def atomic_output(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block succeeds.

    Raises
    ------
    OnnxQatError
        As `check_writable`, or the file system refuses the write.
    """
    path = Path(path)
    check_writable(path, force=force)
    try:
        with tempfile.TemporaryDirectory(prefix=".onnxqat-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            beside = sorted(set(Path(folder).iterdir()) - {temporary})
            for made in beside:  # a model may bring its external data along
                check_writable(path.parent / made.name, force=force)
            for made in (*beside, temporary):  # the file that refers to the others comes last
                made.replace(path.parent / made.name)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}). Choose another output."
        raise OnnxQatError(message) from error


def write_text(path: str | Path, text: str, *, force: bool = False) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
