"""Reductions and pooling by maximum or norm, over axes, keepdims and opsets."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.train.lowering.gradient import Refusal
from tests.derivatives import check_node, gradients, one_node

OPS = [
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
]


def values(shape=(3, 4, 5), seed=0):
    """Distinct values from 0.5 to 2.5, in random order."""
    size = int(np.prod(shape))
    x = np.linspace(0.5, 2.5, size, dtype=np.float32)
    return np.random.default_rng(seed).permutation(x).reshape(shape)


@pytest.mark.parametrize("op_type", OPS)
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(
    ("axes", "keepdims"),
    [(None, 1), (None, 0), ([1], 1), ([-1], 0), ([0, 2], 1), ([1, -1], 0), ([0], 0)],
    ids=str,
)
def test_reduction(op_type, axes, keepdims, opset):
    x = {"x": values() * (1 if op_type == "ReduceLogSum" else np.float32([-1, 1, -1, 1, 1]))}
    if op_type == "ReduceSum" or opset >= 18:
        constants = {"axes": None if axes is None else np.array(axes, np.int64)}
        check_node(op_type, x, constants, opset=opset, keepdims=keepdims)
    else:
        given = {} if axes is None else {"axes": axes}
        check_node(op_type, x, opset=opset, keepdims=keepdims, **given)


@pytest.mark.parametrize(("op_type", "end"), [("ReduceMax", np.max), ("ReduceMin", np.min)])
def test_values_that_share_the_end_get_equal_parts(op_type, end):
    x = np.float32([[1, 2, 2, 0], [3, 0, 0, 3]])
    upstream = np.float32([[6], [10]])
    model = one_node(op_type, {"x": x}, axes=[1])
    found = gradients(model, {"x": x}, ["x"], [upstream])["x"]
    mask = x == end(x, axis=1, keepdims=True)

    np.testing.assert_array_equal(found, upstream * mask / mask.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("zeros", [[], [1], [1, 3]], ids=str)
def test_product_with_zeros(zeros):
    x = values((2, 5))
    x[0, zeros] = 0
    check_node("ReduceProd", {"x": x}, axes=[1])


def test_norm_of_zeros_passes_no_gradient():
    x = np.zeros((2, 3), np.float32)
    model = one_node("ReduceL2", {"x": x}, axes=[1])
    found = gradients(model, {"x": x}, ["x"], [np.ones((2, 1), np.float32)])["x"]

    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("op_type", "pool"), [("GlobalMaxPool", np.max), ("GlobalAveragePool", np.mean)]
)
def test_global_pool(op_type, pool, shape):
    def oracle(feeds):
        return [pool(feeds["x"], axis=tuple(range(2, len(shape))), keepdims=True)]

    check_node(op_type, {"x": values(shape)}, oracle=oracle)


def test_global_lp_pool():
    def norm(feeds):
        return [np.sqrt((feeds["x"] ** 2).sum(axis=(2, 3), keepdims=True))]

    check_node("GlobalLpPool", {"x": values((2, 3, 4, 5))}, oracle=norm)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "p": 3},
        {"kernel_shape": [2, 2], "strides": [1, 2], "dilations": [2, 1]},
    ],
    ids=str,
)
def test_lp_pool(attributes):
    x = values((2, 3, 7, 6)) * np.where(np.arange(6) % 2, 1, -1).astype(np.float32)

    def norm(feeds):
        kernel, p = attributes["kernel_shape"], attributes.get("p", 2)
        strides, dilations = attributes["strides"], attributes.get("dilations", [1, 1])
        top, left, bottom, right = attributes.get("pads", [0] * 4)
        padded = np.pad(feeds["x"], ((0, 0), (0, 0), (top, bottom), (left, right)))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=(2, 3))
        windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
        return [(np.abs(windows) ** p).sum(axis=(-2, -1)) ** (1 / p)]

    opset = 18 if "dilations" in attributes else 17
    check_node("LpPool", {"x": x}, opset=opset, oracle=norm, **attributes)


def test_pooling_of_a_free_size_is_refused():
    x = {"x": values((2, 3, 7, 6))}
    model = one_node("LpPool", x, kernel_shape=[2, 2])
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    with pytest.raises(Refusal, match=r"the shape \[2, 3, 7, 'width'\] of its input is not fixed"):
        gradients(model, x, ["x"], [values((2, 3, 6, 5))])
