"""High biases: a layer gives a part of its bias to the next, and the function stays above it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.preparation.distributions import distributions_of
from onnxqat.repair import equalize, original
from onnxqat.repair.absorption import Absorption
from onnxqat.repair.channels import find_channels
from tests.networks import _Graph, samples
from tests.oracles import run_ort


def values(model):
    return {name: t.values for name, t in model.graph.tensors().items() if hasattr(t, "values")}


def normalized(activation="Relu", *, pads=None, **attributes):
    """Conv, BatchNormalization, an activation, a Conv with two groups, one without a bias."""
    g = _Graph(1)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 3, 3)], "c1")
    statistics = {
        "scale": np.float32([0.5, -0.5, 2.0, 0.1]),
        "shift": np.float32([2.0, 1.8, 1.0, -1.0]),  # minus three deviations: 0.5, 0.3, no, no
        "mean": np.float32([0.1, 0.2, 0.3, 0.4]),
        "variance": np.float32([1.0, 2.0, 0.5, 1.5]),
    }
    names = [g.constant(name, array) for name, array in statistics.items()]
    g.node("BatchNormalization", ["c1", *names], "n1", epsilon=1e-5)
    limits = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    g.node(activation, ["n1", *(limits if activation == "Clip" else [])], "r1", **attributes)
    g.node("MaxPool", ["r1"], "p1", kernel_shape=[2, 2], strides=[2, 2])
    more = {"pads": pads} if pads else {}
    g.node("Conv", ["p1", g.weight("w2", 6, 2, 1, 1), g.weight("b2", 6)], "c2", group=2, **more)
    g.node("Sigmoid", ["c2"], "r2")
    g.node("GlobalAveragePool", ["r2"], "v")
    g.node("Flatten", ["v"], "f")
    g.node("Gemm", ["f", g.weight("w3", 5, 6)], "output", transB=1)
    return g.model(["N", 3, 10, 10], ["N", 5])


@pytest.mark.parametrize(("activation", "more"), [("Relu", {}), ("LeakyRelu", {"alpha": 0.2})])
def test_three_deviations_below_the_mean_are_absorbed(activation, more):
    model = prepare(from_proto(normalized(activation, **more)))
    before = values(model)
    absorption = Absorption(model.graph, find_channels(model.graph))

    amounts = absorption.amounts(distributions_of(model), {})
    changed = absorption.apply(amounts)

    variance = np.float64(np.float32([1.0, 2.0, 0.5, 1.5]))
    deviation = np.abs([0.5, -0.5, 2.0, 0.1]) * np.sqrt(variance / (variance + 1e-5))
    c = np.maximum(np.array([2.0, 1.8, 1.0, -1.0]) - 3 * deviation, 0)
    assert changed == ("n_c1",)
    np.testing.assert_allclose(amounts["n1"], c, atol=1e-6)
    after, first, second = values(model), *(n for n in model.graph.nodes if n.op == "Conv")
    b1, b2 = (node.inputs[2].values for node in (first, second))
    folded = before[first.inputs[2].name]
    np.testing.assert_allclose(b1, folded - c, atol=1e-6)
    groups = before["w2"].reshape(2, 3, 2).astype(np.float64)
    expected = before["b2"] + np.einsum("goi,gi->go", groups, c.reshape(2, 2)).reshape(-1)
    np.testing.assert_allclose(b2, expected, atol=1e-6)
    for name in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(after[name], before[name])


def test_outputs_stay_where_values_are_above_what_was_absorbed():
    prepared = prepare(from_proto(normalized()))
    feeds = [{"input": 1e-3 * samples(normalized(), 8)}]  # so that values are near their means

    result = equalize(prepared, feeds)

    before, after = (run_ort(m.to_proto(), feeds[0])[0] for m in (prepared, result.model))
    assert result.absorbed == ("n_c1",)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_the_difference_is_told_and_the_original_biases_come_back():
    prepared = prepare(from_proto(normalized()))
    feeds = [{"input": 9 * samples(normalized(), 16)}]

    result = equalize(prepared, feeds)

    before, after, again = (
        run_ort(model.to_proto(), feeds[0])[0].astype(np.float64)
        for model in (prepared, result.model, original(result.model))
    )
    error = np.abs(after - before).max()
    assert error > 1e-3 * np.abs(before).max()
    assert result.absorption_cost[0].max_abs_diff == pytest.approx(error, rel=1e-2)
    assert np.abs(again - before).max() < 1e-5 * np.abs(before).max()


def test_without_statistics_the_smallest_value_on_the_data_is_absorbed():
    g = _Graph(2)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 1, 1), g.constant("b1", HIGH)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 5, 4, 3, 3)], "output")
    network = g.model(["N", 3, 6, 6], ["N", 5, 4, 4])
    prepared = prepare(from_proto(network))
    feeds = [{"input": samples(network, 3, seed=i)} for i in range(2)]

    result, without = equalize(prepared, feeds), equalize(prepared)

    assert (result.absorbed, without.absorbed) == (("n_c1",), ())
    inputs = np.concatenate([one["input"] for one in feeds])
    w1, b1 = (values(result.model)[name].astype(np.float64) for name in ("w1", "b1"))
    lifted = np.einsum("oi,nihw->nohw", w1[:, :, 0, 0], inputs) + b1[:, None, None]
    smallest = lifted.min(axis=(0, 2, 3))
    assert np.abs(smallest[:2]).max() < 1e-5  # what was above zero touches it
    assert smallest[2:].max() < -1e-3
    before, after = (run_ort(m.to_proto(), {"input": inputs})[0] for m in (prepared, result.model))
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


HIGH = np.float32([20, 30, 0, -1])


@pytest.mark.parametrize(
    "network",
    [
        lambda: normalized("Clip"),  # cuts above, too
        lambda: normalized("Sigmoid"),
        lambda: normalized(pads=[1, 1, 1, 1]),  # the zeros around it are not lifted
    ],
)
def test_what_a_shift_does_not_pass_is_left_alone(network):
    prepared = prepare(from_proto(network()))

    result = equalize(prepared, relu6="keep")

    assert result.absorbed == ()


def test_what_is_added_to_elsewhere_is_left_alone():
    g = _Graph(2)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 1, 1), g.constant("b1", HIGH)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 4, 4, 1, 1)], "c2")
    g.node("Add", ["c2", "r1"], "a")
    g.node("Conv", ["a", g.weight("w3", 4, 4, 1, 1)], "output")
    network = g.model(["N", 3, 6, 6], ["N", 4, 6, 6])

    result = equalize(prepare(from_proto(network)), [{"input": samples(network, 4)}])

    assert result.absorbed == ()


def test_channels_are_followed_through_what_moves_them():
    g = _Graph(2)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 1, 1), g.constant("b1", HIGH)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Concat", ["input", "r1"], "k", axis=1)
    g.node("ReduceMean", ["k"], "m", axes=[2, 3], keepdims=0)
    g.node("Gemm", ["m", g.weight("w2", 7, 5), g.weight("b2", 1, 5)], "output")
    network = g.model(["N", 3, 6, 6], ["N", 5])
    prepared = prepare(from_proto(network))
    feeds = [{"input": samples(network, 4)}]

    result = equalize(prepared, feeds)

    assert result.absorbed == ("n_c1",)
    assert values(result.model)["b2"].shape == (1, 5)
    before, after = (run_ort(m.to_proto(), feeds[0])[0] for m in (prepared, result.model))
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
