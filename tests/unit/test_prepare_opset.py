from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import from_proto
from onnxqat.preparation import conversion, prepare
from onnxqat.preparation.opset import upgrade_opset
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
    upgraded = prepare(from_proto(source)).to_proto()
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
    def spoil(graph):
        graph.node[0].attribute[0].ints[:] = [0, 0, 2, 2]

    monkeypatch.setattr(conversion, "_leave_out_empty", spoil)
    with pytest.raises(ModelError, match=r"opset 11: upgrading to 13 changes output 'y' by"):
        prepare(from_proto(old_model(11)))


@pytest.mark.parametrize("version", [9, 11, 13, 18])
def test_a_higher_opset_is_reached_with_the_same_outputs(version):
    source = old_model(version)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    upgraded = prepare(from_proto(source), opset=21).to_proto()
    onnx.checker.check_model(upgraded, full_check=True)

    assert (upgraded.opset_import[0].version, upgraded.ir_version) == (21, 10)
    np.testing.assert_array_equal(run_ort(upgraded, {"x": x})[0], run_ort(source, {"x": x})[0])


def test_where_only_types_changed_nothing_but_the_version_does():
    text = """<ir_version: 8, opset_import: ["": 15]> g (float[N,2] x) => (float[N,2] y)
    { a = Relu(x) y = Reshape<allowzero=0>(a, s) }"""
    source = onnx.parser.parse_model(text)
    source.graph.initializer.append(numpy_helper.from_array(np.int64([0, -1]), "s"))
    source.graph.node[0].doc_string = "kept"

    upgraded = prepare(from_proto(source), opset=19).to_proto()

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
            r"opset 8: must be upgraded, but does not run on random inputs",
            id="no-example",
        ),
    ],
)
def test_upgrades_that_fail(text, message):
    proto = onnx.parser.parse_model(f'<ir_version: 6, opset_import: ["": 8]> g {text}')

    with pytest.raises(ModelError, match=message):
        prepare(from_proto(proto))


def test_an_opset_that_cannot_be_wanted():
    with pytest.raises(ModelError, match="opset 22 is required, but onnxqat reads at most 21"):
        prepare(from_proto(old_model(13)), opset=22)


def test_integer_inputs_are_tried_with_indices():
    text = """<ir_version: 6, opset_import: ["": 11]>
    g (int64[N,S] ids, bool[N,S] mask) => (float[N,S,2] y) <float[2,2] w = {1,2,3,4}>
    { e = Gather(w, ids) m = Cast<to=1>(mask) u = Unsqueeze<axes=[2]>(m) y = Mul(e, u) }"""
    proto = onnx.parser.parse_model(text)

    upgraded = prepare(from_proto(proto)).to_proto()

    feeds = {"ids": np.int64([[0, 1, 1]]), "mask": np.array([[True, False, True]])}
    np.testing.assert_array_equal(run_ort(upgraded, feeds)[0], [[[1, 2], [0, 0], [3, 4]]])


def test_metadata_survives():
    source = old_model(11)
    source.metadata_props.add(key="author", value="somebody")

    assert prepare(from_proto(source)).metadata == {"author": "somebody"}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def sizes(*values: int) -> np.ndarray:
    return np.int64(values)


def factors(side: float) -> np.ndarray:
    return np.float32([1, 1, side, side])


IMAGE, ROWS, WIDE = normal(1, 4, 5, 5), normal(4, 6), normal(2, 3, 4)
# Opset, the one to reach, operator, inputs of which the first is x, outputs, attributes.
CHANGED = {
    "upsample-7": (7, 13, "Upsample", [IMAGE], 1, {"scales": [1.0, 1.0, 2.0, 2.0]}),
    "upsample-9": (9, 13, "Upsample", [IMAGE, factors(2)], 1, {}),
    "upsample-9-linear": (9, 13, "Upsample", [IMAGE, factors(2)], 1, {"mode": "linear"}),
    "resize-10": (10, 13, "Resize", [IMAGE, factors(1.7)], 1, {}),
    "resize-10-smaller": (10, 13, "Resize", [IMAGE, factors(0.6)], 1, {}),
    "resize-10-linear": (10, 13, "Resize", [IMAGE, factors(1.7)], 1, {"mode": "linear"}),
    "resize-10-linear-smaller": (10, 18, "Resize", [IMAGE, factors(0.6)], 1, {"mode": "linear"}),
    "split-11": (11, 21, "Split", [ROWS], 3, {"axis": 1}),
    "split-11-sizes": (11, 18, "Split", [ROWS], 2, {"axis": 1, "split": [2, 4]}),
    "split-13": (13, 18, "Split", [ROWS], 2, {"axis": -1}),
    "split-13-sizes": (13, 21, "Split", [ROWS, sizes(2, 4)], 2, {"axis": 1}),
    "dropout-7": (7, 13, "Dropout", [ROWS], 1, {"ratio": 0.3}),
    "clip-7": (7, 13, "Clip", [ROWS], 1, {"max": 0.5}),
    "pad-7": (7, 13, "Pad", [ROWS], 1, {"pads": [0, 1, 1, 2], "value": 1.5}),
    "squeeze-11": (11, 13, "Squeeze", [ROWS[:, :1]], 1, {"axes": [1]}),
    "unsqueeze-11": (11, 21, "Unsqueeze", [ROWS], 1, {"axes": [0, 2]}),
    "reduce-sum-11": (11, 13, "ReduceSum", [ROWS], 1, {"axes": [1], "keepdims": 0}),
    "reduce-mean-13": (13, 18, "ReduceMean", [ROWS], 1, {"axes": [1]}),
    "reduce-max-11": (11, 21, "ReduceMax", [ROWS], 1, {"axes": [0], "keepdims": 0}),
    "softmax-11": (11, 13, "Softmax", [WIDE], 1, {"axis": 1}),
    "softmax-11-default": (11, 13, "Softmax", [WIDE], 1, {}),
    "log-softmax-11": (11, 13, "LogSoftmax", [WIDE], 1, {"axis": 0}),
    "top-k-7": (7, 13, "TopK", [ROWS], 2, {"k": 2}),
    "slice-9": (9, 13, "Slice", [ROWS], 1, {"starts": [1, 0], "ends": [3, 4]}),
    "scatter-9": (9, 13, "Scatter", [ROWS, sizes(0, 3)[None], normal(1, 2)], 1, {"axis": 0}),
    "roi-align-10": (
        10, 16, "RoiAlign", [IMAGE, np.float32([[0, 0, 4, 4]]), sizes(0)], 1,
        {"output_height": 2, "output_width": 2},
    ),
    "grid-sample-16": (16, 20, "GridSample", [IMAGE, normal(1, 3, 3, 2)], 1, {"mode": "bilinear"}),
}  # fmt: skip


@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "constants"])
@pytest.mark.parametrize(
    ("version", "target", "operator", "arrays", "count", "attributes"),
    CHANGED.values(),
    ids=CHANGED,
)
def test_operators_that_changed_compute_what_they_did(
    version, target, operator, arrays, count, attributes, constants
):
    names = ["r", *(f"c{i}" for i in range(1, len(arrays)))]
    stored = [numpy_helper.from_array(a, n) for a, n in zip(arrays[1:], names[1:], strict=True)]
    inner = [f"y{i}" for i in range(count)]
    nodes = [
        *(helper.make_node("Constant", [], [t.name], value=t) for t in stored if constants),
        helper.make_node("Identity", ["x"], ["r"]),
        helper.make_node(operator, names, inner, name="node", **attributes),
        *(helper.make_node("Identity", [name], [f"{name}/out"]) for name in inner),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "old",
        [value("x", TensorProto.FLOAT, arrays[0].shape)],
        [
            value(f"{name}/out", TensorProto.INT64 if operator == "TopK" and i else 1, None)
            for i, name in enumerate(inner)
        ],
        [] if constants else stored,
    )
    opsets = [helper.make_opsetid("", version)]
    source = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    expected = run_ort(source, {"x": arrays[0]})

    upgraded = upgrade_opset(from_proto(source), target).to_proto()

    assert upgraded.opset_import[0].version == target
    assert set(inner) <= {name for node in upgraded.graph.node for name in node.output}
    for found, right in zip(run_ort(upgraded, {"x": arrays[0]}), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_an_upgrade_that_is_not_known_is_refused():
    text = """<ir_version: 8, opset_import: ["": 11]>
    g (float[2,3,4] x) => (float[2,3,4] y) { y = Hardmax(x) }"""

    with pytest.raises(ModelError, match="upgrading to 13 changes output 'y'"):
        prepare(from_proto(onnx.parser.parse_model(text)))
    # onnx's converter takes the scale of a group for that of a channel
    norm = """<ir_version: 8, opset_import: ["": 18]>
    g (float[1,4,3,3] x) => (float[1,4,3,3] y) <float[2] s = {1,2}, float[2] b = {0,1}>
    { y = GroupNormalization<num_groups = 2>(x, s, b) }"""
    with pytest.raises(
        ModelError, match="cannot be upgraded to 21: the upgraded model does not run"
    ):
        upgrade_opset(from_proto(onnx.parser.parse_model(norm)), 21)
