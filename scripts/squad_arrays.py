"""Write the questions of a SQuAD file as arrays for a BERT that was exported to ONNX.

    pip install 'onnxqat[text]'
    python scripts/squad_arrays.py train-v1.1.json --tokenizer tokenizer.json -o train.npz
    python scripts/squad_arrays.py dev-v1.1.json --tokenizer tokenizer.json -o dev.npz

The tokenizer file is that of the model, as Hugging Face's tokenizers writes it. Each sample is a
question and a part of its text, ``[CLS] question [SEP] text [SEP]``, padded to LENGTH tokens. A
text that is too long is cut into parts that overlap by STRIDE tokens; parts that do not hold an
answer are left out, and so are questions without an answer (SQuAD 2.0).

================  =================================================================================
array             what it holds, int64
================  =================================================================================
input_ids         (N, LENGTH): tokens
attention_mask    (N, LENGTH): 1, and 0 where a sample is padded
token_type_ids    (N, LENGTH): 1 for the text and the mark behind it
start, end        (N,): the first and the last token of the first answer, to learn from
starts, ends      (N, answers): those of all answers, to measure by; -1 where there are fewer
================  =================================================================================

Names that the model's inputs do not have are given in the job, as in
``input = ["ids=input_ids", "mask=attention_mask"]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

LENGTH, STRIDE = 384, 128
PADDING = ("[PAD]", "<pad>")  # BERT's, RoBERTa's
TEXT = 1  # the question is 0


class Question(NamedTuple):
    """A question, its text, and where in it each answer begins and ends, in characters."""

    question: str
    text: str
    answers: list[tuple[int, int]]


def questions(path: Path) -> Iterator[Question]:
    """Yield the questions of a SQuAD file that have an answer."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for one in paragraph["qas"]:
                spans = [(a["answer_start"], a["answer_start"] + len(a["text"]))
                         for a in one["answers"]]  # fmt: skip
                if spans:
                    yield Question(one["question"].strip(), paragraph["context"], spans)


def configured(path: Path, length: int, stride: int) -> Tokenizer:
    """Return the tokenizer, told to cut long texts and to pad short ones."""
    tokenizer = Tokenizer.from_file(str(path))
    found = [(tokenizer.token_to_id(name), name) for name in PADDING]
    number, name = next((pair for pair in found if pair[0] is not None), (0, PADDING[0]))
    tokenizer.enable_padding(length=length, pad_id=number, pad_token=name)
    tokenizer.enable_truncation(length, stride=stride, strategy="only_second")
    return tokenizer


def tokens_of(part: Encoding, span: tuple[int, int]) -> tuple[int, int] | None:
    """Return the first and the last token of an answer; None where the part does not hold it."""
    first = part.char_to_token(span[0], TEXT)
    last = part.char_to_token(span[1] - 1, TEXT)
    return None if first is None or last is None else (first, last)


def samples(tokenizer: Tokenizer, question: Question) -> Iterator[dict[str, Any]]:
    """Yield the arrays of each part of a question's text that holds an answer."""
    whole = tokenizer.encode(question.question, question.text)
    for part in (whole, *whole.overflowing):
        spans = [found for span in question.answers if (found := tokens_of(part, span))]
        if spans:
            yield {
                "input_ids": part.ids,
                "attention_mask": part.attention_mask,
                "token_type_ids": part.type_ids,
                "spans": list(dict.fromkeys(spans)),
            }


def arrays(found: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the samples as arrays."""
    most = max(len(one["spans"]) for one in found)
    spans = np.full((len(found), most, 2), -1, np.int64)
    for row, one in zip(spans, found, strict=True):
        row[: len(one["spans"])] = one["spans"]
    names = ("input_ids", "attention_mask", "token_type_ids")
    tokens = {name: np.array([one[name] for one in found], np.int64) for name in names}
    ends = {"starts": spans[..., 0], "ends": spans[..., 1]}
    return tokens | ends | {"start": spans[:, 0, 0], "end": spans[:, 0, 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("squad", type=Path, help="a .json file of SQuAD 1.1 or 2.0")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's tokenizer.json")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="tokens in a part (default: %(default)s)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=STRIDE,
        help="tokens by which parts overlap (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, help="number of questions, drawn at random (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random choice (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="an .npz file")
    given = parser.parse_args()
    found = list(questions(given.squad))
    if given.samples is not None and given.samples < len(found):
        rng = np.random.default_rng(given.seed)
        found = [found[i] for i in np.sort(rng.permutation(len(found))[: given.samples])]
    tokenizer = configured(given.tokenizer, given.length, given.stride)
    made = [one for question in found for one in samples(tokenizer, question)]
    if not made:
        raise SystemExit(f"{given.squad}: no part of a text holds an answer.")
    np.savez_compressed(given.output, **arrays(made))
    print(f"{given.output}: {len(made)} parts of {len(found)} questions")


if __name__ == "__main__":
    main()
