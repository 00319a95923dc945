"""Gradients of DepthToSpace, SpaceToDepth, Einsum, and of a MatMul with a vector."""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.train.lowering.gradient import Gradient, Refusal, rank_of, static_shape

__all__ = ["depth_to_space", "einsum", "space_to_depth"]


def depth_to_space(node: gs.Node) -> Gradient:
    """Return SpaceToDepth(dy), with the channels reordered from DCR to CRD for that ``mode``."""
    block = int(node.attrs["blocksize"])
    text = f"d = SpaceToDepth<blocksize = {block}>(dy) "
    constants = {}
    if node.attrs.get("mode", "DCR") == "DCR":
        text += "dx = Identity(d)"
    else:  # (block * block, C) -> (C, block * block)
        depth = static_shape(node.inputs[0], "input")[1] // block**2
        text += """split = Reshape(d, blocks) turned = Transpose<perm = [0, 2, 1, 3]>(split)
        xs = Shape(x) dx = Reshape(turned, xs)"""
        constants["blocks"] = np.array([0, block**2, depth, -1], np.int64)
    return Gradient(inputs=("x",), text=text, constants=constants)


def space_to_depth(node: gs.Node) -> Gradient:
    """Return DepthToSpace(dy)."""
    text = f"dx = DepthToSpace<blocksize = {int(node.attrs['blocksize'])}>(dy)"
    return Gradient(inputs=("x",), text=text)


def product_with_vector(node: gs.Node) -> Gradient:
    """Return the gradient of a MatMul whose second operand has one axis."""
    rank = rank_of(node.inputs[0], "input")
    leading = list(range(rank - 1))
    total = f"ReduceSum<axes = {leading}, keepdims = 0>" if leading else "Identity"
    text = f"""column = Unsqueeze<axes = [{rank - 1}]>(dy) da = Mul(column, b)
    terms = Mul(column, a) db = {total}(terms)"""
    return Gradient(inputs=("a", "b"), text=text)


def einsum(node: gs.Node) -> Gradient:
    """Return each operand's gradient: the Einsum of dy and the other operands to its labels."""
    equation = node.attrs["equation"].replace(" ", "")
    terms, _, result = equation.partition("->")
    operands = terms.split(",")
    where = f"its equation '{node.attrs['equation']}'"
    plain = re.fullmatch(r"[A-Za-z,]+->[A-Za-z]*", equation)
    if not plain or any(len(set(labels)) != len(labels) for labels in (*operands, result)):
        raise Refusal(f"{where} has no '->', an ellipsis, or a label twice in one operand")
    _check_lengths(node, operands)
    names = tuple(f"x{i}" for i in range(len(operands)))
    lines = []
    for i, labels in enumerate(operands):
        others = [t for j, t in enumerate(operands) if j != i]
        lost = sorted(set(labels) - set("".join([result, *others])))
        if lost:
            raise Refusal(f"{where} sums label {lost[0]!r}, which only one operand has")
        inner = ",".join([result, *others]) + "->" + labels
        read = ", ".join(["dy", *(n for j, n in enumerate(names) if j != i)])
        lines.append(f'd{names[i]} = Einsum<equation = "{inner}">({read})')
    return Gradient(inputs=names, text=" ".join(lines))


def _check_lengths(node: gs.Node, operands: list[str]) -> None:
    """Refuse a label with several lengths, for which one operand is broadcast."""
    lengths: dict[str, object] = {}
    for tensor, labels in zip(node.inputs, operands, strict=True):
        for label, length in zip(labels, tensor.shape or [None] * len(labels), strict=True):
            if lengths.setdefault(label, length) != length:
                raise Refusal(f"label '{label}' has the lengths {lengths[label]} and {length}")
