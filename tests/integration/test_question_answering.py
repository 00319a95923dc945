"""A trained transformer that answers with two outputs, at 8 bits, by a loss of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from tests.oracles import run_ort

FAST = ("--epochs", 1, "--lr", 0.002, "--threads", 1)
MODELS = Path(__file__).parents[2] / "models"
SPANS, TRAIN, TEST = (MODELS / f"spans{end}" for end in (".onnx", "-train.npz", "-test.npz"))
# What the labels say of both ends, and what the float model says of them.
LOSS = """
<ir_version: 8, opset_import: ["" : 17]>
loss (float[N, L] start, float[N, L] end, int64[N] starts, int64[N] ends,
      float[N, L] teacher_start, float[N, L] teacher_end) => (float value)
<int64[1] positions = {1}>
{
  from_label = SoftmaxCrossEntropyLoss (start, starts)
  to_label = SoftmaxCrossEntropyLoss (end, ends)
  labelled = Add (from_label, to_label)
  log_start = LogSoftmax <axis = -1> (start)
  log_end = LogSoftmax <axis = -1> (end)
  taught_start = Softmax <axis = -1> (teacher_start)
  taught_end = Softmax <axis = -1> (teacher_end)
  a = Mul (taught_start, log_start)
  b = Mul (taught_end, log_end)
  both = Add (a, b)
  each = ReduceSum <keepdims = 0> (both, positions)
  taught = ReduceMean <keepdims = 0> (each)
  value = Sub (labelled, taught)
}
"""


def invoke(*words: Any) -> Any:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def loss_file(path: Path) -> Path:
    """Write the loss; the text format has no names with a slash."""
    loss = onnx.parser.parse_model(LOSS)
    for value in loss.graph.input:
        value.name = value.name.replace("teacher_", "teacher/")
    for node in loss.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = name.replace("teacher_", "teacher/")
    onnx.save(loss, path)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    words = ("--set", "weight.axis=none", "--threads", 1, "--data", TRAIN)
    invoke("insert", SPANS, *words, "-o", folder / "qdq.onnx")
    loss_file(folder / "loss.onnx")
    return folder


@pytest.fixture(scope="module")
def tuned(work) -> dict[str, Any]:
    """Return what training says, its losses, and the figures on unseen texts."""
    path, log = work / "tuned.onnx", work / "tuned.jsonl"
    said = train(work, path, "--log", log, "--log-every", 10, "--json")
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["event"] == "step"]
    return {**json.loads(said.stdout), "losses": losses, "unseen": unseen(path)}


def train(work, path, *words):
    loss = ("--loss", work / "loss.onnx")
    return invoke("finetune", work / "qdq.onnx", TRAIN, *loss, *FAST, "-o", path, *words)


def outputs(path: Path) -> list[np.ndarray[Any, Any]]:
    with np.load(TEST) as data:
        return run_ort(onnx.load(path), {"tokens": data["tokens"]})


def unseen(path: Path) -> dict[str, float]:
    """Return the share of texts with both ends as in float, and the loss in float64."""
    with np.load(TEST) as data:
        labels = data["starts"], data["ends"]
    found, taught = outputs(path), outputs(SPANS)
    same = [(a.argmax(1) == b.argmax(1)) for a, b in zip(found, taught, strict=True)]
    logs, wanted = ([log_softmax(x) for x in logits] for logits in (found, taught))
    terms = [
        -log[np.arange(len(log)), label].mean() - (np.exp(want) * log).sum(1).mean()
        for log, want, label in zip(logs, wanted, labels, strict=True)
    ]
    return {"agreement": float(np.mean(same[0] & same[1])), "loss": float(sum(terms))}


def log_softmax(x):
    shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_the_float_model_answers():
    with np.load(TEST) as data:
        labels = data["starts"], data["ends"]
    right = [a.argmax(1) == b for a, b in zip(outputs(SPANS), labels, strict=True)]

    assert np.mean(right[0] & right[1]) > 0.7


def test_loss_falls_and_agreement_on_unseen_texts_rises(work, tuned):
    before, after = unseen(work / "qdq.onnx"), tuned["unseen"]

    assert tuned["losses"][-1] < tuned["losses"][0]
    assert tuned["loss"]["after"] < tuned["loss"]["before"]
    assert after["loss"] < before["loss"] - 0.2
    assert before["agreement"] < 0.84  # there is something to win back
    assert after["agreement"] > before["agreement"] + 0.03


def test_a_seed_gives_the_same_bytes_again(work):
    made = []
    for i, seed in enumerate((0, 0, 1)):
        path = work / f"few{i}.onnx"
        train(work, path, "--train-samples", 200, "--seed", seed)
        made.append(path.read_bytes())

    assert made[0] == made[1] != made[2]


def test_two_outputs_are_chosen_by_the_loss(work):
    """Agreement is of the first output alone."""
    words = ("--loss", "kl", *FAST, "--json")
    said = json.loads(
        invoke("finetune", work / "qdq.onnx", TRAIN, *words, "-o", work / "kl.onnx").stdout
    )

    assert said["loss"]["after"] < 0.5 * said["loss"]["before"]
    assert unseen(work / "kl.onnx")["agreement"] > unseen(work / "qdq.onnx")["agreement"] + 0.03
