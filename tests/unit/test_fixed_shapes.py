"""Inputs of fixed shapes: what follows from them, and what cannot be."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.errors import ModelError, OptionError
from onnxqat.fixed_shapes import fix_shapes
from onnxqat.model import from_proto
from tests.oracles import run_ort

TWO = """<ir_version: 8, opset_import: ["": 17]>
two (float[N, 3, h, w] a, float[N, 3, h, w] b) => (float[N, flat] y, float[M] z)
{ s = Add(a, b) y = Flatten(s) z = ReduceSum<keepdims = 0>(s) }"""
BAKED = """<ir_version: 8, opset_import: ["": 17]>
baked (float[N, 4] x) => (float[K, 2] y)
<int64[2] shape = {1, 4}> { r = Reshape(x, shape) y = Reshape(r, half) }"""


def model(text):
    return from_proto(onnx.parser.parse_model(text.replace("half)", "shape)")))


def shapes(fixed):
    return {t.name: tuple(t.shape) for t in (*fixed.graph.inputs, *fixed.graph.outputs) if t.shape}


def test_names_are_fixed_wherever_they_are():
    before = model(TWO)
    fixed = fix_shapes(before, None, {"a": (2, 3, 5, 4)})

    assert shapes(fixed) == {"a": (2, 3, 5, 4), "b": (2, 3, 5, 4), "y": (2, 60)}
    assert before.graph.inputs[0].shape == ["N", 3, "h", "w"]
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    for ours, theirs in zip(
        run_ort(fixed.to_proto(), {"a": x, "b": x}),
        run_ort(before.to_proto(), {"a": x, "b": x}),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_leaves_other_lengths_free():
    fixed = fix_shapes(model(TWO), 4, {})

    assert shapes(fixed)["a"] == (4, 3, "h", "w")
    assert shapes(fixed)["y"][0] == 4


def test_a_shape_that_is_known_becomes_a_constant():
    text = """<ir_version: 8, opset_import: ["": 17]>
    token (float[N, 2, 3] x) => (float[N, 3, 3] y)
    <int64[2] tail = {1, 3}, float[1, 1, 3] token = {1, 2, 3}> {
        n = Shape<end = 1>(x) s = Concat<axis = 0>(n, tail) t = Expand(token, s)
        y = Concat<axis = 1>(t, x) }"""
    before = from_proto(onnx.parser.parse_model(text))
    fixed = fix_shapes(before, 1, {}).to_proto()

    assert "Shape" not in {node.op_type for node in fixed.graph.node}
    x = {"x": np.arange(6, dtype=np.float32).reshape(1, 2, 3)}
    np.testing.assert_array_equal(run_ort(fixed, x)[0], run_ort(before.to_proto(), x)[0])


@pytest.mark.parametrize(
    ("batch", "given", "message"),
    [
        (None, {"c": (1, 3, 2, 2)}, "no input 'c'. The inputs are 'a', 'b'"),
        (None, {"a": (1, 4, 2, 2)}, "1x4x2x2 does not fit its shape Nx3xhxw"),
        (None, {"a": (1, 3, 2)}, "1x3x2 does not fit"),
        (None, {"a": (1, 3, 2, 2), "b": (2, 3, 2, 2)}, "'b': 2x3x2x2 does not fit"),
        (2, {"a": (1, 3, 2, 2)}, "does not fit its shape"),
    ],
)
def test_shapes_that_cannot_be_are_refused(batch, given, message):
    with pytest.raises(OptionError, match=message):
        fix_shapes(model(TWO), batch, given)


def test_a_batch_that_the_graph_holds_is_found_by_running_it():
    assert shapes(fix_shapes(model(BAKED), 1, {}))["x"] == (1, 4)
    with pytest.raises(ModelError, match="Reshape"):
        fix_shapes(model(BAKED), 3, {})
