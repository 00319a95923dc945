"""Store tensors of many samples in memory up to a limit, and the others in temporary files."""

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
    """One tensor with a row for each sample, or for each batch if the model's batch is fixed.

    The rows are written once, in order, and can then be read in any order.

    Attributes
    ----------
    in_memory : int
        Bytes of memory in use.
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
            The rows cannot be written to the disk.
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
                "Free space there, set TMPDIR to another folder, or give fewer --block-samples."
            ) from error

    def take(self, indices: NDArray[np.int64]) -> Array:
        """Return a copy of some rows."""
        if self._array is None:
            assert self._file is not None
            assert self._path is not None
            self._file.close()
            self._array = np.memmap(self._path, self.dtype, "r", shape=self.shape)
        return np.array(self._array[indices])

    def remove(self) -> None:
        """Free memory and disk space."""
        self._array, self.in_memory = None, 0
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)


class Activations:
    """Creates `Rows`, in memory if they fit; a context manager that removes their files.

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
        """Free the memory and disk space of rows, if that was not done before."""
        self.used -= rows.in_memory
        rows.remove()
