"""The gradient graph as a whole: sums, broadcasts, what needs no gradient, free lengths."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxqat.errors import TrainingError
from onnxqat.gradients import add_gradients, drop_unread
from onnxqat.runtime import open_session


def parsed(text, opset=17, extra=""):
    """Return a graph with the types that onnx infers."""
    header = f'<ir_version: 8, opset_import: ["": {opset}, "own": 1]>'
    model = onnx.parser.parse_model(f"{header} {text} {extra}")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def gradients(model, learned, feeds):
    """Return the results of the graph with gradients, by name."""
    built = add_gradients(model, learned, kernels=frozenset())
    onnx.checker.check_model(built)
    session = open_session(built, optimization="none", threads=1)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def op_types(model, learned):
    return [n.op_type for n in add_gradients(model, learned, kernels=frozenset()).graph.node]


def test_the_gradients_of_all_readers_are_summed():
    model = parsed("""g (float[2,3] x) => (float loss) {
        a = Mul(x, x) b = Exp(x) c = Mul(a, b) d = Sub(c, x) e = Add(d, a)
        loss = ReduceSum<keepdims = 0>(e) }""")
    x = np.float32([[-1, 0.5, 2], [0, 1, -2]])
    found = gradients(model, {"x"}, {"x": x})
    y = x.astype(np.float64)
    expected = 2 * y * np.exp(y) + y**2 * np.exp(y) - 1 + 2 * y

    np.testing.assert_allclose(found["x_grad"], expected, rtol=1e-6)
    assert found["loss"] == pytest.approx((y**2 * np.exp(y) - y + y**2).sum(), rel=1e-6)


@pytest.mark.parametrize("free", [False, True], ids=["known", "free"])
@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3), (3,)), ((2, 1, 4), (3, 1)), ((), (2, 3)), ((1, 1), (2, 3)), ((2, 3), (2, 3))],
    ids=str,
)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
def test_a_broadcast_operand_gets_the_sum(op_type, a, b, free):
    feeds = {n: np.arange(1, 1 + np.prod(s), dtype=np.float32).reshape(s)
             for n, s in (("a", a), ("b", b))}  # fmt: skip
    node = helper.make_node(op_type, ["a", "b"], ["c"])
    square = helper.make_node("Mul", ["c", "c"], ["d"])
    total = helper.make_node("ReduceSum", ["d"], ["loss"], keepdims=0)
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * v.ndim if free else v.shape)
        for n, v in feeds.items()
    ]
    loss = helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])
    graph = helper.make_graph([node, square, total], "g", inputs, [loss])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    found = gradients(onnx.shape_inference.infer_shapes(model), {"a", "b"}, feeds)
    result = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[op_type](*feeds.values())
    slopes = {
        "Add": (1, 1),
        "Sub": (1, -1),
        "Mul": (feeds["b"], feeds["a"]),
    }[op_type]
    for (name, value), slope in zip(feeds.items(), slopes, strict=True):
        terms = 2 * result * slope
        lead = terms.ndim - value.ndim
        axes = (*range(lead), *(i + lead for i, n in enumerate(value.shape) if n == 1))
        expected = terms.sum(axes, keepdims=True).reshape(value.shape)
        np.testing.assert_array_equal(found[f"{name}_grad"], expected)  # integers: exact


def test_what_is_not_learned_costs_nothing():
    model = parsed("""g (float[2,3] x, float[3,4] w, float[4] frozen) => (float loss) {
        a = MatMul(x, w) b = Mul(a, frozen) c = Tanh(frozen) d = Add(b, c)
        loss = ReduceSum<keepdims = 0>(d) }""")
    assert op_types(model, {"w"})[5:] == ["Expand", "Mul", "FusedMatMul", "Identity"]
    feeds = {n: np.random.default_rng(0).normal(size=s).astype(np.float32)
             for n, s in (("x", (2, 3)), ("w", (3, 4)), ("frozen", (4,)))}  # fmt: skip
    found = gradients(model, {"w"}, feeds)

    assert found.keys() == {"loss", "w_grad"}
    expected = np.outer(feeds["x"].sum(0), feeds["frozen"])
    np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-6)


def test_integers_and_branches_that_do_not_reach_the_loss_have_no_gradient():
    model = parsed("""g (float[4] x, float[4] unused) => (float loss) {
        i = Cast<to = 7>(x) j = Cast<to = 1>(i) a = Mul(x, j)
        dead = Exp(x) deader = Softsign(dead) other = Mul(unused, unused)
        loss = ReduceSum<keepdims = 0>(a) }""")
    x = np.float32([1.5, 2.5, -0.5, 3])
    found = gradients(model, {"x", "unused"}, {"x": x, "unused": x})

    assert found.keys() == {"loss", "x_grad"}
    np.testing.assert_array_equal(found["x_grad"], np.trunc(x))


def test_an_input_that_is_read_twice_by_one_node():
    model = parsed("""g (float[2,2] x) => (float loss) {
        a = MatMul(x, x) b = Concat<axis = 0>(a, a, x) loss = ReduceSum<keepdims = 0>(b) }""")
    x = np.float32([[1, 2], [3, 5]])
    ones = np.ones((2, 2), np.float32)

    found = gradients(model, {"x"}, {"x": x})["x_grad"]
    np.testing.assert_array_equal(found, 2 * (ones @ x.T + x.T @ ones) + 1)


def test_of_several_outputs_those_without_gradient_count_as_zero():
    model = parsed("""g (float[2,6] x) => (float loss) {
        a, b, c = Split<axis = 1>(x) d = Mul(b, b) loss = ReduceSum<keepdims = 0>(d) }""")
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    expected = np.zeros_like(x)
    expected[:, 2:4] = 2 * x[:, 2:4]

    np.testing.assert_array_equal(gradients(model, {"x"}, {"x": x})["x_grad"], expected)


def test_names_of_the_graph_are_left_alone():
    text = """g (float[2] x) => (float loss) {
        a = Mul(x, x) "gradient/a/Mul" = Mul(a, x) "gradient/constant0" = Exp("gradient/a/Mul")
        loss = ReduceSum<keepdims = 0>("gradient/constant0") }"""
    x = np.float32([0.5, -1])
    found = gradients(parsed(text), {"x"}, {"x": x})

    np.testing.assert_allclose(found["x_grad"], np.exp(x**3) * 3 * x**2, rtol=1e-6)


def test_the_given_model_is_not_changed():
    model = parsed(
        """g (float[1,1,4] x) => (float loss) {
        a = MaxPool<kernel_shape = [2]>(x) loss = ReduceSum<keepdims = 0>(a) }""",
        13,
    )
    before = model.SerializeToString()
    add_gradients(model, {"x"}, kernels=frozenset())

    assert model.SerializeToString() == before


def test_an_op_without_gradient_is_named():
    model = parsed("""g (float[2,2] x) => (float loss) {
        a = Det(x) loss = Identity(a) }""")
    model.graph.node[0].name = "determinant"
    with pytest.raises(
        TrainingError, match=r"onnxqat has no gradient for node 'determinant' \(Det\)"
    ):
        add_gradients(model, {"x"}, kernels=frozenset())


def test_a_graph_of_an_older_opset_means_the_same_afterwards():
    model = parsed(
        """g (float[1,1,6] x, float[1,4] boxes, int64[1] at, float[1,1,4,4] map)
        => (float loss) {
        a = MaxPool<kernel_shape = [3], strides = [1]>(x)
        r = RoiAlign(map, boxes, at) m = ReduceMean<axes = [1, 2, 3], keepdims = 0>(r)
        b = Mul(a, m) loss = ReduceSum<keepdims = 0>(b) }""",
        13,
    )
    rng = np.random.default_rng(0)
    feeds = {
        "x": np.float32([[[1, 5, 2, 5, 4, 3]]]),
        "boxes": np.float32([[0, 0, 2.3, 3.1]]),
        "at": np.zeros(1, np.int64),
        "map": rng.normal(size=(1, 1, 4, 4)).astype(np.float32),
    }
    before = open_session(model, optimization="none", threads=1).run(None, feeds)[0]
    found = gradients(model, {"x"}, feeds)

    assert found["loss"] == before
    mean = before / 20  # the maxima are 5, 5, 5 and 5
    np.testing.assert_allclose(found["x_grad"][0, 0], mean * np.float32([0, 2, 0, 2, 0, 0]))


def test_a_function_has_its_gradient_beside_it():
    model = parsed(
        """g (float[3] x, float[3] s, float[3] c) => (float loss) {
        a = own.Cube(c, s, x) loss = ReduceSum<keepdims = 0>(a) }""",
        extra="""<domain: "own", opset_import: ["": 17]> Cube (c, s, x) => (y) {
            xx = Mul(x, x) xxx = Mul(xx, x) sx = Mul(s, xxx) y = Add(sx, c) }
        <domain: "own", opset_import: ["": 17]> Cube_gradient (x, s, dy) => (ds, dx) {
            three = Constant<value_float = 3.0>() xx = Mul(x, x) slope = Mul(three, xx)
            steep = Mul(slope, s) dx = Mul(dy, steep) x3 = Mul(xx, x) ds = Mul(dy, x3) }""",
    )
    feeds = {"x": np.float32([1, 2, 3]), "s": np.float32([2, 3, 4]), "c": np.zeros(3, np.float32)}
    found = gradients(model, {"x", "s"}, feeds)

    np.testing.assert_array_equal(found["x_grad"], 3 * feeds["x"] ** 2 * feeds["s"])
    np.testing.assert_array_equal(found["s_grad"], feeds["x"] ** 3)


def test_what_no_output_reads_is_dropped():
    model = parsed("""g (float[2] x) => (float loss) <float[2] k = {1, 2}, float[2] l = {1, 2}> {
        a = Mul(x, k) b = Mul(x, l) c = Exp(b) loss = ReduceSum<keepdims = 0>(a) }""")
    drop_unread(model)

    assert [n.op_type for n in model.graph.node] == ["Mul", "ReduceSum"]
    assert [t.name for t in model.graph.initializer] == ["k"]


def test_what_a_subgraph_reads_is_kept():
    model = parsed("""g (float[2] x, bool c) => (float[2] y) {
        a = Exp(x)
        y = If(c) <then_branch = t () => (float[2] p) { p = Neg(a) },
                   else_branch = e () => (float[2] q) { q = Abs(x) }> }""")
    drop_unread(model)

    assert [n.op_type for n in model.graph.node] == ["Exp", "If"]
