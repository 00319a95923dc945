from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.calibration import placeholder_params
from onnxqat.model import Model, from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.oracles import run_ort

HEADER = '<ir_version: 8, opset_import: ["": 17]>'
X = np.float32([[1, -2]])

CONSTANT = {
    "then": """<bool t = {1}, float[2] w = {3, 4}> { y = If (t) <
        then_branch = p () => (float[1,2] u) <float[2] own = {5, 6}>
            { i = Add(x, w) u = Mul(i, own) },
        else_branch = q () => (float[1,2] v) { v = Exp(x) }> }""",
    "else": """<bool t = {0}> { h = Relu(x) y = If (t) <
        then_branch = p () => (float[1,2] u) { u = Neg(h) },
        else_branch = q () => (float[1,2] v) { v = Exp(h) }> }""",
    "names-taken": """<bool t = {1}> { i = Neg(x) k = If (t) <
        then_branch = p () => (float[1,2] u) { j = Exp(i) u = Abs(j) },
        else_branch = q () => (float[1,2] v) { v = Exp(x) }>
        l = If (t) <
        then_branch = p () => (float[1,2] u) { j = Neg(k) u = Neg(j) },
        else_branch = q () => (float[1,2] v) { v = Exp(x) }>
        y = Add(k, l) }""",
    "outer-value": """<bool t = {1}, float[1,2] w = {3, 4}> { y = If (t) <
        then_branch = p () => (float[1,2] u) { u = Identity(w) },
        else_branch = q () => (float[1,2] v) { v = Exp(x) }> }""",
    "nested": """<bool t = {1}, bool f = {0}> { y = If (t) <
        then_branch = p () => (float[1,2] u) { h = Neg(x) u = If (f) <
            then_branch = r () => (float[1,2] a) { a = Exp(h) },
            else_branch = s () => (float[1,2] b) { b = Abs(h) }> },
        else_branch = q () => (float[1,2] v) { v = Exp(x) }> }""",
    "loop-within": """<bool t = {1}, int64 n = {3}> { h = Neg(x) z = If (t) <
        then_branch = p () => (float[1,2] u) { h2 = Abs(h) u = Loop (n, t, h2) <
            body = b (int64 i, bool c, float[1,2] s) => (bool d, float[1,2] e)
                { d = Identity(c) e = Mul(s, h2) }> },
        else_branch = q () => (float[1,2] v) { v = Exp(x) }> y = Neg(z) }""",
    "squeeze": """<int64 k = {0}, int64 one = {1}, int64[1] a = {0}> {
        s = Shape(x) n = Gather(s, k) t = Equal(n, one)
        y = If (t) <then_branch = p () => (float[m] u) { u = Squeeze(x, a) },
                    else_branch = q () => (float[m] v) { v = Identity(x) }> }""",
}


def parse(body: str, *, result: str = "float[m] y") -> Model:
    return from_proto(onnx.parser.parse_model(f"{HEADER} g (float[1,2] x) => ({result}) {body}"))


@pytest.mark.parametrize("body", CONSTANT.values(), ids=CONSTANT)
def test_the_branch_that_is_taken_replaces_the_if(body: str) -> None:
    model = parse(body)
    model.graph.outputs[0].shape = None
    before = model.to_proto()

    prepared = prepare(model)

    result = prepared.to_proto()
    onnx.checker.check_model(result)
    assert "If" not in [node.op_type for node in result.graph.node]
    expected, found = run_ort(before, {"x": X})[0], run_ort(result, {"x": X})[0]
    assert expected.shape == found.shape
    assert np.array_equal(expected, found)
    assert model.to_proto() == before


COMPUTED = {
    "if": """(float[N,4] x, bool t) => (float[N,4] y)
        <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, float[4] b = {1,2,3,4}> {
            m = MatMul(x, w)
            h = If (t) <
                then_branch = p () => (float[N,4] u) { i = MatMul(m, w) u = Add(i, b) },
                else_branch = q () => (float[N,4] v) { v = Neg(x) }>
            k = Relu(h)
            y = MatMul(k, w)
        }""",
    "loop": """(float[N,4] x, bool t) => (float[N,4] y)
        <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, int64 n = {2}> {
            m = MatMul(x, w)
            h = Loop (n, t, m) <body = b (int64 i, bool c, float[N,4] z) => (bool d, float[N,4] e)
                { d = Identity(c) f = MatMul(z, w) e = Sub(f, m) }>
            y = MatMul(h, w)
        }""",
    "scan": """(float[N,4] x, bool t) => (float[N,4] y)
        <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, float[4] z = {0,0,0,0}> {
            m = MatMul(x, w)
            s, h = Scan <num_scan_inputs = 1, body =
                b (float[4] state, float[4] row) => (float[4] next, float[4] sum)
                { sum = Add(state, row) next = Identity(sum) }> (z, m)
            y = MatMul(h, w)
        }""",
}


@pytest.mark.parametrize("body", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("condition", [True, False])
def test_other_subgraphs_pass_through_insert_and_strip(body: str, condition: bool) -> None:
    proto = onnx.parser.parse_model(f"{HEADER} g {body}")
    prepared = prepare(from_proto(proto))
    floats = prepared.to_proto()
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))
    params = placeholder_params(prepared, plan)

    quantized = insert_pairs(prepared, plan, params, state="uncalibrated")

    onnx.checker.check_model(quantized.to_proto(), full_check=True)
    assert {p.role for p in plan.points} >= {"weight", "activation"}
    feeds = {"x": np.float32([[1, -2, 3, 0.5], [0, 1, 2, 3]]), "t": np.array(condition)}
    expected = run_ort(proto, feeds)[0]
    assert np.array_equal(run_ort(floats, feeds)[0], expected)
    assert run_ort(quantized.to_proto(), feeds)[0].shape == expected.shape
    assert quantized.floats.to_proto() == floats
