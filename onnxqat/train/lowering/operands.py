"""Rewrite nodes into several nodes with correct gradients.

========  ====================================  =============================================
Sum       chain of Add                          in the order in which onnxruntime adds
Mean      chain of Add, Mul by 1 / count
Max, Min  chain of two-operand Max, Min         their gradient needs two operands
Split     one Slice per output                  if not all outputs need a gradient: the gradient
                                                of Split adds zeros for the others
========  ====================================  =============================================

The values are the same bit for bit.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.model import constant
from onnxqat.preparation.editing import constant_values
from onnxqat.train.lowering.gradient import Refusal, rank_of, static_shape

__all__ = ["in_pairs", "mean", "slices"]


def in_pairs(node: gs.Node, op_type: str) -> list[gs.Node]:
    """Return a chain of two-operand nodes, from left to right."""
    operands, result = list(node.inputs), node.outputs[0]
    if len(operands) == 1:
        return [gs.Node("Identity", node.name, {}, operands, [result])]
    nodes, left = [], operands[0]
    for i, right in enumerate(operands[1:], start=1):
        last = i == len(operands) - 1
        target = result if last else gs.Variable(f"{node.name}/{i}", np.float32)
        nodes.append(gs.Node(op_type, f"{node.name}/{i}", {}, [left, right], [target]))
        left = target
    return nodes


def mean(node: gs.Node) -> list[gs.Node]:
    """Return the sum times the reciprocal of the count, as onnxruntime computes it."""
    result = node.outputs[0]
    total = gs.Variable(f"{node.name}/total", np.float32, result.shape)
    part = constant(f"{node.name}/part", np.float32(1) / np.full((), len(node.inputs), np.float32))
    summing = gs.Node("Sum", node.name, {}, list(node.inputs), [total])
    return [
        *in_pairs(summing, "Add"),
        gs.Node("Mul", f"{node.name}/mean", {}, [total, part], [result]),
    ]


def slices(node: gs.Node) -> list[gs.Node]:
    """Return a Slice for each output that is read."""
    axis = int(node.attrs.get("axis", 0)) % rank_of(node.inputs[0], "input")
    bounds = [0, *itertools.accumulate(_lengths(node, axis))]
    axes = constant(f"{node.name}/axis", np.array([axis], np.int64))
    nodes = []
    for i, (target, start, end) in enumerate(
        zip(node.outputs, bounds[:-1], bounds[1:], strict=True)
    ):
        ends = [
            constant(f"{node.name}/{i}/{name}", np.array([value], np.int64))
            for name, value in (("start", start), ("end", end))
        ]
        inputs = [node.inputs[0], *ends, axes]
        nodes.append(gs.Node("Slice", f"{node.name}/{i}", {}, inputs, [target]))
    return nodes


def _lengths(node: gs.Node, axis: int) -> list[int]:
    count = len(node.outputs)
    if len(node.inputs) > 1 and node.inputs[1].name:
        lengths = constant_values(node.inputs[1])
        if lengths is None:
            raise Refusal("the lengths of its parts are not constant")
        return [int(length) for length in lengths]
    whole = static_shape(node.inputs[0], "input")[axis]
    part = -(-whole // count)  # only the last part can be smaller
    return [part] * (count - 1) + [whole - part * (count - 1)]
