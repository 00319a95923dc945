"""Gradients of ops that select values: dy at the selected places, 0 elsewhere.

A place that was selected several times gets the sum. ScatterElements computes these sums in the
order of the indices, so that every run gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto, helper

from onnxqat.gradients.backward import Backward

__all__ = ["SELECTION", "scattered"]

Found = dict[int, str]


def scattered(b: Backward, pick: Callable[[str], str], *, several: bool = False) -> str:
    """Return dx of any op that selects values.

    Parameters
    ----------
    b : Backward
        The op.
    pick : callable
        Adds the op with another first input, and returns its output. Applied to a tensor with the
        index of each place, it returns the indices of the selected places.
    several : bool
        Whether a place can be selected more than once.
    """
    count = b.op("Size", b.x)
    numbers = b.op("Range", np.array(0, np.int64), count, np.array(1, np.int64))
    places = b.reshape(pick(b.shaped_like(numbers, b.x)), [-1])
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    empty = b.op("ConstantOfShape", b.reshape(count, [1]), value=value)
    reduction = "add" if several else "none"
    flat = b.op("ScatterElements", empty, places, b.reshape(b.dy, [-1]), reduction=reduction)
    return b.shaped_like(flat, b.x)


def _gather(b: Backward) -> Found:
    """Return dx of a Gather; the axes before its axis, and those behind it, are merged."""
    axis, rank, at = b.attribute("axis", 0), b.rank(b.x), b.input(1)
    axis, zeros = axis % rank, b.zeros(b.x)
    # dy with the axes of the indices merged into one, at the place of the gathered axis
    before, after = range(axis), range(axis + 1, rank)
    sizes = [_length(b, i) for i in before], [_length(b, i) for i in after]
    one = b.constant(np.array([-1], np.int64))
    shape = b.op("Concat", *sizes[0], one, *sizes[1], axis=0) if rank > 1 else one
    rows = b.op("Reshape", b.dy, shape)
    column = b.reshape(at, [1] * axis + [-1] + [1] * (rank - axis - 1))
    places = b.op("Expand", column, b.op("Shape", rows))
    return {0: b.op("ScatterElements", zeros, places, rows, axis=axis, reduction="add", like=b.x)}


def _length(b: Backward, axis: int) -> str:
    """Return the length of one axis of x as a tensor of one element."""
    shape = b.shape(b.x)
    if shape is not None and shape[axis] is not None:
        return b.constant(np.array([shape[axis]], np.int64))
    return b.op("Gather", b.op("Shape", b.x), np.array([axis], np.int64))


def _gather_elements(b: Backward) -> Found:
    inputs = (b.zeros(b.x), b.input(1), b.dy)
    axis = b.attribute("axis", 0)
    return {0: b.op("ScatterElements", *inputs, axis=axis, reduction="add", like=b.x)}


def _gather_nd(b: Backward) -> Found:
    batch = b.attribute("batch_dims", 0)

    def pick(x: str) -> str:
        return b.op("GatherND", x, b.input(1), batch_dims=batch)

    return {0: scattered(b, pick, several=True)}


def _scatter_nd(b: Backward) -> Found:
    """Return dy at the places that kept x, and dy at the updated places."""
    if b.attribute("reduction", "none") != "none":
        raise b.unsupported("a reduction")
    found, at = {}, b.input(1)
    if 0 in b.wanted:
        found[0] = b.op("ScatterND", b.dy, at, b.zeros(b.input(2)), like=b.x)
    if 2 in b.wanted:
        found[2] = b.op("GatherND", b.dy, at, like=b.input(2))
    return found


def _top_k(b: Backward) -> Found:
    if not b.dy:
        return {}
    inputs = (b.zeros(b.x), b.output(1), b.dy)
    return {0: b.op("ScatterElements", *inputs, axis=b.attribute("axis", -1), like=b.x)}


SELECTION: dict[str, Callable[[Backward], Found]] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
