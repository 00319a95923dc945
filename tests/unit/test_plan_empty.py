"""Tensors without values (empty caches, constants of length 0) get no point, and stop nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.train.form import training_form
from tests.oracles import run_ort, sqnr_db

CONSTANTS = {
    "w": np.eye(4, dtype=np.float32) / 2,
    "none": np.zeros((4, 0), np.float32),
    "nothing": np.zeros((1, 0), np.float32),
    "zero": np.int64([0]),
    "one": np.int64([1]),
    "sizes": np.int64([0, 4]),
}
# Body, and the nodes that hold no values.
EMPTY = {
    "a constant": ("c = Concat<axis = 0>(none_t, m)", set()),
    "a weight": ("e = MatMul(m, none) c = Concat<axis = 1>(m, e)", {"e"}),
    "a slice": ("s = Slice(m, zero, zero, one) c = Concat<axis = 1>(s, m)", {"s"}),
    "an operand": (
        "s = Slice(m, zero, zero, one) a = Add(s, nothing) c = Concat<axis = 1>(m, a)",
        {"s", "a"},
    ),
    "a part": ("a, b = Split<axis = 1>(m, sizes) c = Concat<axis = 1>(b, a)", set()),
    "a cache": ("c = Concat<axis = 0>(past, m)", set()),
}


@pytest.mark.parametrize("rule", ["onnxruntime-cpu", "sophgo-bm1684x", "esp32-p4"])
@pytest.mark.parametrize("name", EMPTY)
def test_what_holds_no_values_is_left_out(name, rule):
    body, nodes = EMPTY[name]
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] x, float[0,4] past) => (float[M,4] y)
        {{ m = MatMul(x, w) {body} y = Add(c, c) }}"""
    )
    arrays = CONSTANTS | {"none_t": CONSTANTS["none"].T}
    tensors = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()]
    model.graph.initializer.extend(tensors)
    floats = prepare(from_proto(model))
    plan = make_plan(floats.graph, load_rule(rule))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    feeds = {"x": x, "past": np.zeros((0, 4), np.float32)}
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    quantized = calibrate(empty, [feeds], observer="minmax")
    outputs = [run_ort(m.to_proto(), feeds)[0] for m in (floats, quantized)]
    shapes = {t.name: t.shape for t in quantized.floats.graph.tensors().values()}

    assert {"x", "w", "m", "c"} <= {p.tensor for p in plan.points}
    assert all(0 not in shapes[p.tensor] for p in plan.points)
    skipped = {s.node.split("_")[-1] for s in plan.skips if "holds no values" in s.reason}
    assert skipped == nodes
    assert sqnr_db(*outputs) > 29
    assert set(training_form(quantized).weights) == {"w"}
