"""Gradients of Softmax, LogSoftmax and LayerNormalization.

==================  ==============================================================================
Softmax             dy * y - y * sum(dy * y), over the axis
LogSoftmax          dy - exp(y) * sum(dy), over the axis
LayerNormalization  with n = (x - mean) / deviation over the last axes and dn = dy * scale:
                    dx = (dn - mean(dn) - n * mean(dn * n)) / deviation, dscale = sum(dy * n),
                    dbias = sum(dy) (Ba et al. 2016, https://arxiv.org/abs/1607.06450, section 3,
                    with the terms of its derivative collected)
==================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from onnxqat.gradients.backward import Backward

__all__ = ["NORMALIZATIONS"]

Found = dict[int, str]


def _softmax(b: Backward) -> Found:
    axis = b.attribute("axis", -1)
    terms = b.op("Mul", b.dy, b.y)
    total = b.reduce("ReduceSum", terms, [axis])
    return {0: b.op("Sub", terms, b.op("Mul", b.y, total))}


def _log_softmax(b: Backward) -> Found:
    axis = b.attribute("axis", -1)
    total = b.reduce("ReduceSum", b.dy, [axis])
    return {0: b.op("Sub", b.dy, b.op("Mul", b.op("Exp", b.y), total))}


def _layer_normalization(b: Backward) -> Found:
    scale, mean, inverse = b.input(1), b.output(1), b.output(2)
    rank = b.rank(b.x)
    first = b.attribute("axis", -1) % rank
    found, axes = {}, list(range(first, rank))
    normal = b.op("Mul", b.op("Sub", b.x, mean), inverse)
    if 0 in b.wanted:
        dn = b.op("Mul", b.dy, scale)
        along = b.op("Mul", normal, b.reduce("ReduceMean", b.op("Mul", dn, normal), axes))
        level = b.op("Sub", dn, b.reduce("ReduceMean", dn, axes))
        found[0] = b.op("Mul", b.op("Sub", level, along), inverse)
    if 1 in b.wanted:
        found[1] = b.summed_to(b.op("Mul", b.dy, normal), scale)
    if 2 in b.wanted:
        found[2] = b.summed_to(b.dy, b.input(2))
    return found


NORMALIZATIONS: dict[str, Callable[[Backward], Found]] = {
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "Softmax": _softmax,
}
