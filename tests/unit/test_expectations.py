"""Means of clipped normal distributions, and the biases that analytic correction finds by them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.preparation.distributions import (
    KEY,
    Distribution,
    distributions_of,
    note_distributions,
)
from onnxqat.qparams import fake_quantize
from onnxqat.quantized import weights_hash
from onnxqat.repair import correct_biases_analytically, original
from onnxqat.repair.expectations import clipped_mean
from tests.networks import _Graph, quantized

MEAN, DEVIATION = np.array([0.0, 1.5, -2.0, 5.0, 0.3]), np.array([1.0, 0.5, 3.0, 2.0, 0.0])


def integrated(function, mean, deviation):
    """Return the mean of a function of a normal variable, as a sum over a fine grid."""
    y, width = np.linspace(-12, 12, 400_001, retstep=True)
    density = np.exp(-np.square(y) / 2) / np.sqrt(2 * np.pi)
    return np.array(
        [
            (function(m + d * y) * density).sum() * width
            for m, d in zip(mean, deviation, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("limits", "function"),
    [
        ({}, lambda y: np.maximum(y, 0)),
        ({"slope": 0.1}, lambda y: np.where(y < 0, 0.1 * y, y)),
        ({"high": 6.0}, lambda y: np.clip(y, 0, 6)),
        ({"low": -1.0, "high": 1.0}, lambda y: np.clip(y, -1, 1)),
    ],
)
def test_the_mean_behind_a_function_is_the_integral(limits, function):
    found = clipped_mean(Distribution(MEAN, DEVIATION), **limits)

    np.testing.assert_allclose(found, integrated(function, MEAN, DEVIATION), atol=1e-7)


STATISTICS = {
    "scale": np.float32([0.5, -1.0, 2.0, 0.1]),
    "shift": np.float32([1.0, 0.2, -1.0, 0.5]),
    "mean": np.float32([0.1, 0.2, 0.3, 0.4]),
    "variance": np.float32([1.0, 2.0, 0.5, 1.5]),
}


def network(activation, *, opened="c1"):
    g = _Graph(1)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 3, 3)], opened)
    names = [g.constant(name, array) for name, array in STATISTICS.items()]
    g.node("BatchNormalization", [opened, *names], "n1")
    limits = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    slope = {"alpha": 0.1} if activation == "LeakyRelu" else {}
    g.node(activation, ["n1", *(limits if activation == "Clip" else [])], "r1", **slope)
    g.node("Conv", ["r1", g.weight("w2", 6, 2, 3, 3), g.weight("b2", 6)], "c2", group=2)
    g.node("Relu", ["c2"], "r2")
    g.node("Concat", ["r1", "n1"], "k", axis=1)
    g.node("GlobalAveragePool", ["r1"], "v")
    g.node("Flatten", ["v"], "f")
    g.node("Gemm", ["f", g.weight("w3", 5, 4), g.weight("b3", 5)], "h", transB=1)
    g.node("GlobalAveragePool", ["r2"], "u")
    g.node("Flatten", ["u"], "e")
    g.node("Gemm", ["e", g.weight("w4", 5, 6), g.weight("b4", 5)], "j", transB=1)
    g.node("Add", ["h", "j"], "output")
    return g.model(["N", 3, 8, 8], ["N", 5])


FUNCTIONS = {
    "Relu": lambda y: np.maximum(y, 0),
    "LeakyRelu": lambda y: np.where(y < 0, np.float32(0.1) * y, y),
    "Clip": lambda y: np.clip(y, 0, 6),
}


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_bias_makes_up_for_the_rounding_of_its_weight(activation):
    floats, model = quantized(network(activation), "onnxruntime-cpu", ("weight.bits=4",))

    result = correct_biases_analytically(model)

    variance = STATISTICS["variance"].astype(np.float64)
    deviation = np.abs(STATISTICS["scale"]) * np.sqrt(variance / (variance + 1e-5))
    means = integrated(FUNCTIONS[activation], STATISTICS["shift"].astype(np.float64), deviation)
    before, after = (
        {n: t.values for n, t in m.graph.tensors().items() if hasattr(t, "values")}
        for m in (floats, result.model.floats)
    )
    points = {p.tensor: p for p in model.plan.points if p.role == "weight"}
    error = {
        name: fake_quantize(before[name], model.params[points[name].parameters], points[name].spec)
        - before[name].astype(np.float64)
        for name in ("w2", "w3")
    }
    grouped = error["w2"].sum(axis=(2, 3)).reshape(2, 3, 2)
    shift = {
        "b2": np.einsum("goi,gi->go", grouped, means.reshape(2, 2)).reshape(-1),
        "b3": error["w3"] @ means,
    }
    for name, expected in shift.items():
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(after[name], before[name] - expected, atol=2e-6)
    assert result.layers == ("n_c2", "n_h")
    assert {s.node for s in result.skips} == {"n_c1", "n_j"}  # the input, and behind c2, no mean
    np.testing.assert_array_equal(after["b4"], before["b4"])


def test_the_biases_from_before_are_remembered():
    floats, model = quantized(network("Relu"), "onnxruntime-cpu", ("weight.bits=4",))

    result = correct_biases_analytically(model).model

    assert weights_hash(result.floats.graph) != model.source
    assert weights_hash(original(result.floats).graph) == model.source == weights_hash(floats.graph)


def test_what_is_remembered_survives_preparing_twice_and_is_not_trusted_blindly():
    once = prepare(from_proto(network("Relu")))
    twice = prepare(once)

    found = distributions_of(twice)
    np.testing.assert_allclose(found["n1"].mean, STATISTICS["shift"])
    assert twice.metadata[KEY] == once.metadata[KEY]
    for text in ("{", "[]", '{"n1":{"mean":"AAAA","deviation":""}}', '{"n1":{"mean":"A"}}'):
        once.metadata[KEY] = text
        assert distributions_of(once) == {}
    note_distributions(once, {"n1": Distribution(np.array([np.nan]), np.array([1.0]))})
    assert distributions_of(once) == {}
