"""Biases and matrix operands of every shape that ONNX allows, from the plan to the export.

The oracles are onnxruntime's plain and fused kernels on the exported file, and the Q/DQ model
itself, which the export may leave by the rounding of its bias only: one level of the output.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.formats import EXPORTS
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
# the sum of two products of 7 and 8 bits fits the 16-bit sums of processors without VNNI
SEVEN_BITS = ("weight.bits=7",)


def network(nodes, weights, x, y):
    """Return a model of float input x and output y, of the shapes given."""
    rng = np.random.default_rng(0)
    stored = {
        n: rng.normal(scale=0.3, size=w).astype(np.float32) if isinstance(w, tuple) else w
        for n, w in weights.items()
    }
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(v, n) for n, v in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def gemm(bias, *, rows=6, columns=6, **attributes):
    shape = (columns, 16) if attributes.get("transB") else (16, columns)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="n", **attributes)
    return network([node], {"w": shape, "b": bias}, [rows, 16], [rows, columns])


def matmul(x, w, y, *, left=False, bias=None):
    operands = ["w", "x"] if left else ["x", "w"]
    nodes = [helper.make_node("MatMul", operands, ["y" if bias is None else "m"], name="n")]
    if bias is not None:
        nodes.append(helper.make_node("Add", ["m", "b"], ["y"], name="add"))
    return network(nodes, {"w": w} | ({} if bias is None else {"b": bias}), x, y)


def batch(model, seed):
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def calibrated(model, rule, overrides=SEVEN_BITS):
    floats = prepare(from_proto(model))
    plan = make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [batch(model, s) for s in range(2)], observer="minmax")


def run(proto, feeds, level="ORT_DISABLE_ALL"):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    data = proto.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def check_everywhere(model, qdq):
    """Compare export and integer evaluation with the Q/DQ model, in levels of the output."""
    feeds, params = batch(model, 99), qdq.params
    step = params["y"].scale if "y" in params else np.ptp(run(model, feeds)) / 255
    expected = run(qdq.to_proto(), feeds)
    exported = EXPORTS["onnxruntime"](qdq).to_proto()
    onnx.checker.check_model(exported, full_check=True)
    for level in LEVELS:
        found = run(exported, feeds, level)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= step * (1 + 1e-4), level
    integer = IntegerProgram(qdq).run(None, feeds)[0]
    assert np.abs(integer - expected).max() <= step * (1 + 1e-4)
    return {t.name: numpy_helper.to_array(t) for t in exported.graph.initializer}


# shape of the bias, rows and columns of the product, whether an int32 bias stands for it
BIASES = [
    ((), 6, 6, True),
    ((1,), 6, 6, True),
    ((1, 1), 6, 6, True),
    ((6,), 6, 6, True),
    ((1, 6), 6, 6, True),
    ((1,), 6, 1, True),
    ((1, 1), 1, 6, True),
    ((6, 1), 6, 6, False),
    ((4, 1), 4, 6, False),
    ((4, 6), 4, 6, False),
    ((4, 1), 4, 1, False),
]


@pytest.mark.parametrize("rule", ["onnxruntime-cpu", "sophgo-bm1684x"])
@pytest.mark.parametrize(("bias", "rows", "columns", "is_integer"), BIASES)
def test_a_gemm_bias_is_exported_per_channel_or_stays_float(rule, bias, rows, columns, is_integer):
    model = gemm(bias, rows=rows, columns=columns, transB=len(bias) % 2)
    qdq = calibrated(model, rule)
    arrays = check_everywhere(model, qdq)

    assert ("b" in {p.tensor for p in qdq.plan.points}) == is_integer
    assert ("n/bias/integers" in arrays) == is_integer
    if is_integer:
        assert arrays["n/bias/integers"].shape == (columns,)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_gemm_that_multiplies_keeps_its_bias_float(attributes):
    model = gemm((6,), rows=16, columns=6, **attributes)
    qdq = calibrated(model, "onnxruntime-cpu")
    feeds = batch(model, 99)
    exported = EXPORTS["onnxruntime"](qdq).to_proto()
    expected = run(qdq.to_proto(), feeds)

    assert ("b" in {p.tensor for p in qdq.plan.points}) == ("transA" in attributes)
    for level in LEVELS:
        error = np.abs(run(exported, feeds, level) - expected).max()
        assert error <= qdq.params["y"].scale * (1 + 1e-4)


# operand x, weight, output, whether the weight is the left operand
OPERANDS = [
    ([2, 3, 16], (2, 16, 6), [2, 3, 6], False),
    ([3, 16], (2, 16, 6), [2, 3, 6], False),
    ([2, 5, 3, 16], (1, 5, 16, 6), [2, 5, 3, 6], False),
    ([3, 16], (16,), [3], False),
    ([16], (16, 6), [6], False),
    ([2, 3, 16], (16,), [2, 3], False),
    ([16], (16,), [], False),
    ([16, 3], (6, 16), [6, 3], True),
    ([2, 16, 3], (6, 16), [2, 6, 3], True),
    ([2, 16, 3], (2, 6, 16), [2, 6, 3], True),
    ([16, 3], (16,), [3], True),
    ([2, 16, 3], (16,), [2, 3], True),
    ([16], (6, 16), [6], True),
    ([16], (2, 6, 16), [2, 6], True),
]


@pytest.mark.parametrize("rule", ["onnxruntime-cpu", "sophgo-bm1684x"])
@pytest.mark.parametrize("bias", [None, "last"])
@pytest.mark.parametrize(("x", "w", "y", "left"), OPERANDS)
def test_matrix_operands_of_every_rank_and_side(rule, x, w, y, left, bias):
    if bias == "last":
        bias = tuple(y[-1:]) or (1,)
    model = matmul(x, w, y or ([] if bias is None else [1]), left=left, bias=bias)
    check_everywhere(model, calibrated(model, rule, (*SEVEN_BITS, "weight.axis=channel")))
