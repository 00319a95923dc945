from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import from_proto, to_proto
from onnxqat.prepare import opset, prepare
from tests.oracles import run_ort


def old_model(version: int, *, mode: str = "nearest") -> onnx.ModelProto:
    """Conv, Upsample or Resize, Clip with attributes: what exporters wrote for old opsets."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "w")]
    scales = numpy_helper.from_array(np.float32([1, 1, 2, 2]), "scales")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1])]
    if version < 10:
        nodes.append(helper.make_node("Upsample", ["c", "scales"], ["u"], name="up", mode=mode))
    else:
        weights.append(numpy_helper.from_array(np.zeros(0, np.float32), "roi"))
        inputs = ["c", "roi", "scales"] if version > 10 else ["c", "scales"]
        nodes.append(helper.make_node("Resize", inputs, ["u"], name="up", mode=mode))
    if version < 11:
        nodes.append(helper.make_node("Clip", ["u"], ["y"], name="clip", min=0.0, max=6.0))
    else:
        weights += [numpy_helper.from_array(np.float32(v), n) for n, v in (("l", 0), ("h", 6))]
        nodes.append(helper.make_node("Clip", ["u", "l", "h"], ["y"], name="clip"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "old",
        [value("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["N", 4, 16, 16])],
        [*weights, scales],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=6)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("version", [9, 11, 12])
def test_old_opsets_become_13_with_the_same_outputs(version, mode):
    source = old_model(version, mode=mode)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    upgraded = to_proto(prepare(from_proto(source)))
    onnx.checker.check_model(upgraded, full_check=True)

    assert upgraded.opset_import[0].version == 13
    np.testing.assert_array_equal(run_ort(upgraded, {"x": x})[0], run_ort(source, {"x": x})[0])
    assert {"c", "u", "y"} <= {o for n in upgraded.graph.node for o in n.output}


def test_opset_13_and_above_stay():
    text = (
        '<ir_version: 8, opset_import: ["": 15]> g (float[N,2] x) => (float[N,2] y) {y = Relu(x)}'
    )
    model = from_proto(onnx.parser.parse_model(text))

    assert prepare(model).graph.opset == 15


def test_an_upgrade_that_changes_the_outputs_is_refused(monkeypatch):
    def spoil(graph, _source):
        graph.node[0].attribute[0].ints[:] = [0, 0, 2, 2]

    monkeypatch.setattr(opset, "_mend_resizes", spoil)
    with pytest.raises(ModelError, match=r"opset 11: upgrading to 13 changes output 'y' by"):
        prepare(from_proto(old_model(11)))


@pytest.mark.parametrize("version", [9, 11, 13, 18])
def test_a_higher_opset_is_reached_with_the_same_outputs(version):
    source = old_model(version)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    upgraded = to_proto(prepare(from_proto(source), opset=21))
    onnx.checker.check_model(upgraded, full_check=True)

    assert (upgraded.opset_import[0].version, upgraded.ir_version) == (21, 10)
    np.testing.assert_array_equal(run_ort(upgraded, {"x": x})[0], run_ort(source, {"x": x})[0])


def test_where_only_types_changed_nothing_but_the_version_does():
    text = """<ir_version: 8, opset_import: ["": 15]> g (float[N,2] x) => (float[N,2] y)
    { a = Relu(x) y = Reshape<allowzero=0>(a, s) }"""
    source = onnx.parser.parse_model(text)
    source.graph.initializer.append(numpy_helper.from_array(np.int64([0, -1]), "s"))
    source.graph.node[0].doc_string = "kept"

    upgraded = to_proto(prepare(from_proto(source), opset=19))

    assert (upgraded.opset_import[0].version, upgraded.ir_version) == (19, 9)
    assert upgraded.graph.node[0].doc_string == "kept"
    assert [n.op_type for n in upgraded.graph.node] == ["Relu", "Reshape"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "(float[N,2] x) => (float[N,2] y) "
            "<float[2] w = {1, 2}> { y = BatchNormalization<spatial=0>(x, w, w, w, w) }",
            r"opset 8 cannot be upgraded to 13 \(.*\); the first node that has to change is "
            r"'y' \(BatchNormalization\)",
            id="converter",
        ),
        pytest.param(
            "(float[N,2] x) => (float[M,3] y) <int64[2] s = {5, 3}> "
            "{ a = Clip(x) y = Reshape(a, s) }",
            r"opset 8: has to be upgraded, and does not run on random inputs",
            id="no-example",
        ),
    ],
)
def test_upgrades_that_fail(text, message):
    proto = onnx.parser.parse_model(f'<ir_version: 6, opset_import: ["": 8]> g {text}')

    with pytest.raises(ModelError, match=message):
        prepare(from_proto(proto))


def test_an_opset_that_cannot_be_wanted():
    with pytest.raises(ModelError, match="opset 22 is wanted; at most 21 is read"):
        prepare(from_proto(old_model(13)), opset=22)


def test_integer_inputs_are_tried_with_indices():
    text = """<ir_version: 6, opset_import: ["": 11]>
    g (int64[N,S] ids, bool[N,S] mask) => (float[N,S,2] y) <float[2,2] w = {1,2,3,4}>
    { e = Gather(w, ids) m = Cast<to=1>(mask) u = Unsqueeze<axes=[2]>(m) y = Mul(e, u) }"""
    proto = onnx.parser.parse_model(text)

    upgraded = to_proto(prepare(from_proto(proto)))

    feeds = {"ids": np.int64([[0, 1, 1]]), "mask": np.array([[True, False, True]])}
    np.testing.assert_array_equal(run_ort(upgraded, feeds)[0], [[[1, 2], [0, 0], [3, 4]]])


def test_metadata_survives():
    source = old_model(11)
    source.metadata_props.add(key="author", value="somebody")

    assert prepare(from_proto(source)).metadata == {"author": "somebody"}
