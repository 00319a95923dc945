from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto
from onnxqat.preparation.constants import lift_constants
from onnxqat.preparation.names import name_nodes
from onnxqat.preparation.order import sort_nodes
from onnxqat.preparation.passthrough import remove_passthroughs
from onnxqat.preparation.shapes import infer_shapes
from onnxqat.preparation.unused import remove_unused
from tests.oracles import run_ort


def parse(text: str) -> Model:
    return from_proto(onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text))


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


def outputs_equal(before: onnx.ModelProto, model: Model, *shape: int) -> bool:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    pairs = zip(run_ort(before, {"x": x}), run_ort(after, {"x": x}), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# names


def test_names_that_are_unique_stay_and_the_others_get_a_free_one() -> None:
    model = parse(
        "g (float[2] x) => (float[2] e) { a=Relu(x) b=Relu(a) c=Relu(b) d=Relu(c) e=Relu(d) }"
    )
    for node, name in zip(model.graph.nodes, ["n", "n", "", "n_1", "Relu_c"], strict=True):
        node.name = name

    assert name_nodes(model.graph) == 2
    assert [node.name for node in model.graph.nodes] == ["n", "n_2", "Relu_c_1", "n_1", "Relu_c"]
    assert name_nodes(model.graph) == 0


# order


def test_sorting_moves_only_what_comes_too_late() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) { a=Relu(x) b=Exp(x) c=Add(a, d) d=Neg(b) y=Mul(c, b) }"
    )

    assert sort_nodes(model.graph) == 2
    assert [node.outputs[0].name for node in model.graph.nodes] == ["a", "b", "d", "c", "y"]
    assert sort_nodes(model.graph) == 0


def test_sorting_sees_what_a_subgraph_reads() -> None:
    model = parse(
        """g (float[2] x, bool t) => (float[2] y) {
            y = If (t) <then_branch = a () => (float[2] u) { u = Neg(h) },
                        else_branch = b () => (float[2] v) { v = Exp(x) }>
            h = Relu(x)
        }"""
    )

    assert sort_nodes(model.graph) == 2
    assert ops(model) == ["Relu", "If"]


def test_a_long_chain_sorts_and_a_cycle_is_an_error() -> None:
    count = 3000
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    x = helper.make_tensor_value_info("t0", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info(f"t{count}", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes[::-1], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17)]
    model = from_proto(helper.make_model(graph, ir_version=8, opset_imports=opsets))

    sort_nodes(model.graph)

    assert [node.inputs[0].name for node in model.graph.nodes] == [f"t{i}" for i in range(count)]
    cyclic = parse("g (float[2] x) => (float[2] y) { a=Add(x, x) b=Relu(a) y=Relu(b) }")
    cyclic.graph.nodes[0].inputs[1] = cyclic.graph.nodes[1].outputs[0]
    with pytest.raises(ModelError, match="cycle through node"):
        sort_nodes(cyclic.graph)


# constants


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        pytest.param("value = float[2] {1, 2}", np.float32([1, 2]), id="value"),
        pytest.param("value_float = 3.0", np.float32(3), id="float"),
        pytest.param("value_floats = [3.0, 4.0]", np.float32([3, 4]), id="floats"),
        pytest.param("value_int = 3", np.int64(3), id="int"),
        pytest.param("value_ints = [3, 4]", np.int64([3, 4]), id="ints"),
    ],
)
def test_constants_become_initializers(attribute: str, expected: np.ndarray) -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) "
        f"{{ c = Constant<{attribute}>() f = Cast<to=1>(c) y = Add(x, f) }}"
    )

    assert lift_constants(model.graph) == 1
    found = model.graph.tensors()["c"]
    assert isinstance(found, gs.Constant)
    assert found.values.dtype == expected.dtype
    assert found.values.shape == expected.shape
    assert np.array_equal(found.values, expected)


def test_constants_of_subgraphs_and_outputs_stay_nodes() -> None:
    text = """g (float[1] x, bool t) => (float[1] y, float[1] c) {
        c = Constant<value = float[1] {1}>()
        d = Constant<value = float[1] {2}>()
        s = Constant<value_string = "text">()
        y = If (t) <then_branch = a () => (float[1] u) { u = Add(x, d) },
                    else_branch = b () => (float[1] v) { v = Exp(x) }>
    }"""

    assert lift_constants(parse(text).graph) == 0


# passthrough


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            "a=Relu(x) b=Identity(a) y=Exp(b) z=Neg(b)", ["Relu", "Exp", "Neg"], id="inner"
        ),
        pytest.param("a=Relu(x) y=Identity(a) z=Neg(a)", ["Relu", "Neg"], id="output"),
        pytest.param(
            "a=Relu(x) y=Identity(a) z=Identity(a)", ["Relu", "Identity"], id="two-outputs"
        ),
        pytest.param("y=Identity(x) z=Relu(x)", ["Identity", "Relu"], id="input-to-output"),
        pytest.param("y=Relu(x) z=Identity(y)", ["Relu", "Identity"], id="output-to-output"),
        pytest.param("a=Identity(x) b=Identity(a) y=Relu(b) z=Exp(a)", ["Relu", "Exp"], id="chain"),
        pytest.param("a=Identity(x) y=Add(a, a) z=Exp(x)", ["Add", "Exp"], id="twice-in-one-node"),
        pytest.param("a, m=Dropout(x) y=Relu(a) z=Exp(a)", ["Relu", "Exp"], id="dropout"),
        pytest.param("a=Dropout(x, r) y=Relu(a) z=Exp(a)", ["Relu", "Exp"], id="dropout-ratio"),
        pytest.param("a=Dropout(x, r, f) y=Relu(a) z=Exp(a)", ["Relu", "Exp"], id="dropout-off"),
        pytest.param("a=Relu(x) y=Dropout(a) z=Exp(a)", ["Relu", "Exp"], id="dropout-output"),
    ],
)
def test_passthroughs(body: str, expected: list[str]) -> None:
    initializers = "<float r = {0.5}, bool f = {0}>"
    model = parse(f"g (float[N,3] x) => (float[N,3] y, float[N,3] z) {initializers} {{ {body} }}")
    before = model.to_proto()

    remove_passthroughs(model.graph)

    assert ops(model) == expected
    assert [tensor.name for tensor in model.graph.outputs] == ["y", "z"]
    assert outputs_equal(before, model, 2, 3)
    assert remove_passthroughs(model.graph) == 0


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("a, m=Dropout(x, r) y=Relu(a) z=Not(m)", id="mask-used"),
        pytest.param("y, z=Dropout(x, r)", id="mask-output"),
        pytest.param("y=Dropout(x, r, t) z=Not(t)", id="training"),
    ],
)
def test_active_dropout_stays(body: str) -> None:
    model = parse(
        "g (float[3] x) => (float[3] y, bool[3] z) "
        f"<float r = {{0.5}}, bool t = {{1}}> {{ {body} }}"
    )

    assert remove_passthroughs(model.graph) == 0


def test_an_identity_that_a_subgraph_reads_stays() -> None:
    model = parse(
        """g (float[2] x, bool t) => (float[2] y) {
            h = Identity(x)
            y = If (t) <then_branch = a () => (float[2] u) { u = Neg(h) },
                        else_branch = b () => (float[2] v) { v = Exp(x) }>
        }"""
    )

    assert remove_passthroughs(model.graph) == 0


def test_an_operator_of_another_domain_is_not_an_identity() -> None:
    model = from_proto(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17, "my": 1]>'
            "g (float[2] x) => (float[2] y) { a = my.Identity(x) y = Relu(a) }"
        )
    )

    assert remove_passthroughs(model.graph) == 0


# unused


def test_unused_nodes_go_and_inputs_stay() -> None:
    model = parse(
        """g (float[2] x, float[2] never, bool t) => (float[2] y) <float[2] w = {1,2}> {
            a = Add(x, w)
            b = Exp(a)
            c = Neg(x)
            h = Relu(x)
            y = If (t) <then_branch = p () => (float[2] u) { u = Neg(h) },
                        else_branch = q () => (float[2] v) { v = Exp(x) }>
        }"""
    )

    assert remove_unused(model.graph) == 3
    assert ops(model) == ["Relu", "If"]
    assert [tensor.name for tensor in model.graph.inputs] == ["x", "never", "t"]
    assert "w" not in {tensor.name for tensor in model.to_proto().graph.initializer}


# shapes


def test_shapes_are_filled_in_and_dynamic_names_stay() -> None:
    model = _linear_model()

    assert infer_shapes(model.graph) > 0

    tensors = model.graph.tensors()
    assert list(tensors["a"].shape) == ["batch", 200]
    assert tensors["a"].dtype == np.float32
    assert list(tensors["y"].shape) == [None, 10]
    assert isinstance(tensors["w"], gs.Constant)
    assert infer_shapes(model.graph) == 0


def _linear_model() -> Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "s"], ["y"]),
    ]
    arrays = {"w": np.ones((8, 200), np.float32), "s": np.int64([-1, 10])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return from_proto(helper.make_model(graph, ir_version=8, opset_imports=opsets))


def test_what_the_file_says_of_a_shape_stays() -> None:
    model = parse(
        "g (float[N,2] x) => (float[M,2] y) <float[rows,2] a> { a=Relu(x) b=Exp(a) y=Neg(b) }"
    )

    infer_shapes(model.graph)

    tensors = model.graph.tensors()
    assert [tensors[name].shape[0] for name in "xaby"] == ["N", "rows", "rows", "M"]


def test_an_unknown_operator_is_no_obstacle() -> None:
    model = from_proto(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17, "my": 1]>'
            "g (float[2] x) => (float[2] y) { a = my.Op(x) b = Relu(x) c = Add(a, b) y = Neg(c) }"
        )
    )

    infer_shapes(model.graph)

    tensors = model.graph.tensors()
    assert tensors["a"].shape is None
    assert list(tensors["b"].shape) == [2]
