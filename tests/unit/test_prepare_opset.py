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
        graph.node[0].op_type = "Conv"
        graph.node[0].attribute[0].ints[:] = [0, 0, 2, 2]

    monkeypatch.setattr(opset, "_mend_resizes", spoil)
    text = """<ir_version: 6, opset_import: ["": 11]>
    g (float[N,1,4,4] x) => (float[N,1,4,4] y) <float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}>
    { y = Conv<pads=[1,1,1,1]>(x, w) }"""
    with pytest.raises(ModelError, match=r"opset 11: upgrading to 13 changes output 'y' by"):
        prepare(from_proto(onnx.parser.parse_model(text)))


def test_metadata_survives():
    source = old_model(11)
    source.metadata_props.add(key="author", value="somebody")

    assert prepare(from_proto(source)).metadata == {"author": "somebody"}
