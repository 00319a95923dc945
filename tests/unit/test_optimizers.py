from __future__ import annotations

import math

import numpy as np
import pytest

from onnxqat.train.optimization.optimizers import Adam, Sgd, clip


def test_adam_directions_are_the_papers():
    """Against the formulas in float64, over a buffer longer than one chunk."""
    rng = np.random.default_rng(0)
    size = 70_001
    optimizer = Adam(size)
    mean, square = np.zeros(size), np.zeros(size)
    for step in range(1, 6):
        gradient = rng.normal(size=size).astype(np.float32) * np.float32(10.0**-step)
        mean = 0.9 * mean + 0.1 * gradient.astype(np.float64)
        square = 0.999 * square + 0.001 * gradient.astype(np.float64) ** 2
        expected = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-12)
        actual = optimizer.direct(gradient)

        # a handful of float32 roundings; where mean cancels, of its parts
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_zero_gradient_gives_zero_direction():
    np.testing.assert_array_equal(Adam(3).direct(np.zeros(3, np.float32)), 0)


def test_momentum_is_pytorchs():
    optimizer = Sgd(2, momentum=0.5)
    optimizer.direct(np.float32([1, 2]))
    actual = optimizer.direct(np.float32([1, 0]))

    np.testing.assert_array_equal(actual, np.float32([1.5, 1.0]))


def test_nesterov_is_pytorchs():
    """https://pytorch.org/docs/stable/generated/torch.optim.SGD.html, dampening 0."""
    rng = np.random.default_rng(0)
    optimizer, velocity = Sgd(40_000, momentum=0.9, nesterov=True), np.zeros(40_000)
    for _ in range(4):
        gradient = rng.normal(size=40_000).astype(np.float32)
        velocity = 0.9 * velocity + gradient
        expected = gradient + 0.9 * velocity

        np.testing.assert_allclose(optimizer.direct(gradient), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [3, 100_000])
def test_a_gradient_is_cut_to_its_length(size):
    gradient = np.random.default_rng(0).normal(size=size).astype(np.float32)
    length, before = math.sqrt((gradient.astype(np.float64) ** 2).sum()), gradient.copy()
    clip(gradient, norm=2 * length)
    np.testing.assert_array_equal(gradient, before)
    clip(gradient, norm=length / 4)

    np.testing.assert_allclose(gradient, before / 4, rtol=1e-6)


def test_numbers_are_cut_before_the_length():
    gradient = np.float32([3, -4, 0.5])
    clip(gradient, value=1.0)
    np.testing.assert_array_equal(gradient, np.float32([1, -1, 0.5]))
    gradient = np.float32([30, -40, 0])
    clip(gradient, value=1.0, norm=1.0)

    np.testing.assert_allclose(gradient, [math.sqrt(0.5), -math.sqrt(0.5), 0], rtol=1e-6)
