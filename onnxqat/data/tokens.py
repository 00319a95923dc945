"""Texts as tokens, by the package tokenizers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import Header, reason
from onnxqat.data.records import Records
from onnxqat.data.request import Tokenization
from onnxqat.errors import DataError, OptionError
from onnxqat.files import check_readable

__all__ = ["ANSWERS", "IDS", "TOKENS_MASK", "TYPES", "Encoder", "TokenColumn"]

IDS, TOKENS_MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
ANSWERS = "answers"  # field; with it, only the second text of a pair is truncated
LONGEST = 512  # tokens, if neither the model nor the user sets a length
MAX_BYTES = 2**27  # of a tokenizer file
PADDING = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some samples, by array, and the encodings, which have their offsets."""

    arrays: dict[str, NDArray[np.int64]]
    encodings: list[Any]


class Encoder:
    """Encodes texts; keeps the last batch, since several arrays are read from it.

    Parameters
    ----------
    records : Records
        The samples.
    fields : tuple of str
        The fields with the text, one or two.
    text : Tokenization
        Tokenizer, and number of tokens.
    fixed : int or None
        Number of tokens that the model takes, if it is fixed.
    """

    def __init__(
        self, records: Records, fields: tuple[str, ...], text: Tokenization, fixed: int | None
    ) -> None:
        self.records, self.fields = records, fields
        self._tokenizer = _loaded(Path(text.tokenizer))
        self._lock = threading.Lock()
        self._kept: tuple[bytes, Tokens] | None = None
        if fixed is not None and text.length not in (None, fixed):
            raise DataError(
                f"--max-tokens {text.length}: the model takes {fixed} tokens. Leave it out."
            )
        self.length = fixed or text.length or self._longest()
        strategy = "only_second" if len(fields) == 2 and ANSWERS in records[0] else "longest_first"
        self._guarded(
            partial(self._tokenizer.enable_truncation, max_length=self.length, strategy=strategy)
        )
        pad = next((p for p in PADDING if self._tokenizer.token_to_id(p) is not None), None)
        given = self._tokenizer.padding or {}
        self._tokenizer.enable_padding(
            length=self.length,
            pad_id=given.get("pad_id", self._tokenizer.token_to_id(pad) if pad else 0),
            pad_token=given.get("pad_token", pad or "[PAD]"),
            direction=given.get("direction", "right"),
        )

    def _longest(self) -> int:
        """Return the length of the longest sample, at most 512."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        count = len(self.records)
        parts = (range(start, min(start + 256, count)) for start in range(0, count, 256))
        found = max(len(one.ids) for part in parts for one in self._encoded(list(part)))
        return max(min(found, LONGEST), 1)

    def _encoded(self, indices: Sequence[int]) -> list[Any]:
        texts = [tuple(self.records.text(i, name) for name in self.fields) for i in indices]
        given = texts if len(self.fields) == 2 else [one for (one,) in texts]
        return list(self._guarded(partial(self._tokenizer.encode_batch, given)))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the package is not an Exception
            raise DataError(
                f"{self.records.path}: the tokenizer fails on its texts ({reason(error)}). Check "
                "that the tokenizer belongs to the model, and check --max-tokens."
            ) from error

    def tokens(self, indices: NDArray[np.int64]) -> Tokens:
        """Return the tokens of the samples at ``indices``."""
        with self._lock:
            key = indices.tobytes()
            if self._kept is None or self._kept[0] != key:
                found = self._encoded(indices.tolist())
                arrays = {
                    IDS: np.array([one.ids for one in found], np.int64),
                    TOKENS_MASK: np.array([one.attention_mask for one in found], np.int64),
                    TYPES: np.array([one.type_ids for one in found], np.int64),
                }
                self._kept = key, Tokens(arrays, found)
            return self._kept[1]


def _loaded(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise OptionError(
            "--tokenizer: needs the package tokenizers. Run pip install 'onnxqat[text]'."
        ) from error
    check_readable(path, DataError)
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: has more than {MAX_BYTES} bytes. Give a tokenizer file.")
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the package is not an Exception
        raise DataError(
            f"{path}: is not a tokenizer ({reason(error)}). Give the tokenizer.json of the package "
            "tokenizers."
        ) from error


class TokenColumn:
    """One array of the tokens."""

    decoded = False

    def __init__(self, encoder: Encoder, name: str) -> None:
        self._encoder, self._name = encoder, name

    def sample(self) -> Header:
        """Return shape and dtype of a sample."""
        return Header((self._encoder.length,), np.dtype(np.int64))

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return an array of shape (n, length)."""
        return self._encoder.tokens(indices).arrays[self._name].copy()

    def origin(self, index: int) -> str:
        """Return the file of a sample, and which of its lines it is."""
        return f"{self._encoder.records.path}: sample {index}"
