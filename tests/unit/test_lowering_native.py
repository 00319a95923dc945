"""Ops that `onnxqat.gradients` defines: their gradients are right for what exporters write."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from onnxqat.train.lowering import NATIVE, Refusal
from tests import derivatives
from tests.derivatives import check_model, check_node, gradients, lowered, one_node, reference


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distinct(*shape, seed=0, low=-1.0, high=1.0):
    x = np.linspace(low, high, int(np.prod(shape)), dtype=np.float32)
    return np.asarray(np.random.default_rng(seed).permutation(x).reshape(shape))


def integers(*values):
    return np.array(values, np.int64)


BINARY = ["Add", "Sub", "Mul", "Div", "Max", "Min"]
UNARY = ["Abs", "Exp", "Identity", "Neg", "Reciprocal", "Relu", "Sigmoid", "Tanh", "Cos", "Sin"]
POOLS = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 3], "strides": [1, 2], "pads": [0, 1, 1, 0]},
]
BROADCASTS = [
    *(((2, 3), (2, 3)), ((2, 3, 4), (3, 1)), ((1, 4), (2, 3, 1))),
    *(((), (2, 3)), ((3,), ())),
]
PRODUCTS = [
    *(((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (3, 4, 5)), ((4,), (4, 5))),
    *(((2, 3, 4), (4,)), ((3, 4), (4,)), ((4,), (4,))),
]


@pytest.mark.parametrize("op_type", UNARY)
def test_unary(op_type):
    check_node(op_type, {"x": distinct(3, 4, 5) * 2})


@pytest.mark.parametrize("op_type", ["Log", "Sqrt", "Erf"])
def test_unary_of_positive_values(op_type):
    tolerance = 2e-2 if op_type == "Erf" else 2e-4  # the reference evaluator's erf is of float32
    check_node(op_type, {"x": distinct(3, 4, low=0.3, high=2)}, tolerance=tolerance, step=1e-4)


@pytest.mark.parametrize("op_type", BINARY)
@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_binary_with_broadcast(op_type, shapes):
    a, b = (distinct(*s, seed=i, low=0.5, high=1.5 + 0.1 * i) for i, s in enumerate(shapes))
    check_node(op_type, {"a": a, "b": b})


@pytest.mark.parametrize("exponent", [2.0, 0.5, 3.0])
def test_power(exponent):
    check_node("Pow", {"x": distinct(3, 4, low=0.3, high=2)}, {"p": np.array(exponent, np.float32)})


@pytest.mark.parametrize("limits", [(-0.5, 0.5), (0.0, None), (None, 0.3)], ids=str)
def test_clip(limits):
    low, high = (None if v is None else np.array(v, np.float32) for v in limits)
    check_node("Clip", {"x": distinct(3, 4)}, {"low": low, "high": high})


def test_clip_passes_no_gradient_at_its_limits():
    x = np.float32([-1, 0, 1e-30, 3, 5.9999995, 6, 7])
    upstream = np.arange(1, 8, dtype=np.float32)
    limits = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    model = one_node("Clip", {"x": x}, limits)
    found = gradients(model, {"x": x}, ["x"], [upstream])["x"]

    np.testing.assert_array_equal(found, [0, 0, 3, 4, 5, 0, 0])


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
def test_softmax(op_type, axis):
    check_node(op_type, {"x": normal(3, 4, 5)}, axis=axis)


@pytest.mark.parametrize("shapes", PRODUCTS, ids=str)
def test_matmul(shapes):
    check_node("MatMul", {"a": normal(*shapes[0]), "b": normal(*shapes[1], seed=1)})


@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (3, 1), (1, 5), (3, 5)], ids=str)
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 2.0)], ids=str)
def test_gemm(bias, transposed, factors):
    a, b = ((4, 3), (3, 4))[1 - transposed[0]], ((5, 4), (4, 5))[1 - transposed[1]]
    inputs = {"a": normal(*a), "b": normal(*b, seed=1)}
    if bias is not None:
        inputs["c"] = np.asarray(normal(*bias, seed=2))
    check_node("Gemm", inputs, transA=transposed[0], transB=transposed[1], alpha=factors[0],
               beta=factors[1])  # fmt: skip


@pytest.mark.parametrize("attributes", POOLS, ids=str)
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_pool(op_type, attributes):
    check_node(op_type, {"x": distinct(2, 2, 7, 6)}, **attributes)


@pytest.mark.parametrize("attributes", POOLS[1:], ids=str)
def test_average_pool_that_counts_the_pads(attributes):
    check_node("AveragePool", {"x": distinct(2, 2, 7, 6)}, count_include_pad=1, **attributes)


def test_max_pool_with_dilations():
    check_node("MaxPool", {"x": distinct(2, 2, 7, 6)}, kernel_shape=[2, 3], dilations=[2, 1])


def test_average_pool_with_dilations(monkeypatch):
    monkeypatch.delitem(derivatives.BUILDERS, "onnxruntime", raising=False)  # it is wrong there
    attributes = {"kernel_shape": [2, 3], "dilations": [2, 1], "strides": [1, 2]}
    inputs = {"x": distinct(2, 2, 7, 6)}
    check_node("AveragePool", inputs, pads=[1, 1, 0, 1], opset=19, **attributes)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_pool_of_other_ranks(op_type, rank):
    check_node(op_type, {"x": distinct(1, 2, *[5] * rank)}, kernel_shape=[2] * rank,
               strides=[2] * rank)  # fmt: skip


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 3, 6), (4, 3, 3), {"pads": [1, 0]}),
        ((2, 4, 6, 5), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
        ((2, 4, 6, 5), (2, 2, 3, 2), {"group": 2, "strides": [2, 1], "pads": [0, 1, 1, 0]}),
        ((1, 2, 7, 7), (3, 2, 3, 3), {"dilations": [2, 1], "strides": [1, 2]}),
        ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {}),
        ((1, 2, 5, 5), (3, 2, 3, 3), {"auto_pad": "VALID"}),
    ],
)
def test_conv(x, w, attributes):
    inputs = {"x": normal(*x), "w": normal(*w, seed=1), "b": normal(w[0], seed=2)}
    check_node("Conv", inputs, **attributes)


@pytest.mark.parametrize("op_type", ["Conv", "MaxPool", "AveragePool"])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_same_padding_is_refused(op_type, mode):
    inputs = {"x": normal(1, 2, 5, 5)}
    if op_type == "Conv":
        inputs["w"] = normal(2, 2, 3, 3)
    model = one_node(op_type, inputs, auto_pad=mode, kernel_shape=[3, 3])
    with pytest.raises(Refusal, match=rf"its pads are not fixed \(auto_pad {mode}\)"):
        lowered(model, ["x"])


@pytest.mark.parametrize(
    ("op_type", "shape", "constants", "attributes"),
    [
        ("Concat", (3, 4), {"other": normal(2, 4)}, {"axis": 0}),
        ("Expand", (3, 1), {"shape": integers(2, 3, 4)}, {}),
        ("Flatten", (2, 3, 4), {}, {"axis": 2}),
        ("Gather", (4, 3), {"at": integers(2, 0, 2)}, {"axis": 0}),
        ("Gather", (4, 3), {"at": np.array(1)}, {"axis": 1}),
        ("Gather", (4, 3), {"at": integers(-1, 0)}, {"axis": -1}),
        ("GatherElements", (3, 2), {"at": np.array([[0, 2], [1, 1]])}, {"axis": 0}),
        ("GatherND", (3, 4), {"at": np.array([[0, 2], [1, 1]])}, {}),
        ("Reshape", (3, 4), {"shape": integers(2, -1)}, {}),
        ("Slice", (4, 6), {"s": integers(1, 0), "e": integers(4, 9), "a": integers(0, 1),
                           "t": integers(1, 2)}, {}),
        ("Slice", (4, 6), {"s": integers(-1), "e": integers(-9), "a": integers(1),
                           "t": integers(-1)}, {}),
        ("Squeeze", (3, 1, 4, 1), {"axes": integers(1, 3)}, {}),
        ("Squeeze", (3, 1, 4, 1), {}, {}),
        ("Tile", (2, 3), {"repeats": integers(2, 3)}, {}),
        ("Transpose", (2, 3, 4), {}, {"perm": [2, 0, 1]}),
        ("Transpose", (2, 3), {}, {}),
        ("Trilu", (4, 5), {}, {"upper": 0}),
        ("Unsqueeze", (2, 3), {"axes": integers(0, -1)}, {}),
    ],
)  # fmt: skip
def test_movement(op_type, shape, constants, attributes):
    check_node(op_type, {"x": normal(*shape)}, constants, **attributes)


def test_cast_between_equal_types():
    check_node("Cast", {"x": normal(3)}, to=1, oracle=lambda feeds: [feeds["x"]])


def test_scatter_nd():
    inputs = {"x": normal(4, 3)}
    check_node("ScatterND", inputs, {"at": np.array([[1], [3]]), "u": normal(2, 3)})


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 3)), ((2, 3), (3,)), ((1,), (2, 3)), ((), (2, 3))], ids=str
)
def test_where_of_every_broadcast(shapes):
    inputs = {"a": normal(*shapes[0]), "b": normal(*shapes[1], seed=1)}
    inputs = {n: np.asarray(a) for n, a in inputs.items()}
    condition = np.array([[True, False, True], [False, False, True]])
    model = one_node("Where", inputs)
    model.graph.node[0].input.insert(0, "condition")
    model.graph.initializer.append(numpy_helper.from_array(condition, "condition"))
    check_model(model, inputs)


def test_top_k():
    x = {"x": distinct(3, 5)}
    model = one_node("TopK", x, {"k": integers(2)}, outputs=2, axis=1)
    del model.graph.output[1]
    evaluate = reference(model)
    check_model(model, x, oracle=lambda feeds: evaluate(feeds)[:1])


def test_every_native_op_is_tried():
    tried = {
        *UNARY,
        *BINARY,
        "Log",
        "Sqrt",
        "Erf",
        "Pow",
        "Clip",
        "Softmax",
        "LogSoftmax",
        "MatMul",
    }
    tried |= {"Gemm", "MaxPool", "AveragePool", "Conv", "Cast", "Concat", "Expand", "Flatten"}
    tried |= {"Gather", "GatherElements", "GatherND", "Reshape", "Slice", "Squeeze", "Tile"}
    tried |= {"Transpose", "Trilu", "Unsqueeze", "ScatterND", "GlobalAveragePool"}
    tried |= {"LayerNormalization", "Gelu", "Pad", "Split", "TopK"}  # beside those that are lowered
    assert tried == NATIVE
