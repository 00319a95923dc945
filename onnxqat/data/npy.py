"""Arrays in ``.npy`` files. A file may declare anything; nothing is unpickled.

A file holds all samples of an array along its first axis, and is memory-mapped; or one sample.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from onnxqat.data.arrays import ArraySource, Header, reason
from onnxqat.data.feeds import InputSpec
from onnxqat.errors import DataError
from onnxqat.files import check_readable
from onnxqat.locks import Scratch

__all__ = ["ArrayReader", "NpyPart", "open_npy", "read_header"]

MAX_HEADER = 1 << 14  # numpy accepts 10,000 bytes
MAX_EMPTY = 10**7  # samples without values, since a file can declare any number of them


def read_header(where: str, stream: IO[bytes], size: int, again: str) -> Header:
    """Return shape and dtype of an array, from the first bytes of its file.

    Parameters
    ----------
    where : str
        Name of the file, for messages.
    stream : binary file
        The file, at its beginning.
    size : int
        Size of the file in bytes.
    again : str
        Function of numpy that saves such a file, for messages.

    Raises
    ------
    DataError
        The array does not hold numbers, or its sizes contradict each other.
    ValueError
        The file is not an array.
    """
    # version 3 is only needed for structured dtypes
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    # numpy would read the whole header before checking its length, which may be 4 GB
    stream = io.BytesIO(stream.read(MAX_HEADER))
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"it has format version {version}")
    shape, _, dtype = readers[version](stream)
    if dtype.kind not in "biuf":
        what = "Python objects, which are never unpickled" if dtype.hasobject else str(dtype)
        raise DataError(f"{where} holds {what}. Save it as numbers.")
    claimed = stream.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != size:
        raise DataError(
            f"{where} claims shape {shape}, {claimed} bytes, but holds {size}. "
            f"Save it again with {again}."
        )
    if math.prod(shape) == 0 and max(shape) > MAX_EMPTY:
        raise DataError(
            f"{where} claims shape {shape}, which takes no bytes. Save it again with {again}."
        )
    return Header(shape, dtype)


def _header(path: Path) -> Header:
    check_readable(path, DataError)
    with path.open("rb") as file:
        return read_header(f"{path}:", file, path.stat().st_size, "numpy.save")


def _loaded(path: Path, *, mapped: bool) -> tuple[Header, NDArray[Any]]:
    """Return an array and its header, which is looked at first."""
    try:
        header = _header(path)
        if math.prod(header.shape) == 0:  # cannot be mapped
            return header, np.zeros(header.shape, header.dtype)
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # what a broken file raises is not documented
        raise DataError(
            f"{path}: cannot be read ({reason(error)}). Save it again with numpy.save."
        ) from error
    return header, array


class NpyPart:
    """Arrays of all samples, each in a file of its own.

    Parameters
    ----------
    name : str
        What the user called the data.
    paths : mapping of str to Path
        Files by name of the array.
    """

    def __init__(self, name: str, paths: Mapping[str, Path]) -> None:
        self.name, self.keys = name, tuple(paths)
        self._paths = paths
        self._headers: dict[str, Header] = {}

    def header(self, key: str) -> Header:
        """Return shape and dtype of an array, from its first bytes.

        Raises
        ------
        DataError
            The file cannot be read, holds no numbers, or its sizes contradict each other.
        """
        if key not in self._headers:
            self._headers[key] = _loaded(self._paths[key], mapped=True)[0]
        return self._headers[key]

    def load(self, key: str) -> NDArray[Any]:
        """Return an array memory-mapped, read-only."""
        return _loaded(self._paths[key], mapped=True)[1]


def open_npy(name: str, paths: Mapping[str, Path]) -> ArraySource:
    """Return arrays of all samples, each in a file of its own.

    Raises
    ------
    DataError
        A file cannot be read.
    """
    return ArraySource(name, [NpyPart(name, paths)], Scratch())


class ArrayReader:
    """Reads one sample from each ``.npy`` file.

    Parameters
    ----------
    spec : InputSpec or None
        The model input for the samples. If a file has its rank and a first axis of length 1, that
        axis is the batch and is removed.
    """

    decoded = False
    kind = ".npy files"
    advice = "Make them alike."

    def __init__(self, spec: InputSpec | None) -> None:
        self._rank = None if spec is None else len(spec.shape)

    def __call__(self, path: str) -> NDArray[Any]:
        """Return what the file holds.

        Raises
        ------
        DataError
            It cannot be read, or holds no numbers.
        """
        array = _loaded(Path(path), mapped=False)[1]
        batch_of_one = array.ndim == self._rank and len(array) == 1
        return array.reshape(array.shape[1:]) if batch_of_one else array

    def described(self, array: NDArray[Any]) -> str:
        """Return dtype and shape."""
        return f"{array.dtype} values of shape {array.shape}"
