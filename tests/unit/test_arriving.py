"""Data in the range of training and outside of it, against statistics that numpy measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxqat.calibration import calibrate, placeholder_params, unlike_training
from onnxqat.data import DataSet, Preprocessing, open_data
from onnxqat.model import Model
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.preparation.statistics import KEY, statistics_of
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from onnxqat.settings import input_specs
from tests.normalized import IMAGES, MEAN, SCALE, graph, network
from tests.oracles import run_ort


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Any]:
    np.savez(tmp_path / "images.npz", images=IMAGES.astype(np.float32))
    opened: list[DataSet] = []

    def open_with(model: Model, **options: Any) -> DataSet:
        given = Preprocessing(**options)
        opened.append(open_data(tmp_path / "images.npz", input_specs(model), preprocessing=given))
        return opened[-1]

    yield open_with
    for data in opened:
        data.close()


RIGHT = {"mean": MEAN, "scale": SCALE}
WRONG = [
    {},
    {"mean": MEAN},
    {"scale": SCALE},
    {"scale": (1 / 255,)},
    {"mean": MEAN, "scale": tuple(255 * s for s in SCALE)},
    {"mean": MEAN, "scale": tuple(s / 255 for s in SCALE)},
]


def quantized(floats: Model) -> Model:
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [{"x": np.zeros((1, 3, 8, 8), np.float32)}])


@pytest.mark.parametrize("kind", [{}, {"between": "Relu"}, {"first": False}])
def test_wrong_settings_are_seen_and_right_ones_are_not(
    kind: Any, images: Any, tmp_path: Path
) -> None:
    floats = network(**kind)
    quantized(prepare(floats)).save(tmp_path / "q.onnx")
    for model in (floats, prepare(floats), load_model(tmp_path / "q.onnx")):
        assert unlike_training(model, images(model, **RIGHT)) is None
        for wrong in WRONG:
            assert unlike_training(model, images(model, **wrong)) is not None, wrong


def test_the_figures_are_those_of_numpy(images: Any) -> None:
    model = network()
    doubled = {"mean": MEAN, "scale": tuple(3 * s for s in SCALE)}
    text = unlike_training(model, images(model, **doubled), batch_size=96)
    (seen,) = run_ort(
        graph([helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1])], "c"),
        {"x": ((IMAGES - MEAN) * 3 * SCALE).transpose(0, 3, 1, 2).astype(np.float32)},
    )
    off = np.abs(seen.mean((0, 2, 3)) * (1 - 1 / 3)) / (seen.std((0, 2, 3)) / 3)
    assert text is not None
    assert text.startswith("at 'b' the data have 3 times the standard deviation")
    assert f"off by {np.quantile(off, 0.75):.2g}" in text


def test_nothing_is_said_where_nothing_is_known(images: Any) -> None:
    plain, fresh = network(), network(mean=np.zeros(8), var=np.ones(8))
    assert unlike_training(fresh, images(fresh)) is None  # as training starts
    few = images(plain).subset(np.arange(7))
    assert unlike_training(plain, few) is None
    training = network()
    next(n for n in training.graph.nodes if n.op == "BatchNormalization").attrs["training_mode"] = 1
    assert statistics_of(training) is None


@pytest.mark.parametrize("largest", [1, 1e8])
def test_constant_channels_do_not_count(largest: float) -> None:
    """Constant beside most of the others: one that varies far more makes no other one constant."""
    var = np.ones(8)
    var[:3], var[7] = 1e-9, largest
    found = statistics_of(network(var=var))
    assert found is not None
    assert found.channels == (3, 4, 5, 6, 7)
    assert statistics_of(network(scale=np.zeros(8))) is None


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"tensor": 3}', json.dumps({"version": 2, "tensor": "b"}), "\x00",
     json.dumps({"tensor": "gone", "channels": [0], "mean": [0], "deviation": [1]}),
     json.dumps({"tensor": "b", "channels": [99], "mean": [0], "deviation": [1]}),
     json.dumps({"tensor": "b", "channels": [-1], "mean": [0], "deviation": [1]}),
     json.dumps({"tensor": "b", "channels": [], "mean": [], "deviation": []}),
     json.dumps({"tensor": "b", "channels": [0, 1], "mean": [0], "deviation": [1, 1]}),
     json.dumps({"tensor": "b", "channels": [0], "mean": [0], "deviation": [0]}),
     json.dumps({"tensor": "y", "channels": [0], "mean": [0], "deviation": [1e-300]})],
)  # fmt: skip
def test_damaged_notes_do_no_harm(text: str, images: Any) -> None:
    model = prepare(network())
    model.metadata[KEY] = text
    unlike_training(model, images(model))
