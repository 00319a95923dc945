"""Input files that are regular, output files that are whole or absent.

Reading a pipe or a device could last for ever. A file is written beside its destination under a
temporary name and moved there when it is complete and on the disk, so that an interrupted or
failing command leaves nothing half-written, and files that belong together are never mixed.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxqat.errors import OnnxQatError
from onnxqat.locks import claimed, is_data, noted_data, refuse_claimed

__all__ = [
    "atomic_folder",
    "atomic_output",
    "atomic_outputs",
    "check_folder",
    "check_readable",
    "check_writable",
    "write_text",
]


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
        The file is missing, cannot be looked at, or is a directory, a pipe, a socket or a device;
        or this run is going to replace it.
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
        raise error(f"{shown}: cannot be read (a directory). Name a file.")
    if not stat.S_ISREG(mode):
        raise error(f"{shown}: is not a regular file. Copy what it gives into one.")
    refuse_claimed(path)


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
    """Yield a temporary path; move it to ``path`` when the block succeeds.

    Raises
    ------
    OnnxQatError
        As `check_writable`, another run writes the file, or the file system refuses the write.
    """
    with atomic_outputs(Path(path), force=force) as (temporary,):
        yield temporary


@contextmanager
def atomic_outputs(
    *paths: Path, outdated: Iterable[Path] = (), force: bool = False
) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths of files of one folder; move them there when the block succeeds.

    Whenever the process is killed, no file of an earlier run lies beside one of this run that it
    does not belong to: nothing is moved before all are written, and what they outdate goes first.

    Parameters
    ----------
    *paths : Path
        The first is the model, which brings its data (`onnxqat.locks.is_data`) along.
    outdated : iterable of Path
        Files that belong to what the first path has been so far.
    force : bool
        Replace existing files.

    Raises
    ------
    OnnxQatError
        As `atomic_output`.
    """
    for path in paths:
        check_writable(path, force=force)
    try:
        with claimed(paths[0]) as own:
            own.mkdir(mode=0o700, exist_ok=True)  # somebody may have emptied the output's folder
            with tempfile.TemporaryDirectory(dir=own) as staging:
                temporary = tuple(Path(staging) / path.name for path in paths)
                yield temporary
                for made in Path(staging).iterdir():
                    _sync(made)
                for path in paths:  # it may have appeared meanwhile
                    check_writable(path, force=force)
                _commit(temporary, paths[0].parent, outdated)
    except OSError as error:
        message = f"{paths[0]}: cannot be written ({error.strerror}). Choose another output."
        raise OnnxQatError(message) from error


def check_folder(
    path: str | Path,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Refuse a folder that could not be written, before any work is done for it.

    Parameters
    ----------
    force : bool
        Replace what the folder holds.
    check : callable, optional
        Raises where the folder holds what must not be replaced.

    Raises
    ------
    OnnxQatError
        It holds something and ``force`` is not set, is no folder, or lies where none can be made.
    """
    path = Path(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OnnxQatError(f"{path}: is not a folder. Choose another output.")
        used = path.exists() and any(path.iterdir())
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}). Choose another output."
        raise OnnxQatError(message) from error
    if used and not force:
        raise OnnxQatError(f"{path}: already exists. Pass --force to replace it.")
    if used and check is not None:
        check(path)
    if not path.parent.is_dir():
        raise OnnxQatError(f"{path}: directory '{path.parent}' does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise OnnxQatError(f"{path}: directory '{path.parent}' is not writable. Choose another.")


@contextmanager
def atomic_folder(
    path: str | Path,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder; move it to ``path`` when the block succeeds.

    Killed while an earlier folder is replaced, the process leaves the old one, the new one or none.

    Parameters
    ----------
    force, check
        As `check_folder`.

    Raises
    ------
    OnnxQatError
        As `check_folder`, another run writes the folder, or the file system refuses the write.
    """
    path = Path(path)
    check_folder(path, force=force, check=check)
    try:
        with claimed(path) as own:
            own.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=own) as staging:
                made = Path(staging) / "new"
                made.mkdir()
                yield made
                for entry in (*made.rglob("*"), made):
                    _sync(entry)
                check_folder(path, force=force, check=check)  # it may have appeared meanwhile
                if path.exists():
                    path.rename(Path(staging) / "old")
                made.rename(path)
                _sync(path.parent)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}). Choose another output."
        raise OnnxQatError(message) from error


def _commit(temporary: tuple[Path, ...], folder: Path, outdated: Iterable[Path]) -> None:
    """Move written files to where they belong: data, then the model, then what belongs to it."""
    staging, model = temporary[0].parent, folder / temporary[0].name
    beside = {made.name for made in staging.iterdir()} - {made.name for made in temporary}
    new = sorted(name for name in beside if not (folder / name).exists())  # else of these bytes
    old = sorted(path.name for path in _data_of(model) if path.name not in beside)
    with noted_data(temporary[0], new, old):
        for name in new:
            _move(staging / name, folder)
        for path in outdated:
            path.unlink(missing_ok=True)
        _sync(folder)
        for made in temporary:
            _move(made, folder)
        for name in old:
            (folder / name).unlink(missing_ok=True)


def _move(made: Path, folder: Path) -> None:
    """Move a file to where it belongs, and let nothing later reach the disk before."""
    made.replace(folder / made.name)
    _sync(folder)


def _sync(path: Path) -> None:
    """Let what was written to a file, or moved within a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it to a folder
            raise
    finally:
        os.close(handle)


def _data_of(model: Path) -> list[Path]:
    """Return the files of weights that a model of ours refers to, if there is one."""
    found = [path for path in model.parent.iterdir() if is_data(path, model)]
    if not found or not model.is_file() or model.stat().st_size == 0:
        return []
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return [path for path in found if text.find(os.fsencode(path.name)) >= 0]


def write_text(path: str | Path, text: str, *, force: bool = False) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
