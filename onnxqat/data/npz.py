"""Arrays in ``.npz`` files, memory-mapped; safe against hostile files.

Nothing is unpickled. A member is unpacked into a temporary file when its first row is read, after
its size was checked against the archive and the free space.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import ArraySource, Header, reason
from onnxqat.data.npy import read_header
from onnxqat.errors import DataError
from onnxqat.files import check_readable
from onnxqat.locks import Scratch

__all__ = ["NpzPart", "open_npz"]

# Deflate codes at most 258 bytes in 2 bits, so a member cannot grow by a larger factor.
MAX_INFLATION = 1032
CHUNK = 1 << 20


def open_npz(name: str, paths: list[Path]) -> ArraySource:
    """Return the arrays of one or several files, joined in the given order.

    Raises
    ------
    DataError
        A file cannot be read, or has other arrays than the first one.
    """
    scratch = Scratch()
    try:
        return ArraySource(name, [NpzPart(path, scratch) for path in paths], scratch)
    except BaseException:
        scratch.close()
        raise


class NpzPart:
    """One ``.npz`` file.

    Parameters
    ----------
    path : Path
        The file. It is opened for each access and not kept open.
    scratch : Scratch
        Folder to unpack members into.
    """

    def __init__(self, path: Path, scratch: Scratch) -> None:
        self.name = str(path)
        self._path, self._scratch = path, scratch
        with self._archive() as archive:
            members = archive.infolist()
        self._members = {
            member.filename.removesuffix(".npy"): member
            for member in members
            if member.filename.endswith(".npy")
        }
        self._headers: dict[str, Header] = {}
        self.keys = tuple(self._members)

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        check_readable(self._path, DataError)
        try:
            with zipfile.ZipFile(self._path) as archive:
                yield archive
        except DataError:
            raise
        except Exception as error:  # a broken archive may raise undocumented errors
            raise DataError(
                f"{self.name}: cannot be read ({reason(error)}). "
                "Save it again with numpy.savez_compressed."
            ) from error

    def header(self, key: str) -> Header:
        """Return shape and dtype of an array, from its first bytes.

        Raises
        ------
        DataError
            The array does not contain numbers, or its sizes contradict each other.
        """
        if key not in self._headers:
            member = self._members[key]
            with self._archive() as archive:
                self._check_size(key, member)
                with archive.open(member) as stream:
                    where = f"{self.name}: array {key!r}"
                    size, again = member.file_size, "numpy.savez_compressed"
                    self._headers[key] = read_header(where, stream, size, again)
        return self._headers[key]

    def _check_size(self, key: str, member: zipfile.ZipInfo) -> None:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self.name}: array {key!r} is compressed by method {member.compress_type}. "
                "Save it again with numpy.savez_compressed."
            )
        inflation = 1 if member.compress_type == zipfile.ZIP_STORED else MAX_INFLATION
        packed = min(member.compress_size, self._path.stat().st_size)
        if member.file_size > packed * inflation:
            raise DataError(
                f"{self.name}: array {key!r} claims {member.file_size} bytes, packed into "
                f"{packed}, which is impossible. Save it again with numpy.savez_compressed."
            )

    def load(self, key: str) -> NDArray[Any]:
        """Unpack an array and return it memory-mapped, read-only.

        Raises
        ------
        DataError
            The file is damaged, or there is no room to unpack it.
        """
        header, member = self.header(key), self._members[key]
        if math.prod(header.shape) == 0:  # an empty array cannot be mapped
            return np.zeros(header.shape, header.dtype)
        free = shutil.disk_usage(self._scratch.folder).free
        if member.file_size > free:
            raise DataError(
                f"{self.name}: array {key!r} needs {member.file_size} bytes in "
                f"'{self._scratch.folder.parent}', where {free} are free. "
                "Set TMPDIR to a directory with more room."
            )
        target = self._scratch.new_file()  # not the member's name, which could be any path
        with self._archive() as archive:
            with archive.open(member) as stream, target.open("xb") as file:
                shutil.copyfileobj(stream, file, CHUNK)
            array: NDArray[Any] = np.load(target, mmap_mode="r", allow_pickle=False)
        return array
