from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxqat.errors import ModelError
from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.versions import changed_node
from tests.oracles import run_ort


def newest(nodes: list[onnx.NodeProto], opset: int, ir_version: int = 11) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-4, 5, (4, 3, 3, 3)).astype(np.float32),
        "shape": np.int64([0, -1]),
        "axes": np.int64([-1]),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "K"])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def network() -> list[onnx.NodeProto]:
    """Operators that have newer versions: in 22, 23, 24, 25 or 28."""
    return [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("HardSwish", ["c"], ["h"]),
        helper.make_node("MaxPool", ["h"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("DepthToSpace", ["p"], ["d"], blocksize=2),
        helper.make_node("Cast", ["d"], ["k"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Squeeze", ["t", "axes"], ["q"]),
        helper.make_node("Reshape", ["q", "shape"], ["y"]),
    ]


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(21, 10), (22, 10), (23, 11), (25, 12), (28, 13)]
)
def test_a_newer_opset_is_read_as_21_with_the_same_outputs(opset: int, ir_version: int) -> None:
    proto = newest(network(), opset, ir_version)

    result = from_proto(proto).to_proto()

    onnx.checker.check_model(result, full_check=True)
    assert (result.opset_import[0].version, result.ir_version) == (21, 10)
    assert proto.opset_import[0].version == opset
    x = {"x": np.random.default_rng(1).integers(-4, 5, (2, 3, 8, 8)).astype(np.float32)}
    expected = ReferenceEvaluator(proto).run(None, x)[0]
    np.testing.assert_allclose(run_ort(result, x)[0], expected, rtol=1e-6)
    assert prepare(from_proto(proto)).to_proto().opset_import[0].version == 21


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        pytest.param(helper.make_node("Swish", ["x"], ["y"], name="act"), 24, id="new-operator"),
        pytest.param(
            helper.make_node("Cast", ["x"], ["y"], name="act", to=24, round_mode="down"),
            25,
            id="new-attribute",
        ),
    ],
)
def test_a_node_without_an_equal_is_named(node: onnx.NodeProto, opset: int) -> None:
    message = rf"m: node 'act' \({node.op_type}\) of opset {opset} has no equivalent in opset 21"
    with pytest.raises(ModelError, match=message):
        from_proto(newest([node], opset), name="m")


def test_functions_and_branches_are_looked_at_too() -> None:
    text = """<ir_version: 11, opset_import: ["": %s, "my": 1]>
        g (float[2] x, bool t) => (float[2] y) {
            y = If (t) <then_branch = p () => (float[2] u) { u = my.act(x) },
                        else_branch = q () => (float[2] v) { v = %s(x) }>
        }
        <domain: "my", opset_import: ["": 24]> act (p) => (q) { q = %s(p) }"""
    x = {"x": np.float32([1, -2]), "t": np.array(True)}

    result = from_proto(onnx.parser.parse_model(text % (21, "Exp", "Elu"))).to_proto()

    assert result.functions[0].opset_import[0].version == 21
    np.testing.assert_allclose(run_ort(result, x)[0], [1, np.expm1(-2)], rtol=1e-6)
    for operators in (("Swish", "Elu"), ("Exp", "Swish")):
        with pytest.raises(
            ModelError, match=r"\(Swish\) of opset 24 has no equivalent in opset 21"
        ):
            from_proto(onnx.parser.parse_model(text % (24, *operators)))


def test_batch_normalization_means_the_same_under_the_names_of_opset_14() -> None:
    node = helper.make_node("BatchNormalization", list("xsbmv"), ["y"], epsilon=0.5)
    rng = np.random.default_rng(0)
    feeds = {name: rng.uniform(1, 2, (2, 3) if name == "x" else 3).astype(np.float32)
             for name in "xsbmv"}  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape)
              for n, a in feeds.items()]  # fmt: skip
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 3))
    graph = helper.make_graph([node], "g", values, [y])
    outputs = [
        run_ort(helper.make_model(graph, opset_imports=[helper.make_opsetid("", n)], ir_version=8),
                feeds)[0] for n in (9, 13, 16)
    ]  # fmt: skip

    assert changed_node([node], 9, 16) is None
    assert changed_node([node], 13, 16) is None
    np.testing.assert_array_equal(outputs[0], outputs[2])
    np.testing.assert_array_equal(outputs[1], outputs[2])
