"""Optimizers on flat numpy buffers.

An optimizer turns gradients into *directions*, which `onnxqat.train.optimization.updater` applies.
Buffers are processed in chunks that fit the CPU's cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from onnxqat.qparams import FloatArray

__all__ = ["Adam", "Optimizer", "Sgd", "clip"]

CHUNK = 1 << 15  # floats; a few such chunks fit the level 2 cache of a core


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


class Optimizer(ABC):
    """Turns a flat gradient into a flat direction, keeping state between steps.

    Attributes
    ----------
    buffers : dict of str to float32 array of shape (total,)
        The state, by name.
    steps : int
        The number of directions computed so far.
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
            The gradient; it is overwritten with the direction.
        """


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1).

    Directions have a magnitude of about 1 for any size of the gradient.
    """

    def __init__(
        self, size: int, *, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-12
    ) -> None:
        super().__init__(size, "mean", "square")
        self.beta1, self.beta2, self.epsilon = beta1, beta2, np.float32(epsilon)

    def direct(self, gradient: FloatArray) -> FloatArray:
        """Return ``mean / (sqrt(square) + epsilon)``, with bias correction of both moments."""
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
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, in PyTorch's form)."""

    def __init__(self, size: int, *, momentum: float = 0.9, nesterov: bool = False) -> None:
        super().__init__(size, "velocity")
        self.momentum, self.nesterov = np.float32(momentum), nesterov

    def direct(self, gradient: FloatArray) -> FloatArray:
        """Return ``velocity = momentum * velocity + gradient``.

        With ``nesterov``, the direction is ``momentum * velocity + gradient`` with that velocity.
        """
        self.steps += 1
        for part in _chunks(gradient.size):
            velocity = self.buffers["velocity"][part]
            velocity *= self.momentum
            velocity += gradient[part]
            if self.nesterov:
                gradient[part] += self.momentum * velocity
            else:
                gradient[part] = velocity
        return gradient


def clip(gradient: FloatArray, *, norm: float | None = None, value: float | None = None) -> None:
    """Clip a gradient in place: each element to ``value``, then the whole gradient to ``norm``.

    ``norm`` limits the Euclidean norm over all parameters (Pascanu et al. 2013,
    https://arxiv.org/abs/1211.5063, algorithm 1).
    """
    if value is not None:
        np.clip(gradient, np.float32(-value), np.float32(value), out=gradient)
    if norm is not None:
        length = math.sqrt(math.fsum(_square_sums(gradient)))
        if length > norm:
            gradient *= np.float32(norm / length)


def _square_sums(gradient: FloatArray) -> Iterator[float]:
    for part in _chunks(gradient.size):
        wide = gradient[part].astype(np.float64)
        yield float(wide @ wide)
