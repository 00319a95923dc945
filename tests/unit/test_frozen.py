"""Parameters that the user freezes: they get no gradient, and the others get the same."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnxqat.train import Config, finetune
from onnxqat.train.engine import StepSession, step_graph
from onnxqat.train.form import training_form
from onnxqat.train.losses import LABELS, read_loss
from tests.digits import calibrated_lenet, training_digits
from tests.networks import convnet, quantized, samples

LOSS = read_loss("cross-entropy")


@pytest.fixture(scope="module")
def form():
    _, qdq = quantized(convnet(), "onnxruntime-cpu", ("weight.axis=none",))
    return training_form(qdq)


def gradients(form):
    feeds = {"input": samples(convnet(), 8), LABELS: np.arange(8) % 5}
    session = StepSession(form, LOSS, batch_size=8, threads=1)
    loss = session.run(feeds)
    return loss, session.gradients.views


def backward(form) -> onnx.GraphProto:
    graph = step_graph(form, LOSS, batch_size=8).model.graph
    return [node for node in graph.node if node.name.startswith("gradient/")]


@pytest.mark.parametrize("frozen", ["weights", "scales", "all but the last weight", "all"])
def test_the_other_gradients_stay_the_same(form, frozen):
    *_, last = form.weights
    names = {
        "weights": set(form.weights),
        "scales": form.learned - set(form.weights),
        "all but the last weight": form.learned - {last},
        "all": form.learned,
    }[frozen]
    loss, expected = gradients(form)
    found_loss, found = gradients(replace(form, frozen=frozenset(names)))

    assert found_loss == loss
    assert found.keys() == expected.keys() | names
    for name, gradient in found.items():
        right = np.zeros_like(gradient) if name in names else expected[name]
        np.testing.assert_array_equal(gradient, right, err_msg=name)


def test_nothing_is_computed_for_frozen_parameters(form):
    last = list(form.weights)[-1]
    few = backward(replace(form, frozen=form.learned - {last}))

    assert not backward(replace(form, frozen=form.learned))
    assert 0 < 4 * len(few) < len(backward(form))
    assert not any("Conv" in node.op_type for node in few)


def test_finetune_freezes_what_the_groups_freeze(monkeypatch):
    seen = []
    training = importlib.import_module("onnxqat.train.finetune")
    opened = training.open_descent

    def spied(form, *others, **named):
        seen.append(form)
        return opened(form, *others, **named)

    monkeypatch.setattr(training, "open_descent", spied)
    groups = ("weight.freeze=true", "bias.freeze_from=3", "scale.freeze=false")
    config = Config(epochs=1, batch_size=16, scope=("network",), groups=groups, threads=1)
    with training_digits(64) as data:
        finetune(calibrated_lenet(data), data, config=config)

    assert seen[0].frozen == {n for n, v in seen[0].weights.items() if v.ndim > 1}
