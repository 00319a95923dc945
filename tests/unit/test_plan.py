from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxqat.errors import PlanError, RuleError
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import Edge, QuantPlan, make_plan
from onnxqat.preparation import prepare
from onnxqat.rules import load_rule
from tests.networks import RULES, W4A4, attention, convnet

GOLDEN = Path(__file__).parent.parent / "golden"


def plan_of(network: onnx.ModelProto, rule: str, *overrides: str) -> QuantPlan:
    graph = prepare(from_proto(network)).graph
    return make_plan(graph, load_rule(rule), [parse_override(o) for o in overrides])


def point(plan: QuantPlan, tensor: str):
    return next(p for p in plan.points if p.tensor == tensor)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", [convnet, attention], ids=["convnet", "attention"])
def test_plan_is_the_reviewed_one(network, rule, request):
    text = f"{plan_of(network(), rule)}\n"
    path = GOLDEN / f"{network.__name__}.{rule}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)

    assert path.read_text() == text


@pytest.mark.parametrize("rule", RULES)
def test_every_node_is_quantized_fused_or_skipped_with_a_reason(rule):
    for network in (convnet(), attention()):
        graph = prepare(from_proto(network)).graph
        plan = make_plan(graph, load_rule(rule))
        covered = {e.node for p in plan.points for e in p.consumers} | {s.node for s in plan.skips}
        covered |= {name for chain in plan.chains for name in chain}
        quantized = {p.tensor for p in plan.points}
        covered |= {n.name for n in graph.nodes if n.outputs[0].name in quantized}

        assert {n.name for n in graph.nodes} <= covered
        assert all(s.reason for s in plan.skips)
        assert all(p.reason for p in plan.points)


def test_plan_survives_json_and_is_stable():
    plan = plan_of(convnet(), "sophgo-bm1684x", *W4A4)

    assert QuantPlan.from_json(plan.to_json()) == plan
    assert plan.to_json() == plan_of(convnet(), "sophgo-bm1684x", *W4A4).to_json()


def test_planning_changes_nothing():
    model = prepare(from_proto(convnet()))
    before = model.to_proto().SerializeToString(deterministic=True)
    make_plan(model.graph, load_rule("onnxruntime-cpu"))

    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_first_and_last_cover_weights_and_input_activations_only():
    plan = plan_of(convnet(), "sophgo-bm1684x", *W4A4)
    bits = {p.tensor: p.spec.bits for p in plan.grid_points()}

    assert (bits["input"], bits["w1"]) == (8, 8)
    assert (bits["f1"], bits["w5"]) == (8, 8)
    assert (bits["r1"], bits["w2"], bits["output"]) == (4, 4, 4)


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        (("name:n_q0.bits=4",), (4, 8, 8)),
        (("activation.bits=4", "name:n_q0.bits=8"), (8, 8, 8)),
        (("weight.bits=4", "activation.bits=4", "name:n_q0.bits=2"), (2, 4, 4)),
        (("name:n_[qkv]0.bits=4",), (4, 4, 4)),  # the Add that reads it too has no weight
    ],
)
def test_shared_edge_takes_the_higher_precision(overrides, bits):
    """Three MatMul and an Add read the input."""
    plan = plan_of(attention(), "onnxruntime-cpu", *overrides)

    assert {e.node for e in point(plan, "input").consumers} == {"n_q0", "n_k0", "n_v0", "n_a"}
    assert tuple(point(plan, t).spec.bits for t in ("wq", "wk", "input")) == bits


def test_relu_output_is_unsigned_by_plan_and_the_rest_by_range():
    plan = plan_of(convnet(), "sophgo-bm1684x")

    assert point(plan, "r2").spec.signedness == "unsigned"
    assert point(plan, "c3").spec.signedness == "from_range"


def test_per_axis_follows_the_op():
    plan = plan_of(convnet(), "onnxruntime-cpu")
    assert point(plan, "w1").spec.axis == 0
    assert point(plan, "w5").spec.axis == 0  # Gemm with transB

    plan = plan_of(attention(), "onnxruntime-cpu")
    assert point(plan, "wq").spec.axis == 1
    assert point(plan, "wo").spec.axis == 1

    plan = plan_of(convnet(), "onnxruntime-cpu", "weight.axis=none")
    assert {p.spec.axis for p in plan.grid_points()} == {None}


@pytest.mark.parametrize(
    ("node", "axis"),
    [
        ("MatMul(x, w)", 1),
        ("MatMul(w, x)", 0),
        ("Gemm(x, w)", 1),
        ("Gemm<transB = 1>(x, w)", 0),
        ("Gemm(w, x)", 0),
        ("Gemm<transA = 1>(w, x)", 1),
    ],
)
def test_axis_of_a_matrix_runs_along_the_output_channels(node, axis):
    """Ten times a column, or a row, of the weight is ten times a column or a row of the output."""
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[3,3] x) => (float[3,3] y)
    <float[3,3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}> {{ y = {node} }}"""
    network = onnx.parser.parse_model(text)
    x, w = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    outputs = []
    for factor in (1, 10):
        scaled = w.copy()
        scaled[(slice(None), 1) if axis else 1] *= factor
        network.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(scaled, "w"))
        outputs.append(ReferenceEvaluator(network).run(None, {"x": x})[0])
    moved = ~np.isclose(*outputs)

    assert point(plan_of(network, "onnxruntime-cpu"), "w").spec.axis == axis
    assert moved.sum() == 3  # one channel of the output, and nothing else


def test_bias_is_derived_from_input_and_weight():
    plan = plan_of(attention(), "sophgo-bm1684x")

    assert point(plan, "bq").derived_from == ("input", "wq")
    assert point(plan, "bq").consumers == (Edge("n_q", 1),)


def test_concat_shares_one_group_and_maxpool_passes_it_on():
    plan = plan_of(convnet(), "sophgo-bm1684x")

    assert {point(plan, t).group for t in ("r3", "p1", "c4", "k1")} == {"r3"}


@pytest.mark.parametrize(
    ("second", "axis"), [("MatMul(a, w)", 1), ("Gemm(a, w)", 1), ("Gemm<transB = 1>(a, w)", None)]
)
def test_a_shared_weight_is_per_axis_where_its_readers_agree_on_the_axis(second, axis):
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[N,2] x) => (float[N,2] y)
    <float[2,2] w = {{1, 2, 3, 4}}> {{ a = MatMul(x, w) y = {second} }}"""
    weight = point(plan_of(onnx.parser.parse_model(text), "onnxruntime-cpu"), "w")

    assert weight.spec.axis == axis
    assert len(weight.consumers) == 2
    assert ("different axes" in weight.reason) == (axis is None)


@pytest.mark.parametrize("tensor", ["r3", "c4"])
def test_a_group_keeps_the_widest_of_the_smallest_ranges(tensor):
    plan = plan_of(convnet(), "sophgo-bm1684x", f"tensor:{tensor}.min_range=0.5")

    assert {point(plan, t).spec.min_range for t in ("r3", "p1", "c4", "k1")} == {0.5}
    assert point(plan, "r1").spec.min_range < 1e-6


def test_keep_float_by_override():
    plan = plan_of(convnet(), "sophgo-bm1684x", "op:Gemm.quantize=false")

    assert "w5" not in {p.tensor for p in plan.points}
    assert any(s.node == "n_output" and "op:Gemm.quantize=false" in s.reason for s in plan.skips)


def test_all_that_moves_values_to_a_reader_of_floats_stays_float():
    """onnxruntime sees through as many as there are."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,4,4,4] x) => (float[1,4,8,8] y)
    <float[4] s = {1, 1, 2, 2}, int64[4] shape = {1, 4, 4, 4}> {
        r = LeakyRelu(x) p = MaxPool<kernel_shape = [1, 1]>(r) t = Transpose<perm = [0, 1, 3, 2]>(p)
        v = Reshape(t, shape) d = Resize<mode = "linear">(v, , s) y = LeakyRelu(d) }"""
    plan = plan_of(onnx.parser.parse_model(text), "onnxruntime-cpu")
    skipped = {s.op_type for s in plan.skips}

    assert {p.tensor for p in plan.points} == {"x", "d", "y"}
    assert {"MaxPool", "Transpose", "Reshape", "Resize"} <= skipped


def test_high_precision_output_stays_float():
    rule = msgspec.structs.replace(load_rule("sophgo-bm1684x"), graph_outputs="float")
    graph = prepare(from_proto(convnet())).graph
    plan = make_plan(graph, rule)

    assert "output" not in {p.tensor for p in plan.points}
    assert "w5" in {p.tensor for p in plan.points}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight.bits", "not of the form"),
        ("weights.bits=4", "unknown selector 'weights'"),
        ("weight.bit=4", "unknown key 'bit'"),
        ("weight.bits=99", "Widths are 2 to 8, and 16"),
        ("weight.bits=four", "Expected `int`"),
        ("op.bits=4", "unknown selector 'op'"),
        ("name:[.bits=4", "not a regular expression"),
        ("weight.quantize=true", "quantize=true applies to nodes"),
        ("op:Conv.quantize=maybe", "takes true or false"),
        ("bias.bits=16", "only override is bias.quantize=false"),
        ("between:a.bits=8", "between:TENSOR->TENSOR"),
        ("tensor:r1.observer=median", "Invalid enum value 'median'"),
        ("weight.observer=percentile", "observers for weights are mse, minmax, auto"),
    ],
)
def test_wrong_override_says_so(text, message):
    with pytest.raises(RuleError, match=message):
        parse_override(text)


def test_an_observer_by_override_is_in_the_plan_and_in_its_lines():
    overrides = ("activation.observer=percentile", "tensor:r1.observer=kl-tensorrt")
    plan = plan_of(convnet(), "sophgo-bm1684x", *overrides, "tensor:r1.range_factor=0.9")
    chosen = {p.tensor: p.spec.observer for p in plan.grid_points()}

    assert chosen["r1"] == "kl-tensorrt"
    assert chosen["w1"] is None
    assert {chosen[t] for t in chosen if t != "r1" and not t.startswith("w")} == {"percentile"}
    line = next(line for line in plan.lines() if line.startswith("r1 "))
    assert " observer=kl-tensorrt range_factor=0.9 " in line


def test_a_weight_by_its_name_takes_no_observer_of_batches():
    with pytest.raises(RuleError, match="observers for weights are mse, minmax, auto"):
        plan_of(convnet(), "sophgo-bm1684x", "tensor:w1.observer=average")


def test_a_range_factor_is_above_zero():
    with pytest.raises(RuleError, match=r"range_factor = 0\.0\. Give a number above 0"):
        plan_of(convnet(), "sophgo-bm1684x", "activation.range_factor=0")


def test_a_group_is_calibrated_as_its_first_member_says():
    """The tensor that the group is named after may say nothing."""
    plan = plan_of(convnet(), "sophgo-bm1684x", "tensor:c4.observer=mse")
    group = next(p.group for p in plan.points if p.tensor == "c4")
    members = [p for p in plan.points if p.group == group]

    assert len(members) > 1
    assert {p.spec.observer for p in members} == {"mse"}


@pytest.mark.parametrize("selector", ["op:Cnov", "name:n_c9", "tensor:w9"])
def test_override_that_covers_nothing_names_the_nearest(selector):
    with pytest.raises(RuleError, match=r"matches nothing in this model\. Nearest: \w+"):
        plan_of(convnet(), "sophgo-bm1684x", f"{selector}.bits=4")


def test_nothing_to_quantize_is_an_error():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,2] x) => (float[N,2] y) {y = Sin(x)}'
    with pytest.raises(PlanError, match="quantizes nothing"):
        plan_of(onnx.parser.parse_model(text), "sophgo-bm1684x")


def test_stored_plan_that_is_broken_says_so():
    with pytest.raises(PlanError, match="cannot be read"):
        QuantPlan.from_json('{"rule": 3}')
