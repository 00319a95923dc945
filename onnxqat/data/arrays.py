"""Named arrays of samples: the common interface of all kinds of data.

A source has arrays by name, with one sample per index of the first axis, and reads the requested
rows. `ArraySource` joins the arrays of several parts (files) without copying them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import DataError
from onnxqat.locks import Scratch

__all__ = [
    "ArraySource",
    "BrokenError",
    "Header",
    "MemoryPart",
    "Part",
    "Source",
    "names",
    "reason",
]


class Header(NamedTuple):
    """Shape and dtype of an array, or of one sample of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class BrokenError(DataError):
    """Samples cannot be read, and the user wants to skip such samples."""


class Part(Protocol):
    """Arrays that are stored together, for instance in one file."""

    name: str
    keys: tuple[str, ...]

    def header(self, key: str) -> Header:
        """Return shape and dtype of a whole array, without reading it."""

    def load(self, key: str) -> NDArray[Any]:
        """Return the array; it may be memory-mapped."""


class Source(Protocol):
    """Arrays by name with a common number of samples."""

    name: str
    keys: tuple[str, ...]
    classes: Mapping[str, int] | None
    broken: Set[int]  # samples that turned out to be unreadable, and are skipped
    decoded: Set[str]  # arrays of decoded images: NHWC, resized and cropped already
    extras: Set[str]  # arrays that are neither inputs nor labels, unless the user names them
    moved: Set[str]  # arrays of positions in the images, which augmentation moves too

    def count(self, keys: Sequence[str]) -> int:
        """Check the arrays that will be read, and return the number of samples."""

    def header(self, key: str) -> Header:
        """Return shape and dtype of a whole array; with several files, of the first one's."""

    def sample(self, key: str) -> Header:
        """Return shape and dtype of the first sample."""

    def parts(self, key: str) -> list[NDArray[Any]]:
        """Return a whole array, one part for each file."""

    def read(self, key: str, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the samples at ``indices``, stacked along the first axis; a new array.

        Raises
        ------
        BrokenError
            Some samples could not be read, and were added to ``broken``. Read without them.
        """

    def origin(self, key: str, index: int) -> str:
        """Return where a sample comes from, for messages."""

    def close(self) -> None:
        """Remove temporary files."""


class MemoryPart:
    """Arrays in memory, or memory-mapped arrays."""

    def __init__(self, name: str, arrays: dict[str, NDArray[Any]]) -> None:
        self.name = name
        self.keys = tuple(arrays)
        self._arrays = arrays

    def header(self, key: str) -> Header:
        """Return shape and dtype of a whole array."""
        return Header(self._arrays[key].shape, self._arrays[key].dtype)

    def load(self, key: str) -> NDArray[Any]:
        """Return the array itself."""
        return self._arrays[key]


class ArraySource:
    """The arrays of several parts, joined along the first axis.

    Parameters
    ----------
    name : str
        Name of the data, for messages.
    parts : sequence of Part
        The parts, at least one.
    scratch : Scratch
        Folder of the parts' temporary files; closed with the source.

    Raises
    ------
    DataError
        A part has other arrays than the first one.
    """

    classes: Mapping[str, int] | None = None
    broken: Set[int] = frozenset()
    decoded: Set[str] = frozenset()
    extras: Set[str] = frozenset()
    moved: Set[str] = frozenset()

    def __init__(self, name: str, parts: Sequence[Part], scratch: Scratch) -> None:
        self.name, self.keys = name, parts[0].keys
        self._parts, self._scratch = parts, scratch
        self._loaded: dict[tuple[int, str], NDArray[Any]] = {}
        self._lock = threading.Lock()
        self._closed = False
        for part in parts:
            if set(part.keys) != set(self.keys):
                raise DataError(
                    f"{part.name}: has the arrays {names(part.keys)}, but '{parts[0].name}' has "
                    f"{names(self.keys)}. Give all files the same arrays."
                )

    def count(self, keys: Sequence[str]) -> int:
        """Return the number of samples of all parts.

        Raises
        ------
        DataError
            An array has no samples axis, or lengths, shapes or dtypes differ.
        """
        lengths = []
        for part in self._parts:
            length, first = None, keys[0]
            for key in keys:
                header = self._checked(part, key)
                if length not in (None, header.shape[0]):
                    raise DataError(
                        f"{part.name}: array {key!r} has {header.shape[0]} samples, array "
                        f"{first!r} has {length}. Store one row per sample in each array."
                    )
                length = header.shape[0]
            lengths.append(length or 0)
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return int(self._starts[-1])

    def _checked(self, part: Part, key: str) -> Header:
        header = part.header(key)
        if not header.shape:
            raise DataError(
                f"{part.name}: array {key!r} is a single number. "
                "Store samples along its first axis."
            )
        expected = self._parts[0].header(key)
        if (header.shape[1:], header.dtype) != (expected.shape[1:], expected.dtype):
            raise DataError(
                f"{part.name}: samples of array {key!r} are {header.dtype} of shape "
                f"{header.shape[1:]}, but in '{self._parts[0].name}' {expected.dtype} of shape "
                f"{expected.shape[1:]}. Store the same dtype and shape in all files."
            )
        return header

    def header(self, key: str) -> Header:
        """Return shape and dtype of the array in the first part."""
        return self._parts[0].header(key)

    def parts(self, key: str) -> list[NDArray[Any]]:
        """Return the array of each part."""
        return [self._load(number, key) for number in range(len(self._parts))]

    def sample(self, key: str) -> Header:
        """Return shape and dtype of one sample."""
        header = self._parts[0].header(key)
        return Header(header.shape[1:], header.dtype)

    def read(self, key: str, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the samples at ``indices``, in that order; only those rows are read."""
        shape, dtype = self.sample(key)
        rows = np.empty((len(indices), *shape), dtype)
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            array = self._load(int(owner), key)
            rows[chosen] = array[indices[chosen] - self._starts[owner]]
        return rows

    def _load(self, owner: int, key: str) -> NDArray[Any]:
        with self._lock:  # a training and a validation iterator may read at the same time
            if self._closed:
                raise ValueError(f"{self.name}: read after close")
            if (owner, key) not in self._loaded:
                self._loaded[owner, key] = self._parts[owner].load(key)
            return self._loaded[owner, key]

    def origin(self, key: str, index: int) -> str:
        """Return file, array and row of a sample."""
        owner = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[owner])
        return f"{self._parts[owner].name}: sample {row} of array {key!r}"

    def close(self) -> None:
        """Release the arrays and remove temporary files."""
        with self._lock:
            self._closed = True
            self._loaded.clear()
            self._scratch.close()


def names(keys: Sequence[str]) -> str:
    """Return the names, quoted and joined, for messages."""
    return ", ".join(repr(key) for key in keys) or "none"


def reason(error: BaseException) -> str:
    """Return the message of an exception, on one line of bounded length."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split())
    return (text[:200] or type(error).__name__).rstrip(".")
