"""Gradients of elementwise ops: ``dx = dy * slope``.

Formulas: the derivative of each op's definition in https://onnx.ai/onnx/operators/. At a kink, the
derivative of one side is used, as in training frameworks. Round, Floor, Ceil and Sign have the
derivative 0 wherever it is defined, so they pass no gradient. (A straight-through gradient would be
correct only for quantizers, which are FakeQuantize here.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.model import constant
from onnxqat.preparation.editing import scalar
from onnxqat.train.lowering.gradient import Gradient, Refusal, rank_of, static_shape, summed_to

__all__ = [
    "SLOPES",
    "ceiling",
    "clip",
    "dropout",
    "leaky_relu",
    "mod",
    "prelu",
    "slope_gradient",
    "where",
]

POSITIVE = """
    steep = Mul(x, big)
    positive = Clip(steep, zero, one)
    negative = Sub(one, positive)
"""

# The text that defines ``slope``, and the attributes that it reads, with their defaults.
SLOPES: dict[str, tuple[str, dict[str, float]]] = {
    "Acos": ("xx = Mul(x, x) r = Sub(one, xx) q = Sqrt(r) n = Neg(q) slope = Reciprocal(n)", {}),
    "Acosh": ("xx = Mul(x, x) r = Sub(xx, one) q = Sqrt(r) slope = Reciprocal(q)", {}),
    "Asin": ("xx = Mul(x, x) r = Sub(one, xx) q = Sqrt(r) slope = Reciprocal(q)", {}),
    "Asinh": ("xx = Mul(x, x) r = Add(xx, one) q = Sqrt(r) slope = Reciprocal(q)", {}),
    "Atan": ("xx = Mul(x, x) r = Add(xx, one) slope = Reciprocal(r)", {}),
    "Atanh": ("xx = Mul(x, x) r = Sub(one, xx) slope = Reciprocal(r)", {}),
    "Ceil": ("slope = Identity(zero)", {}),
    "Celu": (
        f"""{POSITIVE} r = Div(y, alpha) e = Add(r, one) n = Mul(negative, e)
        slope = Add(positive, n)""",
        {"alpha": 1.0},
    ),
    "Cosh": ("slope = Sinh(x)", {}),
    "Elu": (
        f"{POSITIVE} e = Add(y, alpha) n = Mul(negative, e) slope = Add(positive, n)",
        {"alpha": 1.0},
    ),
    "Floor": ("slope = Identity(zero)", {}),
    "Gelu": (  # approximate = tanh: x * (1 + t) / 2, t = tanh(c * (x + cubic * x^3))
        """c = Constant<value_float = 0.7978846>() cubic = Constant<value_float = 0.044715>()
        triple = Constant<value_float = 0.134145>()
        xx = Mul(x, x) k = Mul(xx, cubic) k1 = Add(k, one) kx = Mul(k1, x) u = Mul(kx, c)
        t = Tanh(u) tt = Mul(t, t) r = Sub(one, tt) l = Mul(xx, triple) l1 = Add(l, one)
        du = Mul(l1, c) xdu = Mul(x, du) bend = Mul(xdu, r) up = Add(t, one) all = Add(up, bend)
        slope = Mul(all, half)""",
        {},
    ),
    "HardSigmoid": (
        """r = Sub(one, y) yr = Mul(y, r) steep = Mul(yr, big) inside = Clip(steep, zero, one)
        slope = Mul(inside, alpha)""",
        {"alpha": 0.2, "beta": 0.5},
    ),
    "HardSwish": (  # x * gate, gate = clip(x / 6 + 1 / 2, 0, 1)
        """sixth = Constant<value_float = 0.16666667>()
        x6 = Mul(x, sixth) g = Add(x6, half) gate = Clip(g, zero, one)
        r = Sub(one, gate) gr = Mul(gate, r) steep = Mul(gr, big) inside = Clip(steep, zero, one)
        rising = Mul(x6, inside) slope = Add(gate, rising)""",
        {},
    ),
    "Mish": (  # x * t, t = tanh(softplus(x))
        """s = Softplus(x) t = Tanh(s) tt = Mul(t, t) r = Sub(one, tt) g = Sigmoid(x)
        xg = Mul(x, g) xgr = Mul(xg, r) slope = Add(t, xgr)""",
        {},
    ),
    "Round": ("slope = Identity(zero)", {}),
    "Selu": (
        f"""{POSITIVE} p = Mul(positive, gamma) ag = Mul(alpha, gamma) e = Add(y, ag)
        n = Mul(negative, e) slope = Add(p, n)""",
        {"alpha": 1.6732632, "gamma": 1.050701},
    ),
    "Shrink": (
        """a = Abs(x) r = Sub(a, lambd) steep = Mul(r, big) slope = Clip(steep, zero, one)""",
        {"lambd": 0.5},
    ),
    "Sign": ("slope = Identity(zero)", {}),
    "Sinh": ("slope = Cosh(x)", {}),
    "Softplus": ("slope = Sigmoid(x)", {}),
    "Softsign": ("a = Abs(x) r = Add(a, one) rr = Mul(r, r) slope = Reciprocal(rr)", {}),
    "Tan": ("yy = Mul(y, y) slope = Add(yy, one)", {}),
    "ThresholdedRelu": (
        "r = Sub(x, alpha) steep = Mul(r, big) slope = Clip(steep, zero, one)",
        {"alpha": 1.0},
    ),
}


def slope_gradient(op_type: str) -> Callable[[gs.Node], Gradient]:
    """Return a function that makes the gradient of an op in `SLOPES`."""
    text, defaults = SLOPES[op_type]

    def make(node: gs.Node) -> Gradient:
        constants = {name: float(node.attrs.get(name, value)) for name, value in defaults.items()}
        text_of_dx = f"{text} dx = Mul(dy, slope)"
        return Gradient(inputs=("x",), text=text_of_dx, constants=constants)

    return make


def clip(node: gs.Node) -> Gradient | None:
    """Return dx = dy * (low < y < high); None if a limit is missing, computed or infinite.

    The mask is computed from y, so that x need not be kept.
    """
    limits = [scalar(tensor) for tensor in node.inputs[1:]]
    if len(limits) < 2 or None in limits or not np.isfinite(limits).all():
        return None
    text = """above = Sub(y, low) below = Sub(high, y) room = Mul(above, below)
    inside = HardSigmoid<alpha = 1e30, beta = 0.0>(room) dx = Mul(dy, inside)"""
    return Gradient(inputs=("x", "low", "high"), text=text)


def ceiling(node: gs.Node) -> float | None:
    """Return the upper limit of a Clip from 0, or infinity for a Relu; None for other nodes."""
    if node.op == "Relu":
        return math.inf
    limits = [scalar(tensor) for tensor in node.inputs[1:]] if node.op == "Clip" else []
    if len(limits) < 2 or None in limits or limits[0] != 0 or not 0 < limits[1] < np.inf:
        return None
    return float(limits[1])


def straight() -> Gradient:
    """Return dx = dy, for a Relu or Clip whose mask is included in its point."""
    return Gradient(inputs=("x", "low", "high"), text="dx = Identity(dy)")


def dropout(node: gs.Node) -> Gradient:
    """Return dx = dy: a Dropout of an exported model passes on its input."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is not None and mode.name and (scalar(mode) is None or scalar(mode)):
        raise Refusal("it is in training mode; export the model for inference")
    return Gradient(inputs=("x", "ratio", "training_mode"), text="dx = Identity(dy)")


def leaky_relu(node: gs.Node) -> gs.Node:
    """Return a PRelu with the same slope: the same products by a kernel that is 20 times faster."""
    slope = constant(f"{node.name}/slope", np.array(node.attrs.get("alpha", 0.01), np.float32))
    return gs.Node("PRelu", node.name, {}, [node.inputs[0], slope], list(node.outputs))


def prelu(node: gs.Node) -> Gradient:
    """Return dx = dy * (1 if x > 0 else slope), and dslope = sum of dy * x over negative x."""
    inputs, value = ("x", "slope"), scalar(node.inputs[1])
    if value is not None and 0 <= value < 1:  # y has the sign of x
        text = "steep = Mul(y, big) s = Clip(steep, slope, one) dx = Mul(dy, s)"
        return Gradient(inputs=inputs, text=text)
    rank = rank_of(node.inputs[0], "input")
    total, shape = summed_to(node.inputs[1], rank, "terms", "dslope")
    text = f"""{POSITIVE} n = Mul(negative, slope) s = Add(positive, n) dx = Mul(dy, s)
    below = Mul(x, negative) terms = Mul(dy, below) {total}"""
    return Gradient(inputs=inputs, text=text, constants={"dslope_shape": shape})


def where(node: gs.Node) -> Gradient:
    """Return dy where an operand was selected, summed if the operand was broadcast."""
    rank = rank_of(node.outputs[0], "output")
    text = "taken = Where(condition, dy, zero) left = Where(condition, zero, dy) "
    constants = {}
    for name, tensor, terms in zip("ab", node.inputs[1:], ("taken", "left"), strict=True):
        if not isinstance(tensor, gs.Constant):
            line, constants[f"d{name}_shape"] = summed_to(tensor, rank, terms, f"d{name}")
            text += line
    return Gradient(inputs=("condition", "a", "b"), text=text, constants=constants)


def mod(node: gs.Node) -> Gradient:
    """Return dx = dy: x - y * floor(x / y) has slope 1 in x, which has the shape of the result."""
    if static_shape(node.inputs[0], "input") != static_shape(node.outputs[0], "output"):
        raise Refusal("its first input is broadcast")
    return Gradient(inputs=("x", "divisor"), text="dx = Identity(dy)")
