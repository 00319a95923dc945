"""Gradients of ops that move, copy or drop values: dy, moved back.

======================  ==========================================================================
Cast, Identity          dy (Cast: from float32 to float32 only)
Concat                  the part of dy at the operand's place
Expand                  dy, summed over the axes along which x was copied
Flatten, Reshape,
Squeeze, Unsqueeze      dy in the shape of x
Pad (constant)          dy without the padding: a Pad by the negative pads
Slice                   dy, with zeros around it, and between its values if the steps skip some
Split                   the gradients of the parts concatenated, with zeros for parts without one
Tile                    the sum over the copies
Transpose               dy transposed by the inverse permutation
Trilu                   the same triangle of dy
======================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxqat.gradients.backward import Backward
from onnxqat.gradients.selection import scattered

__all__ = ["MOVEMENT"]

Found = dict[int, str]


def _same(b: Backward) -> Found:
    return {0: b.dy}


def _reshaped(b: Backward) -> Found:
    return {0: b.shaped_like(b.dy, b.x)}


def _transpose(b: Backward) -> Found:
    order = b.attribute("perm") or list(range(b.rank(b.x)))[::-1]
    inverse = [int(i) for i in np.argsort(order)]
    return {0: b.op("Transpose", b.dy, perm=inverse, like=b.x)}


def _expand(b: Backward) -> Found:
    return {0: b.summed_to(b.dy, b.x)}


def _trilu(b: Backward) -> Found:
    diagonal = [b.input(1)] if b.input(1) else []
    return {0: b.op("Trilu", b.dy, *diagonal, upper=b.attribute("upper", 1), like=b.x)}


def _pad(b: Backward) -> Found:
    if b.attribute("mode", "constant") != "constant" or b.input(3):
        raise b.unsupported("a Pad with axes, or of a mode other than constant")
    return {0: b.op("Pad", b.dy, b.op("Neg", b.input(1)), like=b.x)}


def _tile(b: Backward) -> Found:
    """Reshape dy so that the copies along each axis have their own axis, and sum over these."""
    rank = b.rank(b.x)
    columns = (b.unsqueeze(b.input(1), [1]), b.unsqueeze(b.lengths(b.x), [1]))
    pairs = b.reshape(b.op("Concat", *columns, axis=1), [-1])
    apart = b.op("Reshape", b.dy, pairs)
    total = b.reduce("ReduceSum", apart, range(0, 2 * rank, 2), keepdims=False)
    return {0: b.shaped_like(total, b.x)}


def _concat(b: Backward) -> Found:
    axis, names = b.attribute("axis"), list(b.node.input)
    lengths = [b.op("Gather", b.lengths(n), np.array([axis], np.int64)) for n in names]
    sizes = b.op("Concat", *lengths, axis=0)
    shapes = [b.shape(name) for name in names]
    known = [shape[axis] if shape is not None else None for shape in shapes]
    if None not in known:
        sizes = b.constant(np.array(known, np.int64))
    return dict(enumerate(b.ops("Split", b.dy, sizes, likes=names, axis=axis)))


def _split(b: Backward) -> Found:
    parts = [dy or b.zeros(y) for dy, y in zip(b.dys, b.node.output, strict=True) if y]
    return {0: b.op("Concat", *parts, axis=b.attribute("axis", 0), like=b.x)}


def _slice(b: Backward) -> Found:
    """Return dx, by a Pad if bounds and lengths are known and the steps skip no value."""
    starts, ends = b.value(b.input(1)), b.value(b.input(2))
    shape = b.fixed(b.x)
    count = 0 if starts is None else starts.size
    axes = b.value(b.input(3)) if b.input(3) else np.arange(count)
    steps = b.value(b.input(4)) if b.input(4) else np.ones(count, np.int64)
    if shape is None or starts is None or ends is None or axes is None or steps is None:
        return {0: scattered(b, lambda x: b.op("Slice", x, *b.node.input[1:]))}
    if (steps != 1).any():
        return {0: scattered(b, lambda x: b.op("Slice", x, *b.node.input[1:]))}
    before, after = [0] * len(shape), [0] * len(shape)
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        first, last, _ = slice(start, end).indices(shape[axis])
        before[axis], after[axis] = first, shape[axis] - max(first, last)
    return {0: b.op("Pad", b.dy, np.array(before + after, np.int64), like=b.x)}


MOVEMENT: dict[str, Callable[[Backward], Found]] = {
    "Cast": _same,
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _reshaped,
    "Identity": _same,
    "Pad": _pad,
    "Reshape": _reshaped,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshaped,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _reshaped,
}
