"""ConvTranspose over ranks, groups, strides, pads, dilations and the ways to give its size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxqat.train.lowering.gradient import Refusal
from tests.derivatives import check_node, gradients, one_node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv_transpose(size, attributes):
    """Return ConvTranspose in float64: each input value adds the weight, scaled, at its place."""
    kernel_rank = len(size)
    ones = [1] * kernel_rank
    strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
    begins = attributes["begins"]
    groups = attributes.get("group", 1)

    def run(feeds):
        x, w = feeds["x"], feeds["w"]
        outs = w.shape[1]
        kernel = w.shape[2:]
        full = [
            (n - 1) * s + (k - 1) * d + 1 + 64
            for n, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)
        ]
        y = np.zeros((x.shape[0], groups, outs, *full))
        xg = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        wg = w.reshape(groups, -1, *w.shape[1:])
        for place in itertools.product(*map(range, kernel)):
            part = np.einsum("ngi...,gio->ngo...", xg, wg[(slice(None),) * 3 + place])
            window = tuple(
                slice(p * d, p * d + (n - 1) * s + 1, s)
                for p, d, n, s in zip(place, dilations, x.shape[2:], strides, strict=True)
            )
            y[(slice(None),) * 3 + window] += part
        crop = tuple(slice(b, b + m) for b, m in zip(begins, size, strict=True))
        y = y[(slice(None),) * 3 + crop].reshape(x.shape[0], groups * outs, *size)
        if "b" in feeds:
            y += feeds["b"].reshape(-1, *[1] * kernel_rank)
        return [y]

    return run


CASES = [
    # x, w, output size, first pads, attributes
    ((2, 3, 4), (3, 2, 3), (6,), (0,), {}),
    ((2, 3, 4), (3, 2, 3), (7,), (1,), {"strides": [2], "pads": [1, 1]}),
    ((2, 3, 4), (3, 2, 3), (8,), (1,), {"strides": [2], "pads": [1, 1], "output_padding": [1]}),
    ((2, 3, 3, 4), (3, 2, 2, 2), (6, 8), (0, 0), {"strides": [2, 2]}),
    ((2, 4, 3, 4), (4, 1, 3, 3), (5, 6), (0, 0), {"group": 4}),
    ((2, 4, 3, 4), (4, 2, 3, 2), (7, 8), (0, 0), {"group": 2, "strides": [2, 2]}),
    ((1, 2, 3, 3), (2, 3, 3, 3), (7, 5), (0, 0), {"dilations": [2, 1]}),
    (
        (1, 2, 3, 3),
        (2, 2, 3, 4),
        (6, 9),
        (1, 0),
        {"strides": [2, 3], "pads": [1, 0, 0, 1], "dilations": [1, 1]},
    ),
    ((1, 2, 3, 3), (2, 2, 3, 3), (6, 5), (1, 1), {"strides": [2, 2], "output_shape": [6, 5]}),
    ((1, 2, 3, 3), (2, 2, 3, 3), (6, 6), (0, 0), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((1, 2, 3, 3), (2, 2, 4, 3), (6, 6), (1, 1), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((1, 2, 3, 3), (2, 2, 3, 3), (7, 7), (0, 0), {"strides": [2, 2], "auto_pad": "VALID"}),
]


@pytest.mark.parametrize(("x", "w", "size", "begins", "attributes"), CASES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_conv_transpose(x, w, size, begins, attributes, bias):
    inputs = {"x": normal(*x), "w": normal(*w, seed=1)}
    if bias:
        inputs["b"] = normal(w[1] * attributes.get("group", 1), seed=2)
    oracle = conv_transpose(size, attributes | {"begins": begins})
    y = oracle({n: a.astype(np.float64) for n, a in inputs.items()})[0]
    assert y.shape[2:] == tuple(size)
    check_node("ConvTranspose", inputs, oracle=oracle, **attributes)


def test_output_padding_beyond_the_stride_is_refused():
    inputs = {"x": normal(1, 2, 3), "w": normal(2, 2, 3)}
    attributes = {"strides": [2], "dilations": [3], "output_padding": [2]}
    model = one_node("ConvTranspose", inputs, **attributes)
    with pytest.raises(
        Refusal, match=r"output_padding \[2\] is not smaller than its strides \[2\]"
    ):
        gradients(model, inputs, ["x"], [normal(1, 2, 13)])
