"""Data in the range of training and outside of it, against statistics that numpy measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibrate import calibrate, placeholder_params, unlike_training
from onnxqat.data import DataSet, Preprocessing, open_data
from onnxqat.insert import insert
from onnxqat.model import Model, from_proto, load_model, save_model
from onnxqat.plan import make_plan
from onnxqat.prepare import prepare
from onnxqat.prepare.statistics import KEY, statistics_of
from onnxqat.rules import load_rule
from onnxqat.settings import input_specs
from tests.oracles import run_ort

RNG = np.random.default_rng(5)
# images differ in brightness, as real ones do
IMAGES = (RNG.normal(120, 45, (96, 1, 1, 1)) + RNG.normal(0, 45, (96, 8, 8, 3))).clip(0, 255)
MEAN, SCALE = (120.0, 121.0, 119.0), (0.016, 0.016, 0.016)
KERNEL = RNG.normal(size=(8, 3, 3, 3)).astype(np.float32)


def network(*, first: bool = True, between: str = "Identity", **batchnorm: Any) -> Model:
    """Conv, an activation, BatchNormalization with what training would have measured there."""
    layers = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node(between, ["c"], ["a"], name="between"),
    ]
    source = "a" if first else "x"
    head = layers if first else []
    pixels = (IMAGES.astype(np.float32) - np.float32(MEAN)) * np.float32(SCALE)
    (seen,) = run_ort(graph(head, source), {"x": pixels.transpose(0, 3, 1, 2)})
    arrays = {
        "scale": RNG.uniform(0.5, 2, seen.shape[1]),
        "shift": RNG.normal(size=seen.shape[1]),
        "mean": seen.mean((0, 2, 3)),
        "var": seen.var((0, 2, 3)),
    } | batchnorm
    names = ["scale", "shift", "mean", "var"]
    nodes = [
        *head,
        helper.make_node("BatchNormalization", [source, *names], ["b"], name="bn"),
        helper.make_node("Relu", ["b"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], name="pool"),
    ]
    floats = {n: np.asarray(v, np.float32) for n, v in arrays.items()}
    return from_proto(graph(nodes, "y", floats), name="net.onnx")


def graph(nodes: list[onnx.NodeProto], output: str, arrays: Any = None) -> onnx.ModelProto:
    if not nodes:  # onnxruntime wants one
        nodes, output = [helper.make_node("Identity", ["x"], ["same"])], "same"
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in ({"w": KERNEL} | (arrays or {})).items()],
    )
    return helper.make_model(made, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


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
    empty = insert(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [{"x": np.zeros((1, 3, 8, 8), np.float32)}])


@pytest.mark.parametrize("kind", [{}, {"between": "Relu"}, {"first": False}])
def test_wrong_settings_are_seen_and_right_ones_are_not(
    kind: Any, images: Any, tmp_path: Path
) -> None:
    floats = network(**kind)
    save_model(quantized(prepare(floats)), tmp_path / "q.onnx")
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


def test_constant_channels_do_not_count(images: Any) -> None:
    var = np.ones(8)
    var[:3] = 1e-9
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
