"""Columns of samples: folders and lists of files give one file or one value for each sample.

A few threads read the files of a batch. Decoders release Python's lock, so that they run at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import BrokenError, Header
from onnxqat.errors import DataError

__all__ = ["Column", "ColumnSource", "FileColumn", "Reader", "Unreadable", "ValueColumn"]

logger = logging.getLogger(__name__)

READERS = min(4, os.cpu_count() or 1)  # threads
MAX_NAMED = 1000


class Column(Protocol):
    """One array, read sample by sample."""

    decoded: bool  # whether the samples are images that are already resized and cropped

    def sample(self) -> Header:
        """Return shape and dtype of the first sample."""

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the samples at ``indices``, stacked along the first axis; a new array."""

    def origin(self, index: int) -> str:
        """Return where a sample comes from, for messages."""


class Reader(Protocol):
    """Reads the file of one sample."""

    decoded: bool
    kind: str  # what the files are, in the plural, for messages
    advice: str  # what to do if two files differ in shape, for messages

    def __call__(self, path: str) -> NDArray[Any]:
        """Return what the file holds.

        Raises
        ------
        DataError
            It cannot be read.
        """

    def described(self, array: NDArray[Any]) -> str:
        """Return the size of what a file holds, in words."""


class Unreadable:
    """What happens to samples that cannot be read: an error, or a warning and a skip.

    Parameters
    ----------
    name : str
        What the user called the data.
    skip : bool
        Log and skip them.

    Attributes
    ----------
    samples : set of int
        The samples that were skipped so far.
    """

    def __init__(self, name: str, *, skip: bool) -> None:
        self.name, self.skip = name, skip
        self.samples: set[int] = set()

    def refuse(self, errors: Mapping[int, DataError]) -> NoReturn:
        """Raise the first error; if samples may be skipped, log and record all of them."""
        if not self.skip:
            raise next(iter(errors.values()))
        for index, error in errors.items():
            if len(self.samples) < MAX_NAMED:
                logger.warning("Skipped: %s", error)
            elif len(self.samples) == MAX_NAMED:
                logger.warning("More files were skipped; they are not named.")
            self.samples.add(index)
        raise BrokenError(f"{self.name}: {len(errors)} files cannot be read.")


class ValueColumn:
    """Values in memory, read on first use.

    Parameters
    ----------
    name : str
        File of the values, for messages.
    read : callable
        Returns the array; its first axis counts samples.
    """

    decoded = False

    def __init__(self, name: str, read: Callable[[], NDArray[Any]]) -> None:
        self.name, self._read = name, read

    @cached_property
    def _values(self) -> NDArray[Any]:
        return self._read()

    def sample(self) -> Header:
        """Return shape and dtype of a sample."""
        return Header(self._values.shape[1:], self._values.dtype)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the values at ``indices``."""
        return self._values[indices]

    def origin(self, index: int) -> str:
        """Return the file of the values, and which of them it is."""
        return f"{self.name}: sample {index}"


class FileColumn:
    """One file for each sample.

    Parameters
    ----------
    name : str
        What the user called the data.
    paths : sequence of str
        The files.
    reader : Reader
        Reads a file.
    unreadable : Unreadable
        What happens to files that cannot be read.
    """

    def __init__(
        self, name: str, paths: Sequence[str], reader: Reader, unreadable: Unreadable
    ) -> None:
        self.name, self.paths = name, paths
        self.decoded = reader.decoded
        self._reader, self._unreadable = reader, unreadable
        self._first: Header | None = None

    def sample(self) -> Header:
        """Return shape and dtype of the first file that can be read."""
        if self._first is None:
            self._first = self._find_first()
        return self._first

    def _find_first(self) -> Header:
        for index in range(len(self.paths)):
            if index not in self._unreadable.samples:
                with suppress(BrokenError):
                    array = self.read(np.array([index]))[0]
                    return Header(array.shape, array.dtype)
        kind = self._reader.kind
        raise DataError(
            f"{self.name}: none of its {len(self.paths)} {kind} can be read. Check them."
        )

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return what the files hold, stacked.

        Raises
        ------
        DataError
            A file cannot be read, or differs in shape or dtype from the first of the batch.
        """
        chosen = indices.tolist()
        # a pool for this call only, so that no thread remains if an iteration is abandoned
        with ThreadPoolExecutor(READERS, thread_name_prefix="onnxqat-decode") as pool:
            found = list(pool.map(self._attempt, chosen))
        errors = {i: f for i, f in zip(chosen, found, strict=True) if isinstance(f, DataError)}
        if errors:
            self._unreadable.refuse(errors)
        arrays = [array for array in found if not isinstance(array, DataError)]
        first = Header(arrays[0].shape, arrays[0].dtype)
        for index, array in zip(chosen, arrays, strict=True):
            if (array.shape, array.dtype) != first:
                raise DataError(
                    f"{self.paths[index]}: has {self._reader.described(array)}, but another file "
                    f"of the batch has {self._reader.described(arrays[0])}. {self._reader.advice}"
                )
        return np.stack(arrays)

    def _attempt(self, index: int) -> NDArray[Any] | DataError:
        try:
            return self._reader(self.paths[index])
        except DataError as error:
            return error

    def origin(self, index: int) -> str:
        """Return the file of a sample."""
        return self.paths[index]


class ColumnSource:
    """Several columns of the same samples.

    Parameters
    ----------
    name : str
        What the user called the data.
    length : int
        Number of samples.
    columns : mapping of str to Column
        Columns by name of the array.
    unreadable : Unreadable
        The one that the columns share.
    classes : mapping of str to int, optional
        Class index by name.
    extras : set of str
        Arrays that are neither inputs nor labels, unless the user names them.
    moved : set of str
        Arrays of positions in the images.
    """

    def __init__(
        self,
        name: str,
        length: int,
        columns: Mapping[str, Column],
        unreadable: Unreadable,
        *,
        classes: Mapping[str, int] | None = None,
        extras: Set[str] = frozenset(),
        moved: Set[str] = frozenset(),
    ) -> None:
        self.name, self.keys, self.classes, self.extras = name, tuple(columns), classes, extras
        self.moved = moved
        self.decoded: Set[str] = {key for key, column in columns.items() if column.decoded}
        self.broken: Set[int] = unreadable.samples
        self._length, self._columns = length, columns

    def count(self, keys: Sequence[str]) -> int:  # noqa: ARG002 (all columns are as long)
        """Return the number of samples."""
        return self._length

    def header(self, key: str) -> Header:
        """Return shape and dtype of a whole array; samples are assumed to be like the first."""
        shape, dtype = self.sample(key)
        return Header((self._length, *shape), dtype)

    def sample(self, key: str) -> Header:
        """Return shape and dtype of the first sample."""
        return self._columns[key].sample()

    def parts(self, key: str) -> list[NDArray[Any]]:
        """Return a whole array."""
        return [self.read(key, np.arange(self._length))]

    def read(self, key: str, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the samples at ``indices``, stacked.

        Raises
        ------
        DataError
            One cannot be read, or they differ in shape.
        """
        return self._columns[key].read(indices)

    def origin(self, key: str, index: int) -> str:
        """Return the file of a sample."""
        return f"{self._columns[key].origin(index)}: array {key!r}"

    def close(self) -> None:
        """Do nothing: no file is kept open."""
