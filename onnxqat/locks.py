"""Folders that belong to a running process: no other takes them, and they go when it is dead.

Whoever works in such a folder holds the lock on a file in it, which the kernel releases however
the process ends. A lock that can be taken says that the owner is gone, so that the next run
removes what a killed one left, and never what another one is using.
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
LOCK = "lock"  # the file in the folder
NOTE = ".data"  # suffix of others, see `noted_data`
# file systems that keep no locks, some network ones for instance
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

_claims: dict[Path, Path] = {}  # outputs that this process writes, and the folder of each


class Scratch:
    """A temporary folder that is removed on `close`, with its owner, at exit, or by the next run.

    Attributes
    ----------
    folder : Path
        Where it is.
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
        """Return a path not handed out before."""
        self._files += 1
        return self.folder / f"{self._files}.npy"

    def close(self) -> None:
        """Remove the folder and what is in it."""
        self._remove()

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def claimed(path: str | Path) -> Iterator[Path]:
    """Keep other runs off an output; yield a folder beside it, to make it in.

    Within a claim of this process the same output can be claimed again.

    Raises
    ------
    OnnxQatError
        Another run writes it, or nothing can be written there.
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
            f"{path}: another run is writing it. Wait for its end, or choose another output."
        ) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            message = f"{path}: cannot be written ({error.strerror}). Choose another output."
            raise OnnxQatError(message) from error
        logger.warning("%s: its file system keeps no locks. Start no second run on it.", path)
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
        It is an output, or the data of a model that is one.
    """
    path = Path(path)
    for claim in _claims:
        beside = _key(path).parent == claim.parent
        if same_file(path, claim) or (beside and is_data(path, claim)):
            raise OnnxQatError(
                f"{path}: is read, and would be replaced by the output '{claim.name}'. Choose "
                "another output."
            )


def is_data(path: Path, model: Path) -> bool:
    """Return whether the name of a file is that of weights which we wrote beside a model."""
    middle = path.name.removeprefix(f"{model.name}.").removesuffix(".data")
    return path.name == f"{model.name}.{middle}.data" and len(middle) == 16


@contextmanager
def noted_data(model: Path, new: Iterable[str], old: Iterable[str]) -> Iterator[None]:
    """Let the next run finish what a process that is killed in this block began with data.

    Those of the new model go again where it was not moved yet, and those of the old one where it
    was.

    Parameters
    ----------
    model : Path
        Still in a folder within that of `claimed`; the block moves it.
    new, old : iterable of str
        Names of data, beside the output.
    """
    note = model.parent.with_suffix(NOTE)
    names = (model.name, *new, "", *old)
    note.write_bytes(os.fsencode("\0".join(names)))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _settle_data(folder: Path) -> None:
    """Remove the data that a killed process would have removed, or not left alone."""
    for note in folder.glob(f"*{NOTE}"):
        model, *names = os.fsdecode(note.read_bytes()).split("\0")
        if "" not in names:  # killed while it was written, before anything was moved
            continue
        new, old = names[: names.index("")], names[names.index("") + 1 :]
        for name in new if (note.with_suffix("") / model).exists() else old:
            if is_data(Path(name), Path(model)):
                (folder.parent / name).unlink(missing_ok=True)


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, or would."""
    if _key(one) == _key(other) or one.resolve() == other.resolve():
        return True
    with suppress(OSError):  # one of them is not there
        return one.samefile(other)
    return False


def _key(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _lock(folder: Path) -> int:
    """Make a folder if need be, and lock it; return the handle that holds the lock.

    Raises
    ------
    BlockingIOError
        Another process holds it.
    OSError
        There is no room for it, or the file system keeps no locks.
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
    """Lock the file in a folder; return None where its owner removed it meanwhile."""
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
    """Remove a folder that this process holds, the lock last, and let go of it."""
    with suppress(OSError):
        for entry in [e for e in os.scandir(folder) if e.name != LOCK]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()  # fails where another process has a lock in it already
    if handle is not None:
        os.close(handle)


def _remove_orphans(parent: Path, prefix: str) -> None:
    """Remove what killed processes of this user left in a folder."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # its owner lives, or nobody can tell
                    _remove_orphan(Path(entry.path))


def _remove_orphan(folder: Path) -> None:
    if folder.lstat().st_uid != os.geteuid():
        return
    if not any(folder.iterdir()):  # killed before it had a lock
        folder.rmdir()
        return
    handle = _take(folder)
    if handle is not None:
        _settle_data(folder)
        _release(folder, handle)
