"""jsonl files, their texts as tokens by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnxqat.data import InputSpec, Tokenization, open_data
from onnxqat.errors import DataError, OptionError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "came", "the", "old", "cat", "and", "dog", "."]
IDS = {word: number for number, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def written(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def specs(length=8, names=("input_ids", "attention_mask", "token_type_ids"), dtype="int64"):
    return [InputSpec(name=name, shape=("n", length), dtype=dtype) for name in names]


def ids(text):
    return [IDS.get(word, 1) for word in text.split()]


def read(path, inputs, *arrays, **options):
    with open_data(path, inputs, **options) as data:
        wanted = {name: (name, "int64") for name in arrays}
        (batch,) = data.with_arrays(wanted).batches(100)
        return data, batch


def test_texts_and_labels(tokenizer, tmp_path):
    path = written(tmp_path, {"text": "the cat came", "label": 1}, {"text": "dog mice", "label": 0})
    _, batch = read(path, specs(6), text=Tokenization(tokenizer=tokenizer))

    first, second = [2, *ids("the cat came"), 3, 0], [2, *ids("dog"), 1, 3, 0, 0]
    assert batch.inputs["input_ids"].tolist() == [first, second]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert not batch.inputs["token_type_ids"].any()
    assert batch.labels.tolist() == [1, 0]


def test_a_model_of_one_input_gets_the_tokens(tokenizer, tmp_path):
    path = written(tmp_path, {"body": "the cat", "size": 3}, {"body": "the old cat", "size": 4})
    inputs = specs("length", names=("tokens",), dtype="int32")
    _, batch = read(path, inputs, "size", text=Tokenization(tokenizer=tokenizer, fields=("body",)))

    # as long as the longest, since neither the model nor the user says
    assert batch.inputs["tokens"].tolist() == [[2, 6, 8, 3, 0], [2, 6, 7, 8, 3]]
    assert batch.inputs["tokens"].dtype == np.int32
    assert batch.arrays["size"].tolist() == [3, 4]


def test_names_of_classes(tokenizer, tmp_path):
    path = written(tmp_path, {"text": "the", "label": "good"}, {"text": "the", "label": "bad"})
    text = Tokenization(tokenizer=tokenizer)
    data, batch = read(path, specs(), text=text, classes={"bad": 0, "good": 1})
    assert batch.labels.tolist() == [1, 0]
    assert data.classes == {"bad": 0, "good": 1}
    with pytest.raises(DataError, match="has 2 names"):
        read(path, specs(), text=text)


QUESTION, CONTEXT = "who came", "the old cat and the dog ."


def answered(*answers):
    texts = [CONTEXT[start:stop] for start, stop in answers]
    starts = [start for start, _ in answers]
    return {
        "question": QUESTION,
        "context": CONTEXT,
        "answers": {"text": texts, "answer_start": starts},
    }


def test_answers_become_positions_of_tokens(tokenizer, tmp_path):
    # [CLS] who came [SEP] the old cat and the dog . [SEP]
    records = [answered((0, 11), (8, 11)), answered((16, 23)), answered(), answered((5, 6))]
    path = written(tmp_path, *records)
    names = ("start_positions", "end_positions")
    _, batch = read(path, specs(14), *names, text=Tokenization(tokenizer=tokenizer))

    assert batch.arrays["start_positions"].tolist() == [[4, 6], [8, -1], [0, -1], [5, -1]]
    assert batch.arrays["end_positions"].tolist() == [[6, 6], [9, -1], [0, -1], [5, -1]]
    types = [0] * 4 + [1] * 8 + [0] * 2
    assert batch.inputs["token_type_ids"].tolist() == [types] * 4


def test_an_answer_that_is_cut_off_is_none(tokenizer, tmp_path):
    path = written(tmp_path, answered((0, 11)), answered((16, 23)))
    names = ("start_positions", "end_positions")
    text = Tokenization(tokenizer=tokenizer, length=10)  # ... cat and the [SEP]
    _, batch = read(path, specs("length"), *names, text=text)

    assert batch.inputs["input_ids"].shape == (2, 10)
    assert batch.arrays["start_positions"].tolist() == [4, 0]
    assert batch.arrays["end_positions"].tolist() == [6, 0]


def test_lists_of_numbers_need_no_tokenizer(tmp_path):
    path = written(tmp_path, {"x": [0.5, 1], "y": 3, "note": "a"}, {"x": [2, 3.5], "y": 4})
    _, batch = read(path, [InputSpec(name="pixels", shape=("n", 2), dtype="float32")])

    assert batch.inputs["pixels"].tolist() == [[0.5, 1], [2, 3.5]]
    assert batch.labels.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "has no samples"),
        (["[1]"], "sample 0 is not a JSON object"),
        ([answered(), "{"], "sample 1 is not a JSON object"),
        ([answered(), {}], "sample 1 has no field"),
        ([answered(), answered() | {"context": 1}], "field 'context' of sample 1 is '1'. Write"),
        ([{"body": "a"}], "it is not known which of its fields 'body' is the text"),
        ([answered() | {"answers": 3}], "'answers' of sample 0 is not in SQuAD's form"),
        ([answered() | {"answers": {"text": ["a"], "answer_start": []}}], "1 texts and 0 starts"),
        (
            [answered() | {"answers": {"text": ["x"], "answer_start": [0]}}],
            "'x' of sample 0 is not",
        ),
        (["[" * 100000], "sample 0 is not a JSON object"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tokenizer, tmp_path, records, said):
    path, names = written(tmp_path, *records), ("start_positions", "end_positions")
    with pytest.raises(DataError, match=said) as caught:
        read(path, specs(), *names, text=Tokenization(tokenizer=tokenizer))
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_tokenizer_is_said(tokenizer, tmp_path):
    path = written(tmp_path, {"text": "the cat", "label": 1})
    with pytest.raises(OptionError, match=r"its samples are text \('text'\). Give --tokenizer"):
        read(path, specs())
    (tmp_path / "bad.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match=r"bad\.json: is not a tokenizer"):
        read(path, specs(), text=Tokenization(tokenizer=tmp_path / "bad.json"))
    with pytest.raises(DataError, match="--max-tokens 9: the model takes 8 tokens"):
        read(path, specs(), text=Tokenization(tokenizer=tokenizer, length=9))
    with pytest.raises(DataError, match="has no field 'title'"):
        read(path, specs(), text=Tokenization(tokenizer=tokenizer, fields=("title",)))
    with pytest.raises(DataError, match="are 3 fields"):
        Tokenization(tokenizer=tokenizer, fields=("a", "b", "c"))


def test_lists_of_different_length_are_refused(tmp_path):
    path = written(tmp_path, {"x": [0, 1]}, {"x": [2]})
    with pytest.raises(DataError, match="field 'x' has lists of different length"):
        read(path, [InputSpec(name="x", shape=("n", 2), dtype="float32")])
