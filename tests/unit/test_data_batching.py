"""Inputs without a batch axis take one value for all samples; the others a row of each sample."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.data import InputSpec, open_data
from onnxqat.errors import DataError
from onnxqat.evaluation import evaluate
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.settings import input_specs
from onnxqat.train import Config, finetune

N = 20
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
STATE = np.arange(8, dtype=np.float32).reshape(2, 1, 4)


def spec(name, *shape, dtype="float32"):
    return InputSpec(name=name, shape=shape, dtype=dtype)


def opened(tmp_path, specs, **arrays):
    np.savez(tmp_path / "d.npz", **arrays)
    return open_data(tmp_path / "d.npz", specs)


@pytest.mark.parametrize(
    ("other", "array", "fed"),
    [
        (spec("o", dtype="int64"), np.int64(16000), np.int64(16000)),
        (spec("o", dtype="int64"), np.array([16000]), np.int64(16000)),
        (spec("o", dtype="int64"), np.full(N, 16000), np.int64(16000)),
        (spec("o", dtype="int64"), np.int32(16000), np.int64(16000)),
        (spec("o", 1, dtype="int64"), np.int64(16000), np.array([16000])),
        (spec("o", 1, dtype="int64"), np.array([16000]), np.array([16000])),
        (spec("o", 2, dtype="int64"), np.array([224, 320]), np.array([224, 320])),
        (spec("o", 2), np.tile(np.float32([8, 9]), (N, 1)), np.float32([8, 9])),
        (spec("o", 1, 3), X[:1], X[:1]),
        (spec("o", 2, 1, 4), STATE, STATE),
        (spec("o", 2, "n", 4), STATE, np.repeat(STATE, 5, 1)),
        (spec("o", "n", 2, 0, 4), np.zeros((2, 0, 4), np.float32), np.zeros((5, 2, 0, 4))),
        (spec("o", "n", 2, 0, 4), np.zeros((1, 2, 0, 4), np.float32), np.zeros((5, 2, 0, 4))),
        (spec("o", "n", 2, 0, 4), np.zeros((N, 2, 0, 4), np.float32), np.zeros((5, 2, 0, 4))),
        (spec("o", "n", 2, "past", 4), np.zeros((2, 0, 4), np.float32), np.zeros((5, 2, 0, 4))),
        (spec("o", 0), np.zeros(0, np.float32), np.zeros(0)),
        (spec("o", "n", dtype="int64"), np.int64(16000), np.full(5, 16000)),
        (spec("o", "m", dtype="int64"), np.arange(N), np.arange(5)),
        (spec("o", dtype="bool"), np.bool_(True), np.bool_(True)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_each_input_is_fed_what_its_shape_wants(tmp_path, other, array, fed, first):
    specs = [other, spec("x", "n", 3)] if first else [spec("x", "n", 3), other]
    with opened(tmp_path, specs, x=X, o=array) as data:
        assert len(data) == N
        assert data.fixed_batch is None
        batch = next(iter(data.batches(5)))
    np.testing.assert_array_equal(batch.inputs["x"], X[:5])
    np.testing.assert_array_equal(batch.inputs["o"], fed)
    assert batch.inputs["o"].dtype == other.dtype
    assert batch.inputs["o"].shape == np.shape(fed)


@pytest.mark.parametrize(
    ("specs", "arrays", "samples", "fixed"),
    [
        # a detector of one image: its size is no batch of two
        (
            [spec("x", 1, 3), spec("size", 2)],
            {"x": X, "size": np.float32([8, 8])},
            ["x"],
            1,
        ),
        # a voice detector: (1, T), a state of two layers, a rate
        (
            [spec("state", 2, 1, 4), spec("x", 1, 3), spec("sr", 1, dtype="int64")],
            {"x": X, "state": STATE, "sr": np.array([16000])},
            ["x"],
            1,
        ),
        # the same with a rate of each sample
        (
            [spec("x", 1, 3), spec("sr", 1, dtype="int64")],
            {"x": X, "sr": np.arange(N)},
            ["x", "sr"],
            1,
        ),
        # exactly one batch of a model that is fixed to it
        (
            [spec("a", N, 3), spec("b", N, dtype="int64")],
            {"a": X, "b": np.arange(N)},
            ["a", "b"],
            N,
        ),
        # the labels count the samples
        (
            [spec("state", 2, 3), spec("x", N, 3)],
            {"state": X[:2], "x": X, "label": np.arange(N)},
            ["x"],
            N,
        ),
    ],
)
def test_arrays_say_which_first_dimension_is_the_batch(tmp_path, specs, arrays, samples, fixed):
    with opened(tmp_path, specs, **arrays) as data:
        assert sorted(data.sample_inputs) == sorted(samples)
        assert (len(data), data.fixed_batch) == (N, fixed)


@pytest.mark.parametrize(
    ("specs", "arrays", "message"),
    [
        ([spec("x", "n", 3), spec("o")], {"o": np.float32(range(N))}, r"'o' has different values"),
        ([spec("x", "n", 3), spec("o", 2)], {"o": np.ones(7)}, r"array 'o' has 7 samples"),
        ([spec("x", "n", 3), spec("o", 2)], {"o": np.ones((4, 4, 2))}, r"shape \(4, 4, 2\), but"),
        ([spec("x", "n", 3), spec("o", dtype="int64")], {"o": np.float32(1)}, "Store it as int64"),
        ([spec("x", "n", 3), spec("o")], {"o": np.float32(np.nan)}, "'o' holds NaN or infinity"),
        ([spec("x", "n", 3), spec("o", dtype="int8")], {"o": np.int64(300)}, "outside int8"),
        ([spec("x", "n", 3), spec("o", "n", dtype="object")], {"o": X[:, 0]}, "'o' takes text"),
        ([spec("x", "n", 3), spec("o", "n", dtype="bool")], {"o": X[:, 0]}, "Store it as bool"),
        ([spec("o")], {"o": np.float32(1)}, r"none of the model's inputs 'o' has a batch axis"),
        (
            [spec("x", N, 3), spec("o", 2, 3)],
            {"o": X[:2]},
            "which of the arrays for 'x', 'o' holds the samples",
        ),
        ([spec("x", 0, 3)], {}, "takes batches of 0"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, specs, arrays, message):
    with pytest.raises(DataError, match=message):
        opened(tmp_path, specs, x=X, **arrays)


def test_all_files_have_the_same_value(tmp_path):
    specs = [spec("x", "n", 3), spec("o")]
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        np.savez(tmp_path / f"{name}.npz", x=X, o=np.float32(value))
    with pytest.raises(DataError, match="'o' has different values"):
        open_data(tmp_path, specs)
    (tmp_path / "c.npz").unlink()
    with open_data(tmp_path, specs) as data:
        assert len(data) == 2 * N


def decoder():
    """A step of a decoder: a cache that is empty at the start, a scalar, a mask for all samples."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=(3, 6)), "v": rng.normal(size=(6, 4))}
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1]), "axis"))
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["masked"]),
        helper.make_node("Cast", ["rate"], ["gain"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["masked", "gain"], ["louder"]),
        helper.make_node("MatMul", ["louder", "w"], ["hidden"]),
        helper.make_node("Unsqueeze", ["hidden", "axis"], ["step"]),
        helper.make_node("Concat", ["cache", "step"], ["steps"], axis=1),
        helper.make_node("ReduceMean", ["steps"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "v"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("rate", TensorProto.INT64, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3]),
        helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 3]),
        helper.make_tensor_value_info("cache", TensorProto.FLOAT, ["N", 0, 6]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])
    graph = helper.make_graph(nodes, "decoder", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_such_a_model_is_calibrated_trained_and_evaluated(tmp_path):
    model = from_proto(decoder())
    prepared = prepare(model)
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))
    empty = insert_pairs(prepared, plan, placeholder_params(prepared, plan), state="uncalibrated")
    x = np.random.default_rng(2).normal(size=(40, 3)).astype(np.float32)
    arrays = {"x": x, "mask": np.zeros((1, 3), np.float32), "rate": np.int64(2)}
    with opened(tmp_path, input_specs(model), cache=np.zeros((0, 6), np.float32), **arrays) as data:
        qdq = calibrate(empty, data.batches(), observer="minmax", threads=1)
        reach = float(qdq.params["louder"].scale) * 255  # of asymmetric uint8
        assert reach == pytest.approx(2 * (max(x.max(), 0) - min(x.min(), 0)), rel=1e-5)
        result = finetune(qdq, data, config=Config(epochs=1, threads=1))
        figures = evaluate(result.model, data.batches(), against=model, threads=1)
    assert figures.samples == 40
    assert figures.max_abs_diff < 0.5
