"""Normalisations over ranks, axes, epsilon and opsets."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.train.lowering.gradient import Refusal
from tests.derivatives import check_node, gradients, one_node

TOLERANCE = 1e-3  # sums of float32 that cancel


def normal(*shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def column(values, rank):
    return values.reshape(-1, *[1] * (rank - 2))


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (3, 2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_instance_normalization(shape, epsilon):
    inputs = {"x": normal(*shape), "scale": normal(shape[1], seed=1), "b": normal(shape[1], seed=2)}
    axes = tuple(range(2, len(shape)))

    def oracle(feeds):
        x, scale, b = feeds["x"], column(feeds["scale"], len(shape)), column(feeds["b"], len(shape))
        n = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
        return [n * scale + b]

    check_node("InstanceNormalization", inputs, tolerance=TOLERANCE, oracle=oracle, epsilon=epsilon)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 3, 4)], ids=str)
def test_group_normalization(shape, opset, groups):
    count = groups if opset < 21 else 6
    inputs = {"x": normal(*shape), "scale": normal(count, seed=1), "b": normal(count, seed=2)}

    def oracle(feeds):
        v = feeds["x"].reshape(shape[0], groups, -1)
        n = (v - v.mean(2, keepdims=True)) / np.sqrt(v.var(2, keepdims=True) + 1e-5)
        view = n.reshape(shape[0], count, -1) * feeds["scale"][:, None] + feeds["b"][:, None]
        return [view.reshape(shape)]

    check_node(
        "GroupNormalization",
        inputs,
        tolerance=TOLERANCE,
        oracle=oracle,
        opset=opset,
        num_groups=groups,
    )


@pytest.mark.parametrize(
    ("axis", "bias", "opset"),
    [(-1, 1, 17), (2, 0, 17), (1, 1, 17), (-2, 0, 17), (0, 1, 17), (1, 1, 21)],
)
def test_layer_normalization(axis, bias, opset):
    shape = (2, 3, 4)
    rest = shape[axis:]
    inputs = {"x": normal(*shape), "scale": normal(*rest, seed=1)}
    if bias:
        inputs["b"] = normal(*rest, seed=2)
    axes = tuple(range(axis % 3, 3))

    def oracle(feeds):
        x = feeds["x"]
        n = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
        return [n * feeds["scale"] + feeds.get("b", 0)]

    check_node(
        "LayerNormalization", inputs, tolerance=TOLERANCE, oracle=oracle, axis=axis, opset=opset
    )


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 7), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("learned", [["x"], ["scale", "b"], ["x", "scale", "b"]], ids="-".join)
def test_batch_normalization_of_an_exported_model(shape, learned):
    inputs = {"x": normal(*shape), "scale": normal(3, seed=1), "b": normal(3, seed=2)}
    statistics = {"mean": normal(3, seed=3), "variance": np.float32([0.5, 1, 2])}
    check_node("BatchNormalization", inputs, statistics, learned, epsilon=1e-3)


def test_batch_normalization_in_training_mode_is_refused():
    inputs = {"x": normal(2, 3, 4), "scale": normal(3), "b": normal(3)}
    statistics = {"mean": normal(3), "variance": np.ones(3, np.float32)}
    model = one_node("BatchNormalization", inputs, statistics, training_mode=1, outputs=3)
    with pytest.raises(Refusal, match="it is in training mode"):
        gradients(model, inputs, ["x"], [])


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 3, 2, 2)], ids=str)
def test_lrn(shape, size):
    attributes = {"alpha": 0.5, "beta": 0.75, "bias": 1.5}

    def oracle(feeds):
        x = feeds["x"]
        padded = np.pad(x**2, ((0, 0), ((size - 1) // 2, size // 2), (0, 0), (0, 0)))
        sums = sum(padded[:, i : i + shape[1]] for i in range(size))
        return [x / (1.5 + 0.5 / size * sums) ** 0.75]

    check_node("LRN", {"x": normal(*shape)}, size=size, oracle=oracle, **attributes)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_lp_normalization(axis, p):
    def oracle(feeds):
        x = feeds["x"]
        return [x / np.linalg.norm(x, ord=p, axis=axis, keepdims=True)]

    check_node("LpNormalization", {"x": normal(3, 4, 5)}, oracle=oracle, axis=axis, p=p)
