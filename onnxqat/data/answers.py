"""Answers as positions of tokens."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import Header, reason
from onnxqat.data.records import Records
from onnxqat.data.tokens import ANSWERS, Encoder
from onnxqat.errors import DataError

__all__ = ["SpanColumn", "Spans"]

MAX_ANSWERS = 256  # of a sample


class _Answers(msgspec.Struct):
    text: list[str]
    answer_start: list[int]


class Spans:
    """First and last token of each answer.

    Parameters
    ----------
    records : Records
        The samples.
    encoder : Encoder
        Of whose tokens.
    """

    def __init__(self, records: Records, encoder: Encoder) -> None:
        self.records, self._encoder = records, encoder
        self.most = max(len(self._answers(index).text) for index in range(len(records)))
        self.most = max(self.most, 1)

    def _answers(self, index: int) -> _Answers:
        where = f"{self.records.path}: '{ANSWERS}' of sample {index}"
        try:
            found = msgspec.convert(self.records.field(index, ANSWERS), _Answers)
        except msgspec.ValidationError as error:
            raise DataError(
                f"{where} is not in SQuAD's form ({reason(error)}). Write lists 'text' and "
                "'answer_start'."
            ) from error
        if len(found.text) != len(found.answer_start) or len(found.text) > MAX_ANSWERS:
            raise DataError(
                f"{where} has {len(found.text)} texts and {len(found.answer_start)} starts. Write "
                f"one text and one start for each answer, {MAX_ANSWERS} answers at most."
            )
        return found

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return an array of shape (n, most, 2)."""
        spans = np.full((len(indices), self.most, 2), -1, np.int64)
        for row, index, encoding in zip(
            spans, indices.tolist(), self._encoder.tokens(indices).encodings, strict=True
        ):
            answers = self._answers(index)
            row[0] = 0  # stays if there is no answer
            for place, (text, start) in enumerate(
                zip(answers.text, answers.answer_start, strict=True)
            ):
                self._check(index, text, start)
                row[place] = _span(encoding, start, start + len(text), len(self._encoder.fields))
        return spans

    def _check(self, index: int, text: str, start: int) -> None:
        whole = self.records.text(index, self._encoder.fields[-1])
        if not text or start < 0 or whole[start : start + len(text)] != text:
            raise DataError(
                f"{self.records.path}: the answer {text[:80]!r} of sample {index} is not at "
                f"character {start} of '{self._encoder.fields[-1]}'. Check its 'answer_start'."
            )


def _span(encoding: Any, start: int, stop: int, texts: int) -> tuple[int, int]:
    """Return the first and the last token of some characters; 0 if they were truncated."""
    held = [
        token
        for token, (text, (first, last)) in enumerate(
            zip(encoding.sequence_ids, encoding.offsets, strict=True)
        )
        if text == texts - 1 and first < stop and last > start
    ]
    if not held or encoding.offsets[held[-1]][1] < stop:
        return 0, 0
    return held[0], held[-1]


class SpanColumn:
    """First or last tokens of the answers."""

    decoded = False

    def __init__(self, spans: Spans, end: int) -> None:
        self._spans, self._end = spans, end

    def sample(self) -> Header:
        """Return shape and dtype of a sample."""
        most = self._spans.most
        return Header((most,) if most > 1 else (), np.dtype(np.int64))

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return tokens of shape (n,), or (n, most) where a sample has several answers."""
        found = self._spans.read(indices)[:, :, self._end]
        return found if self._spans.most > 1 else found[:, 0]

    def origin(self, index: int) -> str:
        """Return the file of a sample, and which of its lines it is."""
        return f"{self._spans.records.path}: sample {index}"
