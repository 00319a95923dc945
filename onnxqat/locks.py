"""Temporary folders that belong to a running process, and are removed after it has ended.

The process that uses such a folder holds a lock on a file in it. The kernel releases the lock
however the process ends. If a run can take the lock, the owner has ended, and the run removes the
folder; folders in use are never removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onnxqat.errors import OnnxQatError

__all__ = ["Scratch", "claimed", "is_data", "noted_data", "refuse_claimed", "same_file"]

logger = logging.getLogger(__name__)

OUTPUTS, TEMPORARY = ".onnxqat-", "onnxqat-"  # prefixes: beside outputs, and for temporary files
LOCK = "lock"  # name of the locked file in the folder
NOTE = ".data"  # suffix of the notes of `noted_data`
# errors of file systems without locks, such as some network file systems
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

_claims: dict[Path, Path] = {}  # the outputs of this process, and the folder of each


class Scratch:
    """A temporary folder, removed by `close`, with this object, at exit, or by the next run.

    Attributes
    ----------
    folder : Path
        Its path.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _remove_orphans(parent, TEMPORARY)
        self.folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        handle = None
        with suppress(OSError):  # only so that others know whether it is used
            handle = _lock(self.folder)
        self._files = 0
        # not TemporaryDirectory: it warns when nobody closed it
        self._remove = weakref.finalize(self, _release, self.folder, handle)

    def new_file(self) -> Path:
        """Return a path in the folder that was not returned before."""
        self._files += 1
        return self.folder / f"{self._files}.npy"

    def close(self) -> None:
        """Remove the folder with its content."""
        self._remove()

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def claimed(path: str | Path) -> Iterator[Path]:
    """Reserve an output for this run; yield a folder beside it in which to write it.

    The process that holds a claim can claim the same output again.

    Raises
    ------
    OnnxQatError
        Another run is writing the output, or nothing can be written there.
    """
    path = Path(path)
    key = _key(path)
    if key in _claims:
        yield _claims[key]
        return
    handle: int | None = None
    name = hashlib.blake2b(os.fsencode(key.name), digest_size=8).hexdigest()
    folder = key.parent / f"{OUTPUTS}{name}"
    _remove_orphans(key.parent, OUTPUTS)
    try:
        handle = _lock(folder)
    except BlockingIOError as error:
        raise OnnxQatError(
            f"{path}: another run is writing it. Wait until it ends, or choose another output."
        ) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            message = f"{path}: cannot be written ({error.strerror}). Choose another output."
            raise OnnxQatError(message) from error
        logger.warning(
            "%s: its file system does not support locks. Do not start a second run with the same "
            "output.",
            path,
        )
        folder, handle = Path(tempfile.mkdtemp(prefix=OUTPUTS, dir=key.parent)), None
    _claims[key] = folder
    try:
        yield folder
    finally:
        del _claims[key]
        _release(folder, handle)


def refuse_claimed(path: str | Path) -> None:
    """Refuse to read a file that this run is going to replace.

    Raises
    ------
    OnnxQatError
        The file is an output of this run, or belongs to the data of one.
    """
    path = Path(path)
    for claim in _claims:
        beside = _key(path).parent == claim.parent
        if same_file(path, claim) or (beside and is_data(path, claim)):
            raise OnnxQatError(
                f"{path}: is an input, and the output '{claim.name}' would replace it. Choose "
                "another output."
            )


def is_data(path: Path, model: Path) -> bool:
    """Return whether a file name is one that onnxqat gives the external data of a model."""
    middle = path.name.removeprefix(f"{model.name}.").removesuffix(".data")
    return path.name == f"{model.name}.{middle}.data" and len(middle) == 16


@contextmanager
def noted_data(model: Path, new: Iterable[str], old: Iterable[str]) -> Iterator[None]:
    """Write a note with which the next run can clean up if this process is killed in the block.

    If the model was not moved yet, the next run removes the new data; otherwise the old data.

    Parameters
    ----------
    model : Path
        The model, in a folder inside that of `claimed`; the block moves it.
    new, old : iterable of str
        Names of data files beside the output.
    """
    note = model.parent.with_suffix(NOTE)
    names = (model.name, *new, "", *old)
    note.write_bytes(os.fsencode("\0".join(names)))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _settle_data(folder: Path) -> None:
    """Remove the data files that a killed process left without their model, see `noted_data`."""
    for note in folder.glob(f"*{NOTE}"):
        model, *names = os.fsdecode(note.read_bytes()).split("\0")
        if "" not in names:  # killed while writing the note, before anything was moved
            continue
        new, old = names[: names.index("")], names[names.index("") + 1 :]
        for name in new if (note.with_suffix("") / model).exists() else old:
            if is_data(Path(name), Path(model)):
                (folder.parent / name).unlink(missing_ok=True)


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file, even if it does not exist yet."""
    if _key(one) == _key(other) or one.resolve() == other.resolve():
        return True
    with suppress(OSError):  # one of them does not exist
        return one.samefile(other)
    return False


def _key(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _lock(folder: Path) -> int:
    """Create a folder if necessary, and lock it; return the handle that holds the lock.

    Raises
    ------
    BlockingIOError
        Another process holds the lock.
    OSError
        The folder cannot be created, or the file system does not support locks.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            handle = _take(folder, os.O_CREAT)
        except FileNotFoundError:  # the last owner has just removed the folder
            continue
        if handle is not None:
            return handle


def _take(folder: Path, flag: int = 0) -> int | None:
    """Lock the file in a folder; return None if its owner removed it in the meantime."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flag, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK)):
                return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _release(folder: Path, handle: int | None) -> None:
    """Remove a folder that this process has locked, its lock file last, and release the lock."""
    with suppress(OSError):
        for entry in [e for e in os.scandir(folder) if e.name != LOCK]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()  # fails if another process has already created a lock file in it
    if handle is not None:
        os.close(handle)


def _remove_orphans(parent: Path, prefix: str) -> None:
    """Remove the folders that killed processes of this user left in a folder."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # its owner is running, or this cannot be found out
                    _remove_orphan(Path(entry.path))


def _remove_orphan(folder: Path) -> None:
    if folder.lstat().st_uid != os.geteuid():
        return
    if not any(folder.iterdir()):  # its owner was killed before it created the lock file
        folder.rmdir()
        return
    handle = _take(folder)
    if handle is not None:
        _settle_data(folder)
        _release(folder, handle)
