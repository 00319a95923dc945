from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import from_proto
from onnxqat.preparation import PASSES, prepare
from tests.oracles import max_ulp, run_ort


def make(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    outputs: tuple[str, ...] = ("y",),
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, ir_version=ir_version, opset_imports=opsets)


def network(ir_version: int = 8) -> onnx.ModelProto:
    """Something for every pass."""
    rng = np.random.default_rng(0)
    scale = numpy_helper.from_array(np.ones(4, np.float32) / 2)
    arrays = {
        "conv.weight": rng.uniform(0.1, 1, (4, 3, 3, 3)).astype(np.float32),
        "shift": rng.uniform(0.1, 1, 4).astype(np.float32),
        "mean": -rng.uniform(0.1, 1, 4).astype(np.float32),
        "var": rng.uniform(0.1, 1, 4).astype(np.float32),
        "fc": rng.uniform(0.1, 1, (10, 4)).astype(np.float32),
        "unread": np.zeros(5, np.float32),
    }
    nodes = [
        helper.make_node("Constant", [], ["scale"], value=scale),
        helper.make_node(
            "Conv", ["x", "conv.weight"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]
        ),
        helper.make_node("Identity", ["c"], ["i"]),
        helper.make_node("BatchNormalization", ["i", "scale", "shift", "mean", "var"], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        helper.make_node("Exp", ["c"], ["dead"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Dropout", ["p"], ["d"]),
        helper.make_node("Flatten", ["d"], ["f"]),
        helper.make_node("Transpose", ["fc"], ["fc_t"]),
        helper.make_node("MatMul", ["f", "fc_t"], ["m"]),
        helper.make_node("Identity", ["m"], ["y"]),
    ]
    return make(nodes, arrays, ir_version=ir_version)


def serialized(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def test_the_canonical_form() -> None:
    proto = network()

    result = prepare(from_proto(proto)).to_proto()

    onnx.checker.check_model(result, full_check=True)
    assert [(node.op_type, node.output[0]) for node in result.graph.node] == [
        ("Conv", "b"),
        ("Relu", "r"),
        ("GlobalAveragePool", "p"),
        ("Flatten", "f"),
        ("MatMul", "y"),
    ]
    assert result.graph.node[0].name == "Conv_c"
    names = ["conv.weight", "conv.bias", "fc_t"]
    assert [tensor.name for tensor in result.graph.initializer] == names
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*result.graph.value_info, *result.graph.output)
    }
    assert shapes == {
        "b": ["N", 4, 4, 4],
        "r": ["N", 4, 4, 4],
        "p": ["N", 4, 1, 1],
        "f": ["N", 4],
        "y": ["N", 10],
    }
    x = {"x": np.random.default_rng(1).uniform(0.1, 1, (2, 3, 8, 8)).astype(np.float32)}
    assert max_ulp(run_ort(result, x)[0], run_ort(proto, x)[0]) <= 16


def test_the_input_is_not_changed() -> None:
    proto = network()
    proto.graph.node[0].attribute[0].t.CopyFrom(
        helper.make_tensor("", TensorProto.FLOAT, [4], [0.5] * 4)  # not raw, loading would show
    )
    source = serialized(proto)
    model = from_proto(proto)
    before = serialized(model.to_proto())

    prepare(model).to_proto()

    assert serialized(model.to_proto()) == before
    assert serialized(proto) == source


def test_preparing_twice_is_preparing_once() -> None:
    once = prepare(from_proto(network()))
    written = serialized(once.to_proto())

    assert serialized(prepare(once).to_proto()) == written
    read = from_proto(onnx.load_model_from_string(written))
    assert serialized(prepare(read).to_proto()) == written
    assert [apply(read.copy().graph) for apply in PASSES] == [0] * len(PASSES)


def test_what_one_pass_makes_possible_for_an_earlier_one_is_done() -> None:
    # the Dropout is known to be inactive only after its third input is computed
    nodes = [
        helper.make_node("Squeeze", ["off", "axes"], ["mode"]),
        helper.make_node("Dropout", ["x", "", "mode"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    arrays = {"off": np.zeros(1, np.bool_), "axes": np.int64([0])}

    result = prepare(from_proto(make(nodes, arrays))).to_proto()

    assert [node.op_type for node in result.graph.node] == ["Relu"]


def test_initializers_are_no_longer_inputs() -> None:
    proto = network()
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )

    result = prepare(from_proto(proto)).to_proto()

    assert [value.name for value in result.graph.input] == ["x"]


def test_an_ir_version_that_wants_initializers_among_the_inputs_is_raised() -> None:
    proto = network(ir_version=3)

    assert prepare(from_proto(proto)).to_proto().ir_version == 4


def test_metadata_and_documentation_survive() -> None:
    proto = network()
    proto.producer_name, proto.doc_string = "exporter", "a model"
    proto.metadata_props.add(key="license", value="MIT")
    proto.graph.node[1].doc_string, proto.graph.node[1].name = "the convolution", "conv"
    proto.graph.node[3].doc_string = "the normalization"
    proto.graph.initializer[0].doc_string = "a weight"
    proto.graph.input[0].doc_string = "an image"

    result = prepare(from_proto(proto)).to_proto()

    assert (result.producer_name, result.doc_string) == ("exporter", "a model")
    theirs = [(p.key, p.value) for p in result.metadata_props if not p.key.startswith("onnxqat.")]
    assert theirs == [("license", "MIT")]
    assert result.graph.node[0].doc_string == "the convolution"
    assert result.graph.initializer[0].doc_string == "a weight"
    assert result.graph.input[0].doc_string == "an image"


def test_a_graph_without_nodes_and_one_that_outputs_an_initializer() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] x, float[2] w) <float[2] w = {1, 2}> { }"""
    )

    result = prepare(from_proto(proto)).to_proto()

    x = np.float32([3, 4])
    assert [list(a) for a in run_ort(result, {"x": x})] == [[3, 4], [1, 2]]


SUBGRAPHS = {
    "if": """g (float[2] x, bool t) => (float[2] y) <float[2] w = {1,2}, float[2] only = {3,4}> {
        k = Constant<value = float[2] {5, 6}>()
        h = Identity(x)
        a = Add(h, w)
        y = If (t) <
            then_branch = p () => (float[2] u) { i = Identity(a) u = Add(i, w) },
            else_branch = q () => (float[2] v) { j = Mul(h, only) v = Add(j, k) }>
    }""",
    "loop": """g (float[2] x, bool t) => (float[2] y) <int64 n = {3}, float[2] w = {1,2}> {
        h = Identity(x)
        s = Relu(w)
        y = Loop (n, t, h) <body = b (int64 i, bool c, float[2] z) => (bool d, float[2] e)
            { d = Identity(c) f = Add(z, s) e = Mul(f, w) }>
    }""",
    "nested": """g (float[2] x, bool t) => (float[2] y) <float[2] w = {1,2}> {
        h = Identity(x)
        y = If (t) <
            then_branch = p () => (float[2] u) { u = If (t) <
                then_branch = r () => (float[2] l) { l = Add(h, w) },
                else_branch = s () => (float[2] m) { m = Neg(h) }> },
            else_branch = q () => (float[2] v) { v = Exp(h) }>
    }""",
}


@pytest.mark.parametrize("text", SUBGRAPHS.values(), ids=SUBGRAPHS)
@pytest.mark.parametrize("condition", [True, False])
def test_subgraphs(text: str, condition: bool) -> None:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text)

    result = prepare(from_proto(proto)).to_proto()

    onnx.checker.check_model(result, full_check=True)
    feeds = {"x": np.float32([1, -2]), "t": np.array(condition)}
    assert np.array_equal(run_ort(result, feeds)[0], run_ort(proto, feeds)[0])
    again = prepare(from_proto(result)).to_proto()
    assert serialized(again) == serialized(result)


def test_a_graph_that_onnx_cannot_type_is_an_error() -> None:
    proto = make([helper.make_node("Relu", [], ["y"])], {})

    with pytest.raises(ModelError, match=r"node 'y' \(Relu\) has 0 inputs; the operator accepts 1"):
        prepare(from_proto(proto))


def test_a_value_written_twice_is_an_error() -> None:
    proto = make(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Exp", ["x"], ["y"])], {}
    )

    with pytest.raises(ModelError, match="'y' is written by more than one"):
        prepare(from_proto(proto))
