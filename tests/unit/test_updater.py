"""One step, against the formulas that the module's documentation gives, in float64."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from onnxqat.calibration import placeholder_params
from onnxqat.model import Model, from_proto
from onnxqat.overrides import parse_override
from onnxqat.parallel import Workers
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.qparams import choose_qparams
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.train.engine import Flat
from onnxqat.train.form import training_form
from onnxqat.train.optimization.ranges import Ranges
from onnxqat.train.state import with_values
from tests.descent import Trained
from tests.networks import joined_to_a_constant, planned

# Elements that share one scale: of a channel, or of one sample. The Concat, what it reads, and the
# MaxPool and Flatten behind it share one, for 3 * 16, 16, 4 * 16, 16 and 16 elements.
SHARING = {"w1": 2 * 9, "w2": 2 * 9, "w3": 16, "x": 2 * 16, "c": 4 * 16, "y": 5}
WEIGHTS = {"w1": (3, 2, 3, 3), "b1": (3,), "w2": (1, 2, 3, 3), "w3": (16, 5)}
RANGES = {"x": (-1, 3), "c": (-2, 1), "y": (-1, 4)}  # zero_points: -64, 42 and -77
LEVELS = 255  # of int8, from -128
USUAL = {"": 1, "scale": 1e5, "zero_point": 1}  # sizes of gradients that move all by a few percent


def network(batch: str = "N", *overrides: str, **weights: np.ndarray) -> Model:
    """Return a Q/DQ model with int8 activations whose zero_points are not 0, and [-127, 127]."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[{batch},2,4,4] x) => (float[{batch},5] y) {{
        c = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) d = Conv<pads = [1, 1, 1, 1]>(x, w2)
        k = Concat<axis = 1>(c, d) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(k)
        f = Flatten(m) y = Gemm(f, w3) }}"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    made = {n: rng.normal(size=shape).astype(np.float32) for n, shape in WEIGHTS.items()}
    tensors = (onnx.numpy_helper.from_array(v, n) for n, v in (made | weights).items())
    proto.graph.initializer.extend(tensors)
    floats = prepare(from_proto(proto))
    plan = make_plan(floats.graph, load_rule("tflite"), list(map(parse_override, overrides)))
    params = placeholder_params(floats, plan)
    for point in plan.grid_points():
        if point.tensor in RANGES:
            low, high = np.float32(RANGES[point.tensor])
            params[point.parameters] = choose_qparams(low, high, point.spec)
    return insert_pairs(floats, plan, params, state="calibrated")


def close(trained: Trained, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(trained.values.views[name], values, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("batch", ["N", "2"])
def test_scales_and_zero_points_move_as_lsq_says(batch):
    """By descent without momentum: g = 1 / sqrt(N * Qp), the least of a group.

    A scale moves in its logarithm, where the gradient is s * dL/ds; a zero_point in units of its
    quantized range, where it is 255 * dL/dz.
    """
    model = network(batch)
    params = model.params
    settings = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.01, "scale_lr": 0.002}
    trained, rng = Trained(model, method="lsq+", **settings), np.random.default_rng(0)
    expected = {n: v.astype(np.float64) for n, v in trained.start.items()}

    assert params.keys() == SHARING.keys()
    assert {f"{n}/zero_point" for n in RANGES} < expected.keys() == trained.gradients.views.keys()
    for step in range(3):
        gradients = {
            n: np.float32(rng.normal(size=v.shape) * USUAL[n.partition("/")[2]])
            for n, v in expected.items()
        }
        trained.step(lambda name, _, given=gradients: given[name], step)
        for name, gradient in gradients.items():
            parameters, _, kind = name.partition("/")
            if not kind:
                expected[name] -= 0.01 * gradient
                continue
            levels = 127 - int(params[parameters].zero_point.max())
            g = 1 / math.sqrt(SHARING[parameters] * levels)
            if kind == "scale":
                expected[name] *= np.exp(-0.002 * expected[name] * gradient * g)
            else:
                expected[name] -= 0.002 * LEVELS * (LEVELS * gradient * g)

    close(trained, expected)
    for name in gradients:  # what does not move tells nothing
        assert np.abs(trained.values.views[name] / trained.start[name] - 1).max() > 1e-3


def test_a_zero_point_stays_in_its_range():
    trained = Trained(network(), method="lsq+", optimizer="sgd", momentum=0.0)
    for sign, end in ((1, -128), (-1, 127)):
        trained.step(lambda name, _, s=sign: s * 1e9 * name.endswith("/zero_point"))

        assert {float(trained.values.views[f"{n}/zero_point"]) for n in RANGES} == {end}
    assert trained.moved == {f"{n}/zero_point" for n in RANGES}


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_weight_moves_by_the_size_of_its_channel_and_a_dead_one_by_a_thousandth(optimizer):
    """Adam's first direction is the gradient's sign."""
    w1 = np.random.default_rng(1).normal(size=WEIGHTS["w1"]).astype(np.float32)
    w1[0], w1[1] = 0, w1[1] * 1e-5
    model = network(w1=w1, w2=np.zeros(WEIGHTS["w2"], np.float32))
    trained = Trained(model, optimizer=optimizer, lr=0.5).step(lambda *_: 2)
    size = math.sqrt((w1.astype(np.float64) ** 2).mean())
    channel = math.sqrt((w1[2].astype(np.float64) ** 2).mean())
    bias, w3 = (trained.start[n].astype(np.float64) for n in ("b1", "w3"))
    sizes = {
        "w1": np.array([1e-3 * size, 1e-3 * size, channel]).reshape(3, 1, 1, 1),
        "w2": 1e-6,  # nothing but zeros
        "w3": np.sqrt((w3**2).mean(axis=0)),
        "b1": math.sqrt((bias**2).mean()),
    }

    close(trained, {n: trained.start[n] - 0.5 * unit for n, unit in sizes.items()})


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_decay_of_a_scale_is_decoupled_from_every_optimizer(optimizer):
    """Where there is no gradient, s *= exp(-rate * decay), and nothing else moves."""
    group = ("scale.weight_decay=0.5",)
    trained = Trained(network(), method="lsq+", optimizer=optimizer, scale_lr=0.1, groups=group)
    trained.step(lambda *_: 0)
    scales = {n: v for n, v in trained.start.items() if n.endswith("/scale")}

    assert trained.moved == scales.keys() == {f"{n}/scale" for n in SHARING}
    close(trained, {n: v * math.exp(-0.05) for n, v in scales.items()})


def test_the_scale_of_a_range_with_two_ends_stays_above_its_floor():
    trained = Trained(network("N", "activation.min_range=1.5"), method="lsq+", scale_lr=0.5)
    for step in range(20):
        trained.step(lambda *_: 1, step)
    scales = {float(trained.values.views[f"{n}/scale"]) for n in RANGES}

    assert scales == {float(np.float32(1.5 / LEVELS))}


def test_a_trained_scale_is_not_smaller_than_the_largest_over_the_ratio():
    model = network("N", "weight.scale_ratio=2")
    values = {f"{name}/scale": params.scale for name, params in model.params.items()}
    values["w1/scale"] = np.float32([0.5, 0.125, 0.375])
    found = with_values(
        model, model.floats.copy(), values, weights=(), zero_points=(), fit_biases=False
    )

    assert found.params["w1"].scale.tolist() == [0.5, 0.25, 0.375]
    assert found.params["w3"].same_as(model.params["w3"])


def test_a_power_of_two_is_the_one_nearest_to_a_scale_that_moves():
    """Under a gradient of 1 in the logarithm, which moves the scale behind it by exp(-rate)."""
    model = network("N", "activation.symmetric=true", "activation.power_of_two=true")
    trained = Trained(model, scale_lr=0.2)
    scales = [f"{name}/scale" for name in RANGES]
    for step in range(8):
        trained.step(lambda n, _: 1 / trained.values.views[n] if n in scales else 0, step)
        halvings = np.rint(0.2 * (step + 1) / math.log(2))

        for name in scales:
            assert trained.values.views[name] == trained.start[name] * 0.5**halvings


def test_a_moving_range_covers_the_constant_that_shares_it():
    """With an averaging constant of 1 the range is that of the last batch, and of the constant."""
    floats, plan = planned(joined_to_a_constant(), "sophgo-bm1684x")
    model = insert_pairs(floats, plan, placeholder_params(floats, plan), state="calibrated")
    form = training_form(model, method="moving-average")
    values = Flat(form.parameters)
    ranges = Ranges(form, values, model, constant=1.0)
    (group,) = (p.group for p in plan.points if p.tensor == "k1")
    largest = float(np.abs(values.views["k1"]).max())
    for seen, expected in (((0.0, 0.5), largest), ((-2 * largest, 1.0), 2 * largest)):
        ranges.begin()
        ranges.see({group: seen})
        ranges.step(Workers(), lambda _: False)

        assert values.views[f"{group}/scale"] == np.float32(expected) / np.float32(127)
