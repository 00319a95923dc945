"""Check that input files are regular files, and write output files completely or not at all.

Reading a pipe or a device could block forever. A file is written under a temporary name beside its
destination, and moved there when it is complete and on the disk. An interrupted or failing command
therefore leaves no partial file, and never mixes files of two runs that belong together.
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
        The file, or a link to it.
    error : type of OnnxQatError
        The type of the error, which depends on the content of the file.

    Raises
    ------
    OnnxQatError
        The file is missing or cannot be accessed; it is a directory, a pipe, a socket or a device;
        or this run is going to replace it.
    """
    shown = str(path).encode(errors="backslashreplace").decode()
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path would refuse some paths
    except FileNotFoundError as cause:
        raise error(f"{shown}: no such file.") from cause
    except OSError as cause:  # a name too long, a folder that may not be searched
        raise error(f"{shown}: cannot be read ({cause.strerror}). Check the path.") from cause
    except ValueError as cause:  # a NUL character
        raise error(f"{shown}: cannot be read ({cause}). Check the path.") from cause
    if stat.S_ISDIR(mode):
        raise error(f"{shown}: cannot be read (a directory). Name a file.")
    if not stat.S_ISREG(mode):
        raise error(f"{shown}: is not a regular file. Copy its content into a regular file.")
    refuse_claimed(path)


def check_writable(path: str | Path, *, force: bool = False) -> None:
    """Refuse an output file that cannot be written, before the work for it begins.

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
    if exists and not regular:  # a file would replace it, for example /dev/null
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
        As for `check_writable`; or another run is writing the file, or writing fails.
    """
    with atomic_outputs(Path(path), force=force) as (temporary,):
        yield temporary


@contextmanager
def atomic_outputs(
    *paths: Path, outdated: Iterable[Path] = (), force: bool = False
) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths for files of one folder; move them there when the block succeeds.

    Even if the process is killed, files of an earlier run are never left beside files of this run
    that they do not belong to: files are moved only after all are written, and outdated files are
    removed first.

    Parameters
    ----------
    *paths : Path
        The files. The first is the model; its data (`onnxqat.locks.is_data`) are moved with it.
    outdated : iterable of Path
        Files that belong to an earlier version of the first file.
    force : bool
        Replace existing files.

    Raises
    ------
    OnnxQatError
        As for `atomic_output`.
    """
    for path in paths:
        check_writable(path, force=force)
    try:
        with claimed(paths[0]) as own:
            own.mkdir(mode=0o700, exist_ok=True)  # the output's folder may have been emptied
            with tempfile.TemporaryDirectory(dir=own) as staging:
                temporary = tuple(Path(staging) / path.name for path in paths)
                yield temporary
                for made in Path(staging).iterdir():
                    _sync(made)
                for path in paths:  # they may have appeared in the meantime
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
    """Refuse an output folder that cannot be written, before the work for it begins.

    Parameters
    ----------
    force : bool
        Replace the content of the folder.
    check : callable, optional
        Raises if the folder contains anything that must not be replaced.

    Raises
    ------
    OnnxQatError
        The folder is not empty and ``force`` is not set, the path is not a folder, or no folder can
        be created there.
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

    If the process is killed while it replaces an earlier folder, the old folder, the new one or
    neither is there, but never a mixture.

    Parameters
    ----------
    force, check
        As for `check_folder`.

    Raises
    ------
    OnnxQatError
        As for `check_folder`; or another run is writing the folder, or writing fails.
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
                check_folder(path, force=force, check=check)  # it may have appeared in the meantime
                if path.exists():
                    path.rename(Path(staging) / "old")
                made.rename(path)
                _sync(path.parent)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}). Choose another output."
        raise OnnxQatError(message) from error


def _commit(temporary: tuple[Path, ...], folder: Path, outdated: Iterable[Path]) -> None:
    """Move written files to their destination: data, then the model, then the other files."""
    staging, model = temporary[0].parent, folder / temporary[0].name
    beside = {made.name for made in staging.iterdir()} - {made.name for made in temporary}
    # data files that exist already have the same bytes
    new = sorted(name for name in beside if not (folder / name).exists())
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
    """Move a file to its destination, and wait until this is on the disk."""
    made.replace(folder / made.name)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _data_of(model: Path) -> list[Path]:
    """Return the weight files that an existing model written by onnxqat refers to."""
    found = [path for path in model.parent.iterdir() if is_data(path, model)]
    if not found or not model.is_file() or model.stat().st_size == 0:
        return []
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return [path for path in found if text.find(os.fsencode(path.name)) >= 0]


def write_text(path: str | Path, text: str, *, force: bool = False) -> None:
    """Write ``text`` to ``path`` as UTF-8, completely or not at all."""
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
