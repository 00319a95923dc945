"""Learned rounding of weights: AdaRound (Nagel et al. 2020, https://arxiv.org/abs/2004.10568).

For each element of a weight, a variable ``V`` determines the position between the level below and
the level above (equations 22 to 24)::

    h(V)      = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)      zeta = 1.1, gamma = -0.1
    w(V)      = clip(floor(w / s) + h(V), qmin - z, qmax - z) * s
    f_reg(V)  = sum(1 - |2 h(V) - 1| ** beta)

At the start, ``w(V)`` is the float weight. At the end, the weight is rounded up where ``V >= 0``
(``h >= 1 / 2``), and down elsewhere. The scale does not change.

In the training form of a block, the input with the name of the weight is its ``V``. Options that
name the weight, such as a learning rate, therefore apply to its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import constant
from onnxqat.qparams import FloatArray, QuantParams, QuantSpec, aligned, quantized_range

__all__ = ["AdaRound", "rectified_sigmoid", "regularizer", "regularizer_gradient"]

ZETA, GAMMA = 1.1, -0.1
DECIDED = 16.0  # a variable this far from 0 has h = 0 or h = 1 exactly
TIE = 1e-6  # distance below 0 for ties that QuantizeLinear rounds to the even level below

Floats = NDArray[Any]  # float32 or float64


def rectified_sigmoid(v: Floats) -> Floats:
    """Return ``h(V)``, equation 23, in the dtype of ``v``."""
    h: Floats = np.clip(_sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)
    return h


def regularizer(v: Floats, beta: float) -> float:
    """Return the mean of ``1 - |2 h(V) - 1| ** beta`` (equation 24 per weight)."""
    return float(np.mean(1 - np.abs(2 * rectified_sigmoid(v) - 1) ** beta))


def regularizer_gradient(v: Floats, beta: float) -> Floats:
    """Return the gradient of `regularizer`, same shape and dtype as ``v``."""
    sigmoid, h = _sigmoid(v), rectified_sigmoid(v)
    slope = np.where((h > 0) & (h < 1), sigmoid * (1 - sigmoid) * (ZETA - GAMMA), 0)
    side = 2 * h - 1
    power = np.abs(side) ** (beta - 1)
    gradient: Floats = -2 * beta / v.size * power * np.sign(side) * slope
    return gradient.astype(v.dtype)


def _sigmoid(v: Floats) -> Floats:
    sigmoid: Floats = (1 + np.tanh(v / 2)) / 2  # does not overflow
    return sigmoid


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaRound:
    """The two levels between which each element of a weight can be rounded.

    Attributes
    ----------
    weight : float32 array
        The weight at the start.
    below : float32 of the same shape
        The level below, clipped to the quantized range, minus the zero_point.
    free : float32 of the same shape
        1 if the level above is also in the quantized range, 0 if the weight is clipped.
    scale : float32
        The scale, in a shape that broadcasts to the weight.
    """

    weight: FloatArray
    below: FloatArray
    free: FloatArray
    scale: FloatArray

    @classmethod
    def of(cls, weight: FloatArray, params: QuantParams, spec: QuantSpec) -> AdaRound:
        """Return the levels of a weight with these parameters."""
        scale, zero_point = (
            aligned(values, weight.ndim, spec.axis) for values in (params.scale, params.zero_point)
        )
        low, high = (
            np.float32(end) - zero_point.astype(np.float32)
            for end in quantized_range(spec, signed=params.signed)
        )
        floor = np.floor(weight / scale)
        return cls(
            weight=weight,
            below=np.clip(floor, low, high).astype(np.float32),
            free=((floor >= low) & (floor < high)).astype(np.float32),
            scale=np.asarray(scale),
        )

    def start(self) -> FloatArray:
        """Return the variables for the float weight, float32 of its shape.

        Their signs agree with the rounding of QuantizeLinear.
        """
        position = (self.weight / self.scale).astype(np.float64)
        above = np.clip(position - np.floor(position), 0, 1)
        share = (above - GAMMA) / (ZETA - GAMMA)
        v = np.log(share / (1 - share)).astype(np.float32)
        up = np.rint(self.weight / self.scale) > np.floor(self.weight / self.scale)
        return np.where(up, np.maximum(v, 0), np.minimum(v, -TIE)).astype(np.float32)

    @staticmethod
    def decided(v: FloatArray) -> FloatArray:
        """Return variables with which the graph computes the rounded weight, bit for bit."""
        return np.where(v >= 0, np.float32(DECIDED), np.float32(-DECIDED))

    def rounded(self, v: FloatArray) -> FloatArray:
        """Return the rounded weight: values on its grid, float32 of its shape."""
        return (self.below + self.free * (v >= 0)).astype(np.float32) * self.scale

    def nodes(self, v: gs.Tensor, target: gs.Tensor) -> list[gs.Node]:
        """Return nodes that compute the weight ``target`` from its variables."""
        prefix = f"{v.name}/rounding"
        numbers = {"spread": ZETA - GAMMA, "gamma": GAMMA, "zero": 0.0, "one": 1.0}
        arrays = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
        arrays |= {"below": self.below, "free": self.free, "scale": self.scale}
        given = {name: constant(f"{prefix}/{name}", value) for name, value in arrays.items()}
        steps = (
            ("Sigmoid", ()),
            ("Mul", ("spread",)),
            ("Add", ("gamma",)),
            ("Clip", ("zero", "one")),
            ("Mul", ("free",)),
            ("Add", ("below",)),
            ("Mul", ("scale",)),
        )
        made: list[gs.Node] = []
        value = v
        for number, (op, others) in enumerate(steps):
            name = f"{prefix}/{number}"
            last = number == len(steps) - 1
            output = target if last else gs.Variable(name, np.float32, self.weight.shape)
            inputs = [value, *(given[other] for other in others)]
            made.append(gs.Node(op, name, {}, inputs, [output]))
            value = output
        return made
