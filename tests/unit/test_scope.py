"""What is trained where nobody says so: blocks on little data without labels, else the network."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.data import InputSpec, open_data
from onnxqat.parallel import Workers
from onnxqat.train import Config, finetune
from onnxqat.train.scope import FEW, chosen_scope
from tests.digits import calibrated_lenet

INPUT = InputSpec(name="input", shape=("N", 1, 28, 28), dtype="float32")


def arrays(count, *, labels=False):
    images = np.random.default_rng(0).normal(size=(count, 1, 28, 28)).astype(np.float32)
    return {"input": images} | ({"label": np.zeros(count, np.int64)} if labels else {})


def scope(count, *, labels=False, workers=1, own_teacher=False, **settings):
    together = Workers()
    together.size = workers
    with open_data(arrays(count, labels=labels), [INPUT]) as data:
        return chosen_scope(Config(**settings), data, together, own_teacher=own_teacher)


def test_little_data_without_labels_train_blocks_and_it_is_told():
    chosen, told = scope(FEW)

    assert chosen == ("blocks",)
    assert told.startswith(f"trains one block after the other: {FEW} samples without labels")
    assert "--scope network" in told


@pytest.mark.parametrize(
    ("count", "given"),
    [
        (FEW + 1, {}),
        (8, {"labels": True}),
        (8, {"loss": "kl"}),
        (8, {"epochs": 3}),
        (8, {"ema": 0.9}),
        (8, {"optimizer": "sgd"}),
        (8, {"own_teacher": True}),
        (8, {"workers": 2}),
    ],
)
def test_all_else_trains_the_network(count, given):
    assert scope(count, **given) == (("network",), "")


def test_what_is_asked_for_is_done():
    assert scope(8, scope=("network",)) == (("network",), "")
    assert scope(FEW + 1, scope=("blocks", "network")) == (("blocks", "network"), "")


def test_a_run_without_options_heeds_it():
    said = []
    with open_data(arrays(40), [INPUT]) as data:
        found = finetune(calibrated_lenet(data), data, config=Config(threads=1), say=said.append)

    assert found.blocks
    assert found.epochs == 0
    assert any(line.startswith("trains one block after the other: 36 samples") for line in said)
