"""Text as jsonl: each line is an object; a tokenizer file turns its texts into tokens.

=================  =================================================================================
``input_ids``,     of shape (N, length): the tokens, which of them are no padding, and of which text
``attention_mask``,
``token_type_ids``
``label``          the field ``label``, ``labels`` or ``y``: an integer, or the name of a class
``start_positions``,  of shape (N,), or (N, most) where a sample has several answers, -1 where there
``end_positions``  are fewer: first and last token of the answers; 0 where the text has none of it
other fields       numbers, or lists of numbers that are equally long in all samples
=================  =================================================================================

Texts are the fields that the user names, or those of `PAIRS` that are there. Answers are SQuAD's
field ``answers``, with ``text`` and ``answer_start`` (characters of the last text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxqat.data.answers import SpanColumn, Spans
from onnxqat.data.classes import class_indices
from onnxqat.data.columns import Column, ColumnSource, Unreadable, ValueColumn
from onnxqat.data.lists import read_lines, read_text
from onnxqat.data.records import Record, Records
from onnxqat.data.request import Request, Tokenization
from onnxqat.data.tokens import ANSWERS, IDS, TOKENS_MASK, TYPES, Encoder, TokenColumn
from onnxqat.errors import DataError, OptionError

__all__ = ["open_jsonl"]

PAIRS = (
    ("question", "context"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
)
LABELS = ("label", "labels", "y")
START, END = "start_positions", "end_positions"


def open_jsonl(path: Path, request: Request) -> ColumnSource:
    """Return the samples of a jsonl file.

    Raises
    ------
    DataError
        The file cannot be read, or its lines are not objects with the same fields.
    OptionError
        There are texts but no tokenizer, or the package tokenizers is not installed.
    """
    request.refuse_beside(str(path))
    lines = read_lines(path, read_text(path))
    if not lines:
        raise DataError(f"{path}: has no samples. Write one object on each line.")
    records = Records(path, lines)
    first = records[0]
    columns: dict[str, Column] = {}
    fields = _text_fields(path, first, request.text)
    if fields:
        columns |= _token_columns(records, fields, request)
    label = next((n for n in LABELS if n in first and request.spec_of(n) is None), None)
    classes = None
    if label is not None and request.classes is not None:
        columns["label"], classes = _labels(records, label, request)
    for name, value in first.items():
        if name not in (*fields, label, ANSWERS) and _is_numeric(value):
            columns.setdefault(name, ValueColumn(str(path), partial(records.array, name)))
    # an input of another name takes the tokens of text; without text, a list of numbers
    others = (n for n in columns if n != IDS and (fields or not isinstance(first.get(n), list)))
    extras = {n for n in others if n != "label" and request.spec_of(n) is None}
    unreadable = Unreadable(str(path), skip=False)
    return ColumnSource(str(path), len(lines), columns, unreadable, classes=classes, extras=extras)


def _is_numeric(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, bool | int | float)


def _text_fields(path: Path, first: Record, text: Tokenization | None) -> tuple[str, ...]:
    """Return the one or two fields with the text of a sample; none without a tokenizer."""
    if text is not None and text.fields:
        missing = [name for name in text.fields if name not in first]
        if missing:
            raise DataError(
                f"{path}: sample 0 has no field '{missing[0]}'. It has "
                f"{', '.join(map(repr, first))}. Choose from these with --text."
            )
        return text.fields
    found = next((p for p in PAIRS if all(isinstance(first.get(n), str) for n in p)), ())
    if text is not None and not found:
        raise DataError(
            f"{path}: it is not known which of its fields {', '.join(map(repr, first))} is the "
            "text. Name it, or a pair, with --text."
        )
    numbers = any(_is_numeric(value) for name, value in first.items() if name not in LABELS)
    if found and text is None and not numbers:
        raise _no_tokenizer(path, found)
    return found if text is not None else ()


def _no_tokenizer(path: Path, found: Sequence[str]) -> OptionError:
    return OptionError(
        f"{path}: its samples are text ({', '.join(map(repr, found))}). Give --tokenizer "
        "tokenizer.json, the file beside the model."
    )


def _labels(
    records: Records, name: str, request: Request
) -> tuple[Column, Mapping[str, int] | None]:
    values = [records.field(index, name) for index in range(len(records))]
    if not all(isinstance(value, str) for value in values):
        return ValueColumn(str(records.path), partial(records.array, name)), None
    assert request.classes is not None
    found = sorted(set(values))
    numbers, classes = class_indices(records.path, found, request.classes, "names")
    index = dict(zip(found, numbers, strict=True))
    array = np.array([index[value] for value in values], np.int64)
    return ValueColumn(str(records.path), lambda: array), classes


def _token_columns(
    records: Records, fields: tuple[str, ...], request: Request
) -> dict[str, Column]:
    assert request.text is not None
    spec = request.spec_of(IDS) or (request.inputs[0] if len(request.inputs) == 1 else None)
    fixed = spec.shape[1] if spec is not None and len(spec.shape) == 2 else None
    encoder = Encoder(records, fields, request.text, fixed if isinstance(fixed, int) else None)
    columns: dict[str, Column] = {
        name: TokenColumn(encoder, name) for name in (IDS, TOKENS_MASK, TYPES)
    }
    if ANSWERS in records[0]:
        spans = Spans(records, encoder)
        columns |= {START: SpanColumn(spans, 0), END: SpanColumn(spans, 1)}
    return columns
