"""Gradients of elementwise ops with one operand, or with two operands that broadcast.

Formulas: the derivative of each op's definition in https://onnx.ai/onnx/operators/, times dy. The
gradient of a broadcast operand is summed over the axes along which it was broadcast.

==========  ====================================================================================
Abs         dy * sign(x)
Clip        dy where low <= x <= high, else 0
Cos, Sin    -dy * sin(x), dy * cos(x)
Erf         dy * 2 / sqrt(pi) * exp(-x^2)
Exp, Log    dy * y, dy / x
Gelu        dy * (F(x) + x * f(x)), with the distribution function F and the density f of the
            standard normal distribution (Hendrycks and Gimpel 2016,
            https://arxiv.org/abs/1606.08415)
Neg         -dy
Pow         dy * p * x^(p - 1), for x only (the exponent p gets no gradient)
Reciprocal  -dy * y^2
Relu        dy where y > 0, else 0
Sigmoid     dy * y * (1 - y)
Sqrt        dy / (2 * y)
Tanh        dy * (1 - y^2)
Add, Sub    dy; dy, -dy
Mul         dy * b, dy * a
Div         dy / b, -dy * y / b
Max, Min    dy for the selected operand; half of it for each where both are equal
==========  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx import TensorProto

from onnxqat.gradients.backward import CONTRIB, Backward

__all__ = ["ELEMENTWISE"]

Found = dict[int, str]


def _unary(dx: Callable[[Backward], str]) -> Callable[[Backward], Found]:
    return lambda b: {0: dx(b)}


def _gelu(b: Backward) -> str:
    if b.has("GeluGrad"):
        return b.op(f"{CONTRIB}.GeluGrad", b.dy, b.x)
    below = b.op("Erf", b.op("Mul", b.x, math.sqrt(0.5)))
    below = b.op("Mul", b.op("Add", below, 1.0), 0.5)
    exponent = b.op("Mul", b.op("Mul", b.x, b.x), -0.5)
    density = b.op("Mul", b.op("Exp", exponent), 1 / math.sqrt(2 * math.pi))
    slope = b.op("Add", below, b.op("Mul", b.x, density))
    return b.op("Mul", b.dy, slope)


def _erf(b: Backward) -> str:
    bell = b.op("Exp", b.op("Neg", b.op("Mul", b.x, b.x)))
    return b.op("Mul", b.op("Mul", b.dy, bell), 2 / math.sqrt(math.pi))


def _clip(b: Backward) -> str:
    """Return dy where x was not clipped."""
    moved = b.step(b.op("Abs", b.op("Sub", b.x, b.y)))
    return b.op("Mul", b.dy, b.op("Sub", 1.0, moved))


def _sigmoid(b: Backward) -> str:
    if b.has("SigmoidGrad"):
        return b.op(f"{CONTRIB}.SigmoidGrad", b.dy, b.y)
    return b.op("Mul", b.dy, b.op("Mul", b.y, b.op("Sub", 1.0, b.y)))


def _tanh(b: Backward) -> str:
    if b.has("TanhGrad"):
        return b.op(f"{CONTRIB}.TanhGrad", b.dy, b.y)
    return b.op("Mul", b.dy, b.op("Sub", 1.0, b.op("Mul", b.y, b.y)))


def _power(b: Backward) -> Found:
    """Return the gradient of the base; the exponent may be of any type."""
    known = b.value(b.input(1))
    if known is not None and known.size == 1 and known.item() == 2:
        return {0: b.summed_to(b.op("Mul", b.dy, b.op("Mul", b.x, 2.0)), b.x)}
    exponent = b.op("Cast", b.input(1), to=TensorProto.FLOAT)
    less = b.op("Sub", exponent, 1.0)
    slope = b.op("Mul", exponent, b.op("Pow", b.x, less))
    return {0: b.summed_to(b.op("Mul", b.dy, slope), b.x)}


def _sum(b: Backward) -> Found:
    return {i: b.summed_to(b.dy, b.input(i)) for i in b.wanted}


def _difference(b: Backward) -> Found:
    found = {i: b.summed_to(b.dy, b.input(i)) for i in b.wanted}
    return found | ({1: b.op("Neg", found[1], like=b.input(1))} if 1 in found else {})


def _product(b: Backward) -> Found:
    return {
        i: b.summed_to(b.op("Mul", b.dy, b.input(1 - i), like=b.y), b.input(i)) for i in b.wanted
    }


def _quotient(b: Backward) -> Found:
    found, part = {}, b.op("Div", b.dy, b.input(1))
    if 0 in b.wanted:
        found[0] = b.summed_to(part, b.x)
    if 1 in b.wanted:
        found[1] = b.summed_to(b.op("Neg", b.op("Mul", part, b.y)), b.input(1))
    return found


def _extremum(b: Backward) -> Found:
    """Return the gradients of Max and Min of two operands."""
    if len(b.node.input) != 2:
        raise b.unsupported("more than two operands")
    found = {}
    for i in b.wanted:
        own, other = b.input(i), b.input(1 - i)
        ahead = (own, other) if b.node.op_type == "Max" else (other, own)
        taken = b.step(b.op("Sub", *ahead), at_zero=0.5)
        found[i] = b.summed_to(b.op("Mul", b.dy, taken), own)
    return found


ELEMENTWISE: dict[str, Callable[[Backward], Found]] = {
    "Abs": _unary(lambda b: b.op("Mul", b.dy, b.op("Sign", b.x))),
    "Clip": _unary(_clip),
    "Cos": _unary(lambda b: b.op("Neg", b.op("Mul", b.dy, b.op("Sin", b.x)))),
    "Erf": _unary(_erf),
    "Exp": _unary(lambda b: b.op("Mul", b.dy, b.y)),
    "Gelu": _unary(_gelu),
    "Log": _unary(lambda b: b.op("Div", b.dy, b.x)),
    "Neg": _unary(lambda b: b.op("Neg", b.dy)),
    "Reciprocal": _unary(lambda b: b.op("Neg", b.op("Mul", b.dy, b.op("Mul", b.y, b.y)))),
    "Relu": _unary(lambda b: b.op("Mul", b.dy, b.step(b.y))),
    "Sigmoid": _unary(_sigmoid),
    "Sin": _unary(lambda b: b.op("Mul", b.dy, b.op("Cos", b.x))),
    "Sqrt": _unary(lambda b: b.op("Div", b.op("Mul", b.dy, 0.5), b.y)),
    "Tanh": _unary(_tanh),
    "Add": _sum,
    "Div": _quotient,
    "Max": _extremum,
    "Min": _extremum,
    "Mul": _product,
    "Pow": _power,
    "Sub": _difference,
}
