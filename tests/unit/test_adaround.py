"""Learned rounding: what its variables compute, their gradient, and the weights that are stored."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.deploy import deployed_model
from onnxqat.errors import TrainingError
from onnxqat.gradients import installed_kernels
from onnxqat.qparams import QuantParams, QuantSpec, fake_quantize, quantize, quantized_range
from onnxqat.train import Config, finetune
from onnxqat.train.adaround import (
    AdaRound,
    rectified_sigmoid,
    regularizer,
    regularizer_gradient,
)
from onnxqat.train.blocks.block import BlockTraining
from onnxqat.train.engine import StepSession, forward_session
from onnxqat.train.form import training_form
from onnxqat.train.losses import Loss, Term, teacher_input
from tests.digits import calibrated_lenet, training_digits
from tests.networks import convnet, quantized, samples
from tests.oracles import run_ort

FAST = {
    "scope": ("blocks",),
    "rounding": "adaround",
    "block_epochs": 3,
    "block_layers": 1,
    "batch_size": 16,
    "threads": 1,
}


def gemm() -> onnx.ModelProto:
    rng, value = np.random.default_rng(4), helper.make_tensor_value_info
    arrays = {"w": rng.normal(size=(6, 5)), "b": rng.normal(size=5)}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["input", "w", "b"], ["y"], name="gemm")],
        "network",
        [value("input", TensorProto.FLOAT, ["N", 6])],
        [value("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def data():
    with training_digits(220) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(data):
    return calibrated_lenet(data, "weight.bits=2")


@pytest.fixture(scope="module")
def tuned(coarse, data):
    return finetune(coarse, data, config=Config(**FAST))


# --- the variables, by numpy --------------------------------------------------------------------


def plain_h(v):
    return np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)


def test_the_rectified_sigmoid_and_the_regularizer_are_those_of_the_paper():
    v = np.linspace(-4, 4, 81)

    np.testing.assert_allclose(rectified_sigmoid(v), plain_h(v), atol=1e-15)
    assert rectified_sigmoid(np.float32([-16, 0, 16])).tolist() == [0, 0.5, 1]
    for beta in (20.0, 2.0):
        expected = np.mean(1 - np.abs(2 * plain_h(v) - 1) ** beta)
        assert regularizer(v, beta) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("beta", [20.0, 7.5, 2.0])
def test_the_gradient_of_the_regularizer_is_its_slope(beta):
    v = np.random.default_rng(0).uniform(-3.5, 3.5, size=(5, 4))  # some are decided
    step = 1e-6
    slopes = np.zeros_like(v)
    for index in np.ndindex(v.shape):
        moved = np.zeros_like(v)
        moved[index] = step
        slopes[index] = (regularizer(v + moved, beta) - regularizer(v - moved, beta)) / (2 * step)

    np.testing.assert_allclose(regularizer_gradient(v, beta), slopes, atol=1e-9)
    assert np.count_nonzero(slopes) not in (0, slopes.size)


SPECS = {
    "per-tensor": (QuantSpec(bits=4), np.float32(0.25), np.int8(0)),
    "per-axis": (QuantSpec(bits=3, axis=0), np.float32([0.25, 0.5, 0.125]), np.int8([0, 0, 0])),
    "narrow": (QuantSpec(bits=2, narrow_range=True), np.float32(0.5), np.int8(0)),
    "asymmetric": (
        QuantSpec(bits=4, symmetric=False, signedness="unsigned", axis=1),
        np.float32([0.25, 0.5, 0.125, 1.0]),
        np.uint8([3, 0, 15, 7]),
    ),
}


@pytest.mark.parametrize("case", SPECS)
def test_variables_begin_at_the_weight_and_at_its_nearest_level(case):
    spec, scale, zero_point = SPECS[case]
    params = QuantParams(scale=scale, zero_point=zero_point)
    weight = np.random.default_rng(1).normal(size=(3, 4, 40)).astype(np.float32)
    weight.reshape(-1)[:6] = np.float32([0.125, 0.375, -0.125, -0.375, 100, -100])  # ties, clipped
    found = AdaRound.of(weight, params, spec)
    start = found.start()

    np.testing.assert_array_equal(found.rounded(start), fake_quantize(weight, params, spec))
    shape = [-1 if i == spec.axis else 1 for i in range(3)] if spec.axis is not None else [1]
    steps = np.asarray(scale, np.float64).reshape(shape)
    low, high = quantized_range(spec, signed=params.signed)
    offset = np.asarray(zero_point, np.float64).reshape(shape)
    wanted = np.clip(weight / steps, low - offset, high - offset)
    soft = found.below + found.free * plain_h(start.astype(np.float64))
    # clipped weights lie at the end of the range; of the others, the first level is not moved
    np.testing.assert_allclose(soft, wanted, atol=2e-6)
    levels = quantize(weight, params, spec)
    assert np.isin(levels, (low, high)).any()
    assert not found.free.all()


# --- in the graph -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """A convnet with 4-bit weights per-axis, its inputs, and its training form."""
    proto = convnet(kinks=False)
    _, model = quantized(proto, "onnxruntime-cpu", ("weight.bits=4",))
    return model, {"input": samples(proto, 4)}, training_form(model, adaround=True)


def test_decided_variables_compute_what_the_file_computes(network):
    model, feeds, form = network
    rng = np.random.default_rng(2)
    chosen = {
        name: rng.normal(size=found.weight.shape).astype(np.float32)
        for name, found in form.roundings.items()
    }
    decided = {name: form.roundings[name].decided(v) for name, v in chosen.items()}
    ours = forward_session(form, threads=1).run(None, feeds | form.parameters | decided)
    stored = model.to_proto()
    for tensor in stored.graph.initializer:
        if tensor.name in chosen:
            tensor.raw_data = form.roundings[tensor.name].rounded(chosen[tensor.name]).tobytes()

    assert len(chosen) == 5
    for a, b in zip(ours, run_ort(stored, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("engine", ["any", "installed"])
def test_the_gradient_of_the_variables_is_the_slope_of_the_loss(monkeypatch, engine):
    """Of one Gemm, by numpy; and the loss by numpy, a variable moved to both sides."""
    kernels = frozenset() if engine == "any" else installed_kernels()
    monkeypatch.setattr("onnxqat.train.engine.installed_kernels", lambda: kernels)
    rng = np.random.default_rng(3)
    _, model = quantized(gemm(), "onnxruntime-cpu", ("weight.bits=3", "tensor:y.quantize=false"))
    form = training_form(model, adaround=True)
    x, target = (rng.normal(size=(8, n)).astype(np.float32) for n in (6, 5))
    loss = Loss(terms=(Term(kind="mse", weight=0.7, output="y"),), graphs={})
    session = StepSession(form, loss, batch_size=8, threads=1)
    v = rng.uniform(-3, 3, size=(6, 5))
    session.values.views["w"][...] = v
    value = session.run({"input": x, teacher_input("y"): target})

    points = {point.tensor: point for point in model.plan.grid_points()}
    xq = fake_quantize(x, model.params["input"], points["input"].spec).astype(np.float64)
    found, bias = form.roundings["w"], form.weights["b"].astype(np.float64)

    def loss_of(variables):
        weight = (found.below + found.free * plain_h(variables)) * found.scale.astype(np.float64)
        return 0.7 * np.square(xq @ weight + bias - target).mean()

    step, slopes = 1e-6, np.zeros_like(v)
    for index in np.ndindex(v.shape):
        moved = np.zeros_like(v)
        moved[index] = step
        slopes[index] = (loss_of(v + moved) - loss_of(v - moved)) / (2 * step)

    assert value == pytest.approx(loss_of(v), rel=1e-5)
    size = np.abs(slopes).max()
    np.testing.assert_allclose(session.gradients.views["w"], slopes, atol=1e-5 * size)
    assert np.count_nonzero(slopes) not in (0, slopes.size)


def test_pressure_rises_from_nothing_and_decides(network):
    """Without a loss to learn from, the variables go to the nearest level, and all the way."""
    model, feeds, form = network
    outputs = [t.name for t in model.floats.graph.outputs]
    loss = Loss(terms=(Term(kind="mse", weight=1e-9, output=outputs[0]),), graphs={})
    config = Config(scope=("blocks",), batch_size=4, method="ste", lr=0.01)
    training = BlockTraining(model, form, loss, config, still=(), steps=100)
    training.rounding.error = 1.0
    views = training.session.values.views
    start = {name: views[name].copy() for name in form.roundings}
    batch = feeds | {teacher_input(outputs[0]): run_ort(model.floats.to_proto(), feeds)[0]}
    for number in range(100):
        training.step(iter([batch]), 1.0, number)
        if number == 19:
            early = {name: np.abs(views[name] - start[name]).max() for name in start}
    for name, found in form.roundings.items():
        h = rectified_sigmoid(views[name])[found.free > 0]
        assert np.mean((h == 0) | (h == 1)) > 0.95
        assert early[name] <= 20 * 0.1


# --- a whole run --------------------------------------------------------------------------------


def test_stored_weights_lie_on_the_level_above_or_below(coarse, tuned):
    before, after = (m.floats.graph.tensors() for m in (coarse, tuned.model))
    moved = 0
    for point in coarse.plan.grid_points():
        if point.role != "weight":
            continue
        params = tuned.model.params[point.parameters]
        old, new = before[point.tensor].values, after[point.tensor].values
        assert params.same_as(coarse.params[point.parameters])
        np.testing.assert_array_equal(fake_quantize(new, params, point.spec), new)
        found = AdaRound.of(old, params, point.spec)
        above = (found.below + found.free) * found.scale
        assert np.all((new == found.below * found.scale) | (new == above))
        moved += np.count_nonzero(new != fake_quantize(old, params, point.spec))
    assert moved
    assert tuned.kept == "blocks"
    assert all(block.after < block.before for block in tuned.blocks if block.kept)


def test_blocks_are_judged_by_rounded_weights(coarse, data, tuned):
    """The first block's error before training is that of the nearest levels, bit for bit."""
    plain = finetune(
        coarse, data, config=Config(**FAST | {"rounding": "nearest", "block_epochs": 1})
    )

    assert tuned.blocks[0].before == plain.blocks[0].before


def test_what_leaves_for_the_chip_computes_the_same(data, tuned):
    """The float model with snapped weights computes the Q/DQ file's bits behind its weights."""
    snapped = deployed_model(tuned.model, weights="snapped")
    kept = deployed_model(tuned.model, weights="tuned")
    names = [p.tensor for p in tuned.model.plan.grid_points() if p.role == "weight"]
    ours, theirs = (m.graph.tensors() for m in (snapped, kept))
    for name in names:
        np.testing.assert_array_equal(ours[name].values, theirs[name].values)


def test_frozen_weights_stay_as_they_are(coarse, data):
    found = finetune(coarse, data, config=Config(**FAST, groups=("weight.freeze=true",)))
    before, after = (m.floats.graph.tensors() for m in (coarse, found.model))

    for point in coarse.plan.points:
        if point.role == "weight":
            np.testing.assert_array_equal(before[point.tensor].values, after[point.tensor].values)
    assert any(block.kept for block in found.blocks)


def test_rounding_is_learned_in_blocks_alone(coarse, data):
    with pytest.raises(TrainingError, match="--rounding adaround applies to blocks only"):
        finetune(coarse, data, config=Config(rounding="adaround"))
    with pytest.raises(TrainingError, match="rounding"):
        Config(rounding="stochastic")
