"""SmoothQuant: ranges move from a normalization into the MatMuls behind it, by its formula."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.repair import equalize
from onnxqat.repair.migration import STRENGTHS
from tests.networks import _Graph, samples
from tests.oracles import run_ort

GAMMA = np.ones(16, np.float32)
GAMMA[[3, 11]] = 60, 25  # two channels far above the others


def native(g: _Graph) -> None:
    shift = [g.weight("beta", 16)]
    g.node("LayerNormalization", ["input", g.constant("gamma", GAMMA), *shift], "l", axis=-1)


def decomposed(g: _Graph) -> None:
    """Return a LayerNormalization as exporters write it below opset 17."""
    g.node("ReduceMean", ["input"], "mean", axes=[-1])
    g.node("Sub", ["input", "mean"], "d")
    g.node("Pow", ["d", g.constant("two", np.float32(2))], "squares")
    g.node("ReduceMean", ["squares"], "variance", axes=[-1])
    g.node("Add", ["variance", g.constant("epsilon", np.float32(1e-5))], "e")
    g.node("Sqrt", ["e"], "root")
    g.node("Div", ["d", "root"], "n")
    g.node("Mul", ["n", g.constant("gamma", GAMMA)], "m")
    g.node("Add", ["m", g.weight("beta", 16)], "l")


def rms(g: _Graph) -> None:
    g.node("Mul", ["input", "input"], "squares")
    g.node("ReduceMean", ["squares"], "mean", axes=[-1])
    g.node("Add", ["mean", g.constant("epsilon", np.float32(1e-5))], "e")
    g.node("Sqrt", ["e"], "root")
    g.node("Div", ["input", "root"], "n")
    g.node("Mul", [g.constant("gamma", GAMMA), "n"], "l")


def block(norm, *, residual=False):
    g = _Graph(3)
    norm(g)
    for name in ("q", "k"):
        g.node("MatMul", ["l", g.weight(f"w{name}", 16, 8)], name)
    g.node("Mul", ["q", "k"], "product")
    tail = "product"
    if residual:
        g.node("ReduceMean", ["l"], "rest", axes=[-1])
        tail = g.node("Add", ["product", "rest"], "sum")
    g.node("Identity", [tail], "output")
    return g.model(["N", 6, 16], ["N", 6, 8])


def values(model):
    return {name: t.values for name, t in model.graph.tensors().items() if hasattr(t, "values")}


def error_at_8_bits(x, matrix):
    """Return the squared error of a product whose factors have one scale each."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    rounded = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    size = np.abs(matrix).max() / 127
    return np.square(rounded @ (np.round(matrix / size) * size) - x @ matrix).sum()


@pytest.mark.parametrize(
    ("norm", "strengths"),
    [(native, STRENGTHS), (decomposed, STRENGTHS), (rms, STRENGTHS), (native, (0.75,))],
)
def test_scales_are_those_of_the_paper_at_the_alpha_with_the_least_error(
    norm, strengths, monkeypatch
):
    monkeypatch.setattr("onnxqat.repair.migration.STRENGTHS", strengths)
    network = block(norm)
    prepared = prepare(from_proto(network))
    feeds = [{"input": samples(network, 5, seed=i)} for i in range(2)]

    result = equalize(prepared, feeds)

    (found,) = result.migrations
    assert found.norm == "n_l"
    before, after = values(prepared), values(result.model)
    inputs = np.concatenate([one["input"] for one in feeds])
    x = activation(prepared, inputs)
    largest = np.abs(x).max(axis=0)
    weights = [before[w].astype(np.float64) for w in ("wq", "wk")]
    rows = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
    signal = sum(np.square(x @ w).sum() for w in weights)
    errors = {}
    for alpha in strengths:
        s = largest**alpha / rows ** (1 - alpha)
        errors[alpha] = sum(error_at_8_bits(x / s, w * s[:, None]) for w in weights) / signal
    assert found.alpha == min(errors, key=errors.get)
    assert found.after == pytest.approx(errors[found.alpha], rel=0.02)  # scales are in float32
    assert found.before == pytest.approx(
        sum(error_at_8_bits(x, w) for w in weights) / signal, rel=0.02
    )
    assert found.after < found.before / 2
    s = largest**found.alpha / rows ** (1 - found.alpha)
    np.testing.assert_allclose(after["gamma"], before["gamma"] / s, rtol=1e-5)
    if "beta" in before:
        np.testing.assert_allclose(after["beta"], before["beta"] / s, rtol=1e-5)
    for w in ("wq", "wk"):
        np.testing.assert_allclose(after[w], before[w] * s[:, None], rtol=1e-5)


def activation(model, inputs):
    """Return what the MatMuls read, as rows, in float64."""
    copy = model.copy()
    copy.graph.outputs = [copy.graph.tensors()["l"]]
    copy.graph.cleanup()
    return run_ort(copy.to_proto(), {"input": inputs})[0].reshape(-1, 16).astype(np.float64)


@pytest.mark.parametrize("norm", [native, decomposed, rms])
def test_the_function_stays(norm):
    network = block(norm)
    prepared = prepare(from_proto(network))
    inputs = samples(network, 5)

    result = equalize(prepared, [{"input": inputs}])

    before, after = (run_ort(m.to_proto(), {"input": inputs})[0] for m in (prepared, result.model))
    assert result.migrations
    bound = 1e-5 * np.abs(before).max()
    assert np.abs(after - before).max() <= bound
    assert 0 < result.differences[0].max_abs_diff <= bound


def test_what_is_left_alone_says_why():
    network = block(native, residual=True)
    shared = equalize(prepare(from_proto(network)), [{"input": samples(network, 4)}])
    unknown = equalize(prepare(from_proto(block(native))))

    reasons = [{s.node: s.reason for s in one.skips}["n_l"] for one in (shared, unknown)]
    assert shared.migrations == unknown.migrations == ()
    assert "'n_rest' (ReduceMean) reads it" in reasons[0]
    assert "Give data" in reasons[1]


def test_even_channels_stay():
    g = _Graph(3)
    g.node("LayerNormalization", ["input", g.constant("gamma", np.ones(16, np.float32))], "l")
    g.node("MatMul", ["l", g.constant("w", np.eye(16, dtype=np.float32))], "output")
    network = g.model(["N", 6, 16], ["N", 6, 16])
    even = np.sign(samples(network, 4))
    even[..., ::2], even[..., 1::2] = 1, -1

    result = equalize(prepare(from_proto(network)), [{"input": even}])

    assert result.migrations == ()
    assert "no alpha reduces the error" in {s.node: s.reason for s in result.skips}["n_l"]
