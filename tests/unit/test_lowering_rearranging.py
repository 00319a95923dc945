"""DepthToSpace, SpaceToDepth, Einsum, and the ops that become chains of others."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from onnxqat.train.lowering.gradient import Refusal
from tests.derivatives import check_node, gradients, lowered, one_node


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distinct(*shape, seed=0):
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32)
    return np.random.default_rng(seed).permutation(x).reshape(shape)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize(("block", "shape"), [(2, (2, 12, 3, 4)), (3, (1, 9, 2, 2))])
def test_depth_to_space(block, shape, mode):
    check_node("DepthToSpace", {"x": normal(*shape)}, blocksize=block, mode=mode)


@pytest.mark.parametrize(("block", "shape"), [(2, (2, 3, 4, 6)), (3, (1, 2, 3, 6))])
def test_space_to_depth(block, shape):
    check_node("SpaceToDepth", {"x": normal(*shape)}, blocksize=block)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)]),
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("bhqk, bhkd -> bqhd", [(2, 3, 4, 6), (2, 3, 6, 5)]),
        ("bchw,co->bohw", [(2, 3, 4, 5), (3, 6)]),
        ("bi,bi->b", [(2, 3), (2, 3)]),
        ("i,j->ij", [(3,), (4,)]),
        ("ijk->kij", [(2, 3, 4)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]),
    ],
)
def test_einsum(equation, shapes):
    inputs = {f"x{i}": normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    check_node("Einsum", inputs, equation=equation)


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("...i,ij->...j", [(2, 3), (3, 4)], "has no '->', an ellipsis, or a label twice"),
        ('ij->"', [(3, 3)], "has no '->', an ellipsis, or a label twice"),
        ("ii->i", [(3, 3)], "has no '->', an ellipsis, or a label twice"),
        ("ij,k->k", [(2, 3), (4,)], "sums label 'i', which only one operand has"),
        ("ij,jk->ik", [(2, 1), (3, 4)], "label 'j' has the lengths 1 and 3"),
    ],
)
def test_einsum_that_is_refused(equation, shapes, reason):
    inputs = {f"x{i}": normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    with pytest.raises(Refusal, match=reason):
        lowered(one_node("Einsum", inputs, equation=equation), ["x0"])


@pytest.mark.parametrize("op_type", ["Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize(
    "shapes",
    [[(2, 3)], [(2, 3), (2, 3)], [(2, 1, 4), (3, 1), (4,)], [(), (2, 3), (3,), (2, 1)]],
    ids=str,
)
def test_any_number_of_operands(op_type, shapes):
    inputs = {
        f"x{i}": np.asarray(distinct(*shape, seed=i) + np.float32(0.001 * i))
        for i, shape in enumerate(shapes)
    }
    join = {"Sum": np.add, "Mean": np.add, "Max": np.maximum, "Min": np.minimum}[op_type]
    divisor = len(inputs) if op_type == "Mean" else 1
    oracle = lambda feeds: [functools.reduce(join, feeds.values()) / divisor]  # noqa: E731
    check_node(op_type, inputs, oracle=oracle)


@pytest.mark.parametrize("op_type", ["Sum", "Mean"])
@pytest.mark.parametrize("count", [3, 5, 7])
def test_sums_are_bit_for_bit_those_of_onnxruntime(op_type, count):
    inputs = {f"x{i}": normal(50, 60, seed=i) * np.float32(10.0**i) for i in range(count)}
    check_node(op_type, inputs)


@pytest.mark.parametrize(
    ("constants", "outputs", "attributes"),
    [
        ({"split": np.array([2, 3, 1], np.int64)}, 3, {"axis": 1}),
        ({"split": np.array([2, 4], np.int64)}, 2, {"axis": -2}),
        ({}, 3, {"axis": 1}),
        ({}, 4, {"axis": 2, "num_outputs": 4, "opset": 18}),
    ],
)
@pytest.mark.parametrize("all_reach_loss", [True, False], ids=["whole", "slices"])
def test_split(constants, outputs, attributes, all_reach_loss):
    x = {"x": normal(2, 6, 4)}
    check_node("Split", x, constants, outputs=outputs, all_reach_loss=all_reach_loss, **attributes)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_split_with_unused_outputs(used):
    x = {"x": normal(2, 6, 4)}
    model = one_node("Split", x, {"split": np.array([2, 3, 1], np.int64)}, outputs=3, axis=1)
    del model.graph.output[used + 1 :], model.graph.output[:used]
    bounds = [0, 2, 5, 6]
    upstream = normal(2, bounds[used + 1] - bounds[used], 4, seed=1)
    found = gradients(model, x, ["x"], [upstream], all_reach_loss=False)["x"]
    expected = np.zeros((2, 6, 4), np.float32)
    expected[:, bounds[used] : bounds[used + 1]] = upstream

    np.testing.assert_array_equal(found, expected)
