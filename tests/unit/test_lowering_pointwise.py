"""Each op that acts on values alone: forward bit for bit, gradient against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxqat.train.lowering.gradient import Refusal
from tests.derivatives import check_node, gradients, lowered, one_node


def values(low=-4.0, high=4.0, shape=(3, 4, 5), *, away_from=()):
    """Random values, none within 0.01 of a kink."""
    x = np.random.default_rng(0).uniform(low, high, shape).astype(np.float32)
    for kink in away_from:
        near = np.abs(x - kink) < 0.01
        x[near] += np.float32(0.02)
    return x


@pytest.mark.parametrize(
    ("op_type", "attributes", "kinks", "opset"),
    [
        ("Atan", {}, (), 17),
        ("Asinh", {}, (), 17),
        ("Celu", {}, (0,), 17),
        ("Celu", {"alpha": 0.4}, (0,), 17),
        ("Cos", {}, (), 17),
        ("Cosh", {}, (), 17),
        ("Elu", {}, (0,), 17),
        ("Elu", {"alpha": 0.7}, (0,), 21),
        ("Gelu", {"approximate": "tanh"}, (), 20),
        ("HardSigmoid", {}, (-2.5, 2.5), 17),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, (-3, 3), 17),
        ("HardSwish", {}, (-3, 3), 17),
        ("HardSwish", {}, (-3, 3), 21),
        ("LeakyRelu", {}, (0,), 17),
        ("LeakyRelu", {"alpha": 0.3}, (0,), 17),
        ("LeakyRelu", {"alpha": 1.5}, (0,), 17),
        ("LeakyRelu", {"alpha": -0.5}, (0,), 17),
        ("Mish", {}, (), 18),
        ("Selu", {}, (0,), 17),
        ("Selu", {"alpha": 1.2, "gamma": 0.8}, (0,), 17),
        ("Shrink", {}, (-0.5, 0.5), 17),
        ("Shrink", {"lambd": 1.0, "bias": 0.3}, (-1, 1), 17),
        ("Sin", {}, (), 17),
        ("Sinh", {}, (), 17),
        ("Softplus", {}, (), 17),
        ("Softsign", {}, (0,), 17),
        ("ThresholdedRelu", {}, (1,), 17),
        ("ThresholdedRelu", {"alpha": 0.3}, (0.3,), 17),
    ],
)
def test_pointwise(op_type, attributes, kinks, opset):
    check_node(op_type, {"x": values(away_from=kinks)}, opset=opset, **attributes)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 1.0, 2.0])
def test_leaky_relu_around_zero(alpha):
    x = np.float32([0.0, -0.0, 1e-28, -1e-28, 5, -5])
    model = one_node("LeakyRelu", {"x": x}, alpha=alpha)
    upstream = np.float32([1, 2, 3, 4, 5, 6])
    found = gradients(model, {"x": x}, ["x"], [upstream])["x"]

    np.testing.assert_array_equal(found[2:], upstream[2:] * np.float32([1, alpha, 1, alpha]))


@pytest.mark.parametrize("op_type", ["Acos", "Asin", "Atanh", "Tan"])
def test_pointwise_on_the_unit_interval(op_type):
    check_node(op_type, {"x": values(-0.9, 0.9)})


def test_gelu_by_erf():
    erf = np.vectorize(math.erf)  # the reference evaluator's is of float32
    oracle = lambda feeds: [feeds["x"] * (1 + erf(feeds["x"] / math.sqrt(2))) / 2]  # noqa: E731
    check_node("Gelu", {"x": values()}, opset=20, oracle=oracle)


def test_acosh():
    check_node("Acosh", {"x": values(1.1, 4)})


def test_dropout_of_an_exported_model_is_the_identity():
    check_node("Dropout", {"x": values()}, oracle=lambda feeds: [feeds["x"]])


def test_dropout_in_training_mode_is_refused():
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
    with pytest.raises(Refusal, match="it is in training mode"):
        lowered(one_node("Dropout", {"x": values()}, constants), ["x"])


def test_dropout_with_all_its_inputs():
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(False)}
    check_node("Dropout", {"x": values()}, constants, oracle=lambda feeds: [feeds["x"]])


@pytest.mark.parametrize("op_type", ["Round", "Floor", "Ceil", "Sign"])
def test_steps_pass_no_gradient(op_type):
    x = values()
    model = one_node(op_type, {"x": x})
    found = gradients(model, {"x": x}, ["x"], [np.ones_like(x)])

    np.testing.assert_array_equal(found["x"], np.zeros_like(x))


@pytest.mark.parametrize(
    "slope", [(), (1,), (4, 1), (3, 1, 1), (1, 1, 5), (4, 5), (3, 4, 5)], ids=str
)
@pytest.mark.parametrize("learned", [["x"], ["slope"], ["x", "slope"]], ids="-".join)
def test_prelu_of_every_broadcast(slope, learned):
    inputs = {"x": values(away_from=(0,)), "slope": values(-0.5, 1.5, slope)}
    check_node("PRelu", inputs, learned=learned)


@pytest.mark.parametrize(
    "slope", [[0.0], [0.25], [1.0], [-0.5], [0.1, 0.2, -0.3, 0.4, 0.5]], ids=str
)
def test_prelu_with_a_constant_slope(slope):
    check_node("PRelu", {"x": values(away_from=(0,))}, {"slope": np.array(slope, np.float32)})


def test_mod_passes_the_gradient_of_its_dividend():
    x = values(away_from=(-3, -1.5, 0, 1.5, 3))
    check_node("Mod", {"x": x}, {"divisor": np.array([1.5], np.float32)}, fmod=1)


def test_mod_has_no_gradient_of_its_divisor():
    inputs = {"x": values(), "divisor": np.array([1.5], np.float32)}
    with pytest.raises(Refusal, match="no gradient with respect to its input 'divisor'"):
        gradients(one_node("Mod", inputs, fmod=1), inputs, ["divisor"], [values()])
