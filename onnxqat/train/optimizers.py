"""Optimizers on flat numpy buffers.

An optimizer turns gradients into *directions*; `onnxqat.train.updater` applies them.
Buffers are walked in chunks that stay in the processor's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from onnxqat.qparams import FloatArray

__all__ = ["AdamW", "Optimizer", "Sgd"]

CHUNK = 1 << 15  # floats; a few such chunks fit a core's second-level cache


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


class Optimizer(ABC):
    """Turns a flat gradient into a flat direction, keeping state between steps.

    Attributes
    ----------
    buffers : dict of str to float32 array of shape (total,)
        The state, by name.
    steps : int
        How many directions were given.
    """

    def __init__(self, size: int, *names: str) -> None:
        self.buffers: dict[str, FloatArray] = {n: np.zeros(size, np.float32) for n in names}
        self.steps = 0

    @abstractmethod
    def direct(self, gradient: FloatArray) -> FloatArray:
        """Return the direction of descent for one step.

        Parameters
        ----------
        gradient : float32 of shape (total,)
            It is overwritten with the direction.
        """


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, alg. 2).

    The decay is applied in `onnxqat.train.updater`. Directions are about 1, whatever the gradient.
    """

    def __init__(
        self, size: int, *, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-12
    ) -> None:
        super().__init__(size, "mean", "square")
        self.beta1, self.beta2, self.epsilon = beta1, beta2, np.float32(epsilon)

    def direct(self, gradient: FloatArray) -> FloatArray:
        """Return ``mean / (sqrt(square) + epsilon)``, both corrected for their start at zero."""
        self.steps += 1
        beta1, beta2 = np.float32(self.beta1), np.float32(self.beta2)
        rest1, rest2 = np.float32(1 - self.beta1), np.float32(1 - self.beta2)
        mean_correction = np.float32(1 / (1 - self.beta1**self.steps))
        square_correction = np.float32(1 / (1 - self.beta2**self.steps))
        for part in _chunks(gradient.size):
            g, mean, square = (a[part] for a in (gradient, *self.buffers.values()))
            mean *= beta1
            mean += rest1 * g
            square *= beta2
            square += rest2 * g * g
            np.multiply(square, square_correction, out=g)
            np.sqrt(g, out=g)
            g += self.epsilon
            np.divide(mean * mean_correction, g, out=g)
        return gradient


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, as PyTorch writes it)."""

    def __init__(self, size: int, *, momentum: float = 0.9) -> None:
        super().__init__(size, "velocity")
        self.momentum = np.float32(momentum)

    def direct(self, gradient: FloatArray) -> FloatArray:
        """Return ``velocity = momentum * velocity + gradient``."""
        self.steps += 1
        for part in _chunks(gradient.size):
            velocity = self.buffers["velocity"][part]
            velocity *= self.momentum
            velocity += gradient[part]
            gradient[part] = velocity
        return gradient
