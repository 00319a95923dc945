from __future__ import annotations

import numpy as np

from onnxqat.train.optimizers import AdamW, Sgd


def test_adam_directions_are_the_papers():
    """Against the formulas in float64, over a buffer longer than one chunk."""
    rng = np.random.default_rng(0)
    size = 70_001
    optimizer = AdamW(size)
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
    np.testing.assert_array_equal(AdamW(3).direct(np.zeros(3, np.float32)), 0)


def test_momentum_is_pytorchs():
    optimizer = Sgd(2, momentum=0.5)
    optimizer.direct(np.float32([1, 2]))
    actual = optimizer.direct(np.float32([1, 0]))

    np.testing.assert_array_equal(actual, np.float32([1.5, 1.0]))
