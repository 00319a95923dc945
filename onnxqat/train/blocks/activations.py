"""Tensors of many samples: in memory up to a limit, behind it in files of a temporary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import TrainingError
from onnxqat.locks import Scratch

__all__ = ["Activations", "Rows"]

Array = NDArray[Any]


class Rows:
    """One tensor: a row for each sample, or for each batch where the model is fixed to one.

    It is written once, from the first row to the last, and then read in any order.

    Attributes
    ----------
    in_memory : int
        Bytes of memory that it holds.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], path: Path | None) -> None:
        self.shape, self.dtype, self._path, self._written = shape, dtype, path, 0
        self._array: Array | None = np.empty(shape, dtype) if path is None else None
        self._file = None if path is None else path.open("wb", buffering=0)
        self.in_memory = 0 if self._array is None else self._array.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def append(self, values: Array) -> None:
        """Write the next rows.

        Raises
        ------
        TrainingError
            The disk refuses them.
        """
        start, self._written = self._written, self._written + len(values)
        if self._file is None:
            assert self._array is not None
            self._array[start : self._written] = values
            return
        data = np.ascontiguousarray(values, self.dtype).data.cast("B")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise TrainingError(
                f"{self._path}: the tensors between blocks cannot be written ({error.strerror}). "
                "Free space there, let TMPDIR name another folder, or give fewer --block-samples."
            ) from error

    def take(self, indices: NDArray[np.int64]) -> Array:
        """Return some rows, copied."""
        if self._array is None:
            assert self._file is not None
            assert self._path is not None
            self._file.close()
            self._array = np.memmap(self._path, self.dtype, "r", shape=self.shape)
        return np.array(self._array[indices])

    def remove(self) -> None:
        """Give back memory and disk."""
        self._array, self.in_memory = None, 0
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)


class Activations:
    """Makes `Rows`, in memory as long as they fit; a context manager that removes their files.

    Parameters
    ----------
    limit : int
        Bytes of memory for all rows together.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._scratch: Scratch | None = None

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def rows(self, count: int, like: Array) -> Rows:
        """Return room for ``count`` rows of the shape and dtype of ``like``."""
        shape = (count, *like.shape)
        path = None
        if self.used + count * like.nbytes > self.limit:
            self._scratch = self._scratch or Scratch()
            path = self._scratch.new_file()
        made = Rows(shape, like.dtype, path)
        self.used += made.in_memory
        return made

    def remove(self, rows: Rows) -> None:
        """Give back what rows take; nothing where that was done."""
        self.used -= rows.in_memory
        rows.remove()
