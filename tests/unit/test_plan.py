from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest

from onnxqat.errors import PlanError, RuleError
from onnxqat.model import from_proto, to_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import Edge, QuantPlan, make_plan
from onnxqat.prepare import prepare
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
    before = to_proto(model).SerializeToString(deterministic=True)
    make_plan(model.graph, load_rule("onnxruntime-cpu"))

    assert to_proto(model).SerializeToString(deterministic=True) == before


def test_first_and_last_cover_weights_and_input_activations_only():
    plan = plan_of(convnet(), "sophgo-bm1684x", *W4A4)
    bits = {p.tensor: p.spec.bits for p in plan.grid_points()}

    assert (bits["input"], bits["w1"]) == (8, 8)
    assert (bits["f1"], bits["w5"]) == (8, 8)
    assert (bits["r1"], bits["w2"], bits["output"]) == (4, 4, 4)


def test_shared_edge_takes_the_higher_precision():
    plan = plan_of(convnet(), "sophgo-bm1684x", "activation.bits=8", "name:n_c2.bits=4")

    assert point(plan, "w2").spec.bits == 4
    assert point(plan, "r1").spec.bits == 4  # read by n_c2 and by the Add, which has no weight


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


def test_bias_is_derived_from_input_and_weight():
    plan = plan_of(attention(), "sophgo-bm1684x")

    assert point(plan, "bq").derived_from == ("input", "wq")
    assert point(plan, "bq").consumers == (Edge("n_q", 1),)


def test_concat_shares_one_group_and_maxpool_passes_it_on():
    plan = plan_of(convnet(), "sophgo-bm1684x")

    assert {point(plan, t).group for t in ("r3", "p1", "c4", "k1")} == {"r3"}


def test_keep_float_by_override():
    plan = plan_of(convnet(), "sophgo-bm1684x", "op:Gemm.quantize=false")

    assert "w5" not in {p.tensor for p in plan.points}
    assert any(s.node == "n_output" and "op:Gemm.quantize=false" in s.reason for s in plan.skips)


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
        ("weight.quantize=true", "quantize=true is for nodes"),
        ("op:Conv.quantize=maybe", "takes true or false"),
        ("bias.bits=16", "bias.quantize=false only"),
        ("between:a.bits=8", "between:TENSOR->TENSOR"),
    ],
)
def test_wrong_override_says_so(text, message):
    with pytest.raises(RuleError, match=message):
        parse_override(text)


@pytest.mark.parametrize("selector", ["op:Cnov", "name:n_c9", "tensor:w9"])
def test_override_that_covers_nothing_names_the_nearest(selector):
    with pytest.raises(RuleError, match=r"covers nothing in this model\. Nearest: \w+"):
        plan_of(convnet(), "sophgo-bm1684x", f"{selector}.bits=4")


def test_nothing_to_quantize_is_an_error():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,2] x) => (float[N,2] y) {y = Sin(x)}'
    with pytest.raises(PlanError, match="quantizes nothing"):
        plan_of(onnx.parser.parse_model(text), "sophgo-bm1684x")


def test_stored_plan_that_is_broken_says_so():
    with pytest.raises(PlanError, match="cannot be read"):
        QuantPlan.from_json('{"rule": 3}')
