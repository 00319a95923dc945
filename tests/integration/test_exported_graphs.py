"""Every rule on the graphs that real exporters write."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import PlanError
from onnxqat.model import Model, from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, read_pairs
from onnxqat.rules import load_rule
from tests.exported import EXPORTED, example, exported
from tests.networks import RULES
from tests.oracles import run_ort

GRAPHS = pytest.mark.parametrize("name", EXPORTED)
# one with points around ops, one with groups and forced ranges, one with points at inputs alone
PLACEMENTS = pytest.mark.parametrize("rule", ["onnxruntime-cpu", "sophgo-bm1684x", "tensorrt"])


@cache
def prepared(name: str) -> Model:
    return prepare(from_proto(exported(name)))


@GRAPHS
def test_preparing_keeps_the_outputs(name):
    model = exported(name)
    feeds = example(model)

    for value, expected, actual in zip(
        model.graph.output,
        run_ort(model, feeds),
        run_ort(prepared(name).to_proto(), feeds),
        strict=True,
    ):
        # BatchNormalization folded into a layer rounds anew: some tens of ulps of the largest
        limit = 64 * np.spacing(np.abs(expected).max())
        assert np.abs(actual - expected).max() <= limit, value.name


@GRAPHS
@pytest.mark.parametrize("rule", RULES)
def test_every_node_has_a_point_or_a_reason(name, rule):
    graph = prepared(name).graph
    if rule == "ncnn" and not {"Conv", "Gemm"} & {n.op for n in graph.nodes}:
        with pytest.raises(PlanError, match="quantizes nothing"):
            make_plan(graph, load_rule(rule))
        return
    plan = make_plan(graph, load_rule(rule))
    points = {p.tensor for p in plan.points}
    explained = {s.node for s in plan.skips} | {n for chain in plan.chains for n in chain}
    explained |= {edge.node for p in plan.points for edge in p.consumers if edge.node}
    explained |= {n.name for n in graph.nodes if points & {t.name for t in n.outputs}}

    assert {n.name for n in graph.nodes} == explained - plan.requantized().keys()
    assert all(s.reason for s in plan.skips)


@GRAPHS
@PLACEMENTS
def test_inserted_is_valid_runs_and_strips_bit_for_bit(name, rule):
    floats = prepared(name)
    plan = make_plan(floats.graph, load_rule(rule))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    feeds = example(floats.to_proto())
    qdq = calibrate(empty, [feeds], observer="minmax")
    proto = qdq.to_proto()
    onnx.checker.check_model(proto, full_check=True)

    assert all(np.isfinite(y).all() for y in run_ort(proto, feeds))
    read = read_pairs(from_proto(proto)).floats
    before, after = (m.to_proto().SerializeToString(deterministic=True) for m in (floats, read))
    assert before == after
