"""Gradients of normalizations and of BatchNormalization in its inference form.

With ``n = (x - mean) / deviation`` over some axes, and the gradient ``dn`` of n::

    dx = (dn - mean(dn) - n * mean(dn * n)) / deviation

(Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3, with the terms collected).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.train.lowering.gradient import Gradient, Refusal, rank_of, static_shape

__all__ = ["NORMALIZATIONS"]

# Computes the normalized n from v, and dv from dn, over {axes}.
NORMALISE = """
    mean = ReduceMean<axes = {axes}, keepdims = 1>(v) centred = Sub(v, mean)
    squares = Mul(centred, centred) variance = ReduceMean<axes = {axes}, keepdims = 1>(squares)
    raised = Add(variance, epsilon) deviation = Sqrt(raised) n = Div(centred, deviation)
"""
BACKWARD = """
    mean_dn = ReduceMean<axes = {axes}, keepdims = 1>(dn) dn_n = Mul(dn, n)
    mean_dn_n = ReduceMean<axes = {axes}, keepdims = 1>(dn_n) along = Mul(n, mean_dn_n)
    level = Sub(dn, mean_dn) across = Sub(level, along) dv = Div(across, deviation)
"""


def _epsilon(node: gs.Node) -> float:
    return float(node.attrs.get("epsilon", 1e-5))


def batch_normalization(node: gs.Node) -> Gradient:
    """Return the gradient of y = (x - mean) / sqrt(var + epsilon) * scale + bias."""
    if node.attrs.get("training_mode", 0):
        raise Refusal("it is in training mode; export the model for inference")
    rank = rank_of(node.inputs[0], "input")
    summed = [i for i in range(rank) if i != 1]
    text = f"""
    raised = Add(variance, epsilon) deviation = Sqrt(raised) f = Div(scale, deviation)
    factor = Reshape(f, channels) dx = Mul(dy, factor)
    m = Reshape(mean, channels) d = Reshape(deviation, channels)
    centred = Sub(x, m) n = Div(centred, d) dy_n = Mul(dy, n)
    dscale = ReduceSum<axes = {summed}, keepdims = 0>(dy_n)
    dbias = ReduceSum<axes = {summed}, keepdims = 0>(dy)"""
    return Gradient(
        inputs=("x", "scale", "bias", "mean", "variance"),
        text=text,
        constants={
            "epsilon": _epsilon(node),
            "channels": np.array([-1] + [1] * (rank - 2), np.int64),
        },
    )


def instance_normalization(node: gs.Node) -> Gradient:
    """Return the gradient of a normalization of each channel of each sample."""
    rank = rank_of(node.inputs[0], "input")
    axes, summed = list(range(2, rank)), [i for i in range(rank) if i != 1]
    text = f"""
    v = Identity(x) {NORMALISE.format(axes=axes)}
    factor = Reshape(scale, channels) dn = Mul(dy, factor)
    {BACKWARD.format(axes=axes)} dx = Identity(dv)
    dy_n = Mul(dy, n) dscale = ReduceSum<axes = {summed}, keepdims = 0>(dy_n)
    dbias = ReduceSum<axes = {summed}, keepdims = 0>(dy)"""
    return Gradient(
        inputs=("x", "scale", "bias"),
        text=text,
        constants={
            "epsilon": _epsilon(node),
            "channels": np.array([-1] + [1] * (rank - 2), np.int64),
        },
    )


def group_normalization(node: gs.Node) -> Gradient:
    """Return the gradient of a normalization of groups of channels.

    Scale and bias have one value per group at opset 18, and one per channel from opset 21.
    """
    shape, groups = static_shape(node.inputs[0], "input"), int(node.attrs["num_groups"])
    scales = static_shape(node.inputs[1], "scale")[0]
    view = [0, scales, -1]  # with a separate axis for scale and bias
    text = f"""
    xs = Shape(x) v = Reshape(x, groups) {NORMALISE.format(axes=[2])}
    dyv = Reshape(dy, view) factor = Reshape(scale, column) dns = Mul(dyv, factor)
    dn = Reshape(dns, groups) {BACKWARD.format(axes=[2])} dx = Reshape(dv, xs)
    nv = Reshape(n, view) dy_n = Mul(dyv, nv)
    dscale = ReduceSum<axes = [0, 2], keepdims = 0>(dy_n)
    dbias = ReduceSum<axes = [0, 2], keepdims = 0>(dyv)"""
    if scales not in (groups, shape[1]):
        raise Refusal(f"its scale has {scales} values for {groups} groups of {shape[1]} channels")
    return Gradient(
        inputs=("x", "scale", "bias"),
        text=text,
        constants={
            "epsilon": _epsilon(node),
            "groups": np.array([0, groups, -1], np.int64),
            "view": np.array(view, np.int64),
            "column": np.array([1, -1, 1], np.int64),
        },
    )


def lrn(node: gs.Node) -> Gradient:
    """Return the gradient of y = x * d^-beta, d = bias + alpha / size * (window sum of x^2).

    ``dx = dy * d^-beta - 2 * alpha * beta / size * x * (sum of dy * y / d over windows with x)``
    (Krizhevsky et al. 2012, section 3.3). The window sums over channels are a product with a
    band matrix.
    """
    channels, size = static_shape(node.inputs[0], "input")[1], int(node.attrs["size"])
    alpha, beta = node.attrs.get("alpha", 1e-4), node.attrs.get("beta", 0.75)
    offset = np.arange(channels)[None, :] - np.arange(channels)[:, None]
    band = (-((size - 1) // 2) <= offset) & (offset <= size // 2)
    text = """
    xs = Shape(x) v = Reshape(x, flat) squares = Mul(v, v) sums = MatMul(band, squares)
    scaled = Mul(sums, rate) d = Add(scaled, bias) p = Pow(d, minus_beta)
    dyv = Reshape(dy, flat) direct = Mul(dyv, p)
    yv = Reshape(y, flat) dy_y = Mul(dyv, yv) terms = Div(dy_y, d)
    spread = MatMul(transposed, terms) xv = Mul(v, factor) indirect = Mul(xv, spread)
    dv = Sub(direct, indirect) dx = Reshape(dv, xs)"""
    return Gradient(
        inputs=("x",),
        text=text,
        constants={
            "band": band.astype(np.float32),
            "transposed": band.T.astype(np.float32),
            "flat": np.array([0, channels, -1], np.int64),
            "rate": float(alpha / size),
            "bias": float(node.attrs.get("bias", 1.0)),
            "minus_beta": -float(beta),
            "factor": float(2 * alpha * beta / size),
        },
    )


def lp_normalization(node: gs.Node) -> Gradient:
    """Return the gradient of y = x / norm: (dy - dnorm * sum(dy * y)) / norm."""
    p, axis = node.attrs.get("p", 2), node.attrs.get("axis", -1)
    axes = [axis % rank_of(node.inputs[0], "input")]
    direction = "Identity(y)" if p == 2 else "Sign(x)"
    text = f"""
    norm = ReduceL{p}<axes = {axes}, keepdims = 1>(x) least = Max(norm, tiny)
    dy_y = Mul(dy, y) total = ReduceSum<axes = {axes}, keepdims = 1>(dy_y)
    direction = {direction} along = Mul(direction, total) across = Sub(dy, along)
    dx = Div(across, least)"""
    return Gradient(inputs=("x",), text=text, constants={"tiny": 1e-30})


NORMALIZATIONS = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": lrn,
    "LpNormalization": lp_normalization,
}
