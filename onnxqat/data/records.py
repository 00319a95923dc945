"""The objects of a jsonl file, one a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import reason
from onnxqat.errors import DataError

__all__ = ["Record", "Records"]

Record: TypeAlias = dict[str, Any]


class Records:
    """The objects of a file, decoded on use.

    Parameters
    ----------
    path : Path
        The file.
    lines : sequence of str
        Its lines.
    """

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.path, self._lines = path, lines
        self._decode = msgspec.json.Decoder(dict[str, Any]).decode

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        try:
            return self._decode(self._lines[index])
        except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
            raise DataError(
                f"{self.path}: sample {index} is not a JSON object ({reason(error)}). Write one "
                "object on each line."
            ) from error

    def field(self, index: int, name: str) -> Any:
        """Return a field of one object."""
        record = self[index]
        if name not in record:
            raise DataError(
                f"{self.path}: sample {index} has no field '{name}'. Give each line the same "
                "fields."
            )
        return record[name]

    def text(self, index: int, name: str) -> str:
        """Return a field that is text."""
        value = self.field(index, name)
        if not isinstance(value, str):
            raise DataError(
                f"{self.path}: field '{name}' of sample {index} is {str(value)[:80]!r}. Write text."
            )
        return value

    def array(self, name: str) -> NDArray[Any]:
        """Return a field of numbers of all objects."""
        values = [self.field(index, name) for index in range(len(self))]
        try:
            array = np.array(values)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"{self.path}: field '{name}' has lists of different length. Make them "
                "equally long."
            ) from error
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"{self.path}: field '{name}' holds {array.dtype} in some samples. Write numbers."
            )
        return array
