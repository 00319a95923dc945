"""Patterns, masks, exceptions and sharing: what a rule can say, on graphs in ONNX's text form."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import RuleError
from onnxqat.model import from_proto
from onnxqat.operators import PATTERN_NAMES
from onnxqat.overrides import parse_override, read_overrides
from onnxqat.plan import make_plan
from onnxqat.plan.graph import GraphIndex
from onnxqat.plan.patterns import PATTERNS
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import HardwareRule, OpRule, RuleException, RuleSpec, load_rule
from onnxqat.rules.schema import Changes
from tests import networks
from tests.networks import convnet


def graph_of(body: str, *, constants: str = "", shape: str = "N,4,6", outputs: str = "y"):
    declared = ", ".join(f"float[{shape}] {name}" for name in outputs.split())
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{shape}] x) => ({declared}) '
        f"<{constants}> {{{body}}}"
    )
    return prepare(from_proto(onnx.parser.parse_model(text))).graph


def rule_of(**changes) -> HardwareRule:
    op = OpRule(inputs="a", outputs="a", weight="w")
    fields = {
        "name": "test",
        "vendor": "nobody",
        "summary": "for tests",
        "sources": ("none",),
        "weight_bits": (8,),
        "activation_bits": (8,),
        "specs": {"a": RuleSpec(), "w": RuleSpec(axis="channel"), "b": RuleSpec(bits=4)},
        "ops": {"Conv": op, "MatMul": op, "Add": op, "Mul": op, "Relu": op},
    }
    return HardwareRule(**fields | changes)


SCALARS = (
    f"float one = {{1}}, float half = {{0.5}}, float three = {{3}}, float six = {{6}}, "
    f"float zero = {{0}}, float root = {{{math.sqrt(2)}}}, float two = {{2}}, "
    "float eps = {1e-5}, float[6] gamma = {1,2,3,4,5,6}, float[6] beta = {1,2,3,4,5,6}, "
    f"float c1 = {{0.044715}}, float c2 = {{{math.sqrt(2 / math.pi)}}}"
)
WRITTEN = {
    "SiLU": "s = Sigmoid(x) y = Mul(x, s)",
    "HardSwish": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
    "HardSwish by HardSigmoid": "s = HardSigmoid<alpha=0.1666667>(x) y = Mul(s, x)",
    "Mish": "s = Softplus(x) t = Tanh(s) y = Mul(x, t)",
    "Gelu": "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)",
    "Gelu, half first": (
        "h = Mul(x, half) d = Div(x, root) e = Erf(d) a = Add(e, one) y = Mul(h, a)"
    ),
    "Gelu by tanh": (
        "p = Pow(x, three) k = Mul(p, c1) s = Add(x, k) m = Mul(s, c2) t = Tanh(m) "
        "a = Add(t, one) n = Mul(x, a) y = Mul(n, half)"
    ),
    "LayerNormalization": (
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Pow(d, two) v = ReduceMean<axes=[-1]>(q) "
        "e = Add(v, eps) r = Sqrt(e) n = Div(d, r) g = Mul(n, gamma) y = Add(g, beta)"
    ),
    "RMSNormalization": (
        "q = Pow(x, two) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) r = Sqrt(e) "
        "i = Reciprocal(r) n = Mul(x, i) y = Mul(gamma, n)"
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_pattern_is_one_unit(name):
    graph = graph_of(WRITTEN[name], constants=SCALARS)
    index = GraphIndex(graph, list(PATTERNS))

    kind = name.split()[0].rstrip(",")
    assert [unit.kind for unit in index.units] == [kind]
    assert {tensor.name for _, _, tensor in index.units[0].inputs()} >= {"x"}


def test_pattern_whose_inside_is_read_elsewhere_is_none():
    graph = graph_of("s = Sigmoid(x) m = Mul(x, s) y = Add(m, s)")

    assert [u.kind for u in GraphIndex(graph, list(PATTERNS)).units] == ["Sigmoid", "Mul", "Add"]


def test_pattern_with_another_constant_is_none():
    graph = graph_of(
        "a = Add(x, three) c = Clip(a, zero, two) m = Mul(x, c) y = Div(m, six)", constants=SCALARS
    )

    assert len(GraphIndex(graph, list(PATTERNS)).units) == 4


def test_rules_name_the_patterns_there_are():
    assert tuple(PATTERNS) == PATTERN_NAMES


CONV = "float[4,4,1] w = {" + ",".join(str(i / 8 - 1) for i in range(16)) + "}"


def test_convolution_with_silu_has_one_output_point():
    graph = graph_of("c = Conv(x, w) s = Sigmoid(c) y = Mul(c, s)", constants=CONV)
    plan = make_plan(graph, rule_of(fuse=(("Conv", "SiLU"),)))

    assert [p.tensor for p in plan.points] == ["x", "w", "y"]
    assert [len(chain) for chain in plan.chains] == [3]
    assert not plan.skips


def test_pattern_a_rule_leaves_float_is_left_whole():
    graph = graph_of("c = Conv(x, w) s = Sigmoid(c) y = Mul(c, s)", constants=CONV)
    plan = make_plan(graph, rule_of(kept_float={"SiLU": "has no table"}))

    assert [p.tensor for p in plan.points] == ["x", "w", "c"]
    assert {s.reason for s in plan.skips} == {"part of SiLU: has no table"}
    assert len(plan.skips) == 2


def test_pattern_a_rule_splits_is_quantized_node_by_node():
    graph = graph_of("c = Conv(x, w) s = Sigmoid(c) y = Mul(c, s)", constants=CONV)
    rule = rule_of(split=("SiLU",))
    rule.ops["Sigmoid"] = OpRule(inputs="a", outputs="a")

    assert [p.tensor for p in make_plan(graph, rule).points] == ["x", "w", "c", "s", "y"]


def test_a_skip_connection_is_fused_and_its_other_side_quantized():
    graph = graph_of("c = Conv(x, w) a = Add(c, x) y = Relu(a)", constants=CONV)
    plan = make_plan(graph, rule_of(fuse=(("Conv", "Add", "Relu"),)))

    assert [p.tensor for p in plan.points] == ["x", "w", "y"]
    assert plan.points[0].consumers[1].index == 1


def test_residual_side_alone():
    graph = graph_of("c = Conv(x, w) a = Add(c, x) b = Add(a, x) y = Relu(b)", constants=CONV)
    ops = {
        "Conv": OpRule(inputs="a", weight="w"),
        "Add": OpRule(inputs="a", reads="residual"),
    }
    points = make_plan(graph, rule_of(ops=ops, bias="float")).points

    readers = {(p.tensor, e.node, e.index) for p in points for e in p.consumers}
    first, second = [n.name for n in graph.nodes if n.op == "Add"]
    assert ("x", first, 1) in readers
    assert not any(node == second for _, node, _ in readers)


def test_neither_side_of_two_convolutions_is_a_residual():
    graph = graph_of("c = Conv(x, w) d = Conv(x, w) y = Add(c, d)", constants=CONV)
    ops = {
        "Conv": OpRule(inputs="a", weight="w"),
        "Add": OpRule(inputs="a", reads="residual"),
    }
    plan = make_plan(graph, rule_of(ops=ops, bias="float"))

    assert [p.tensor for p in plan.points] == ["x", "w"]


@pytest.mark.parametrize(
    ("body", "outputs", "chains", "points"),
    [
        ("c = Conv(x, w) y = Relu(c)", "y", 1, "x w y"),
        ("c = Conv(x, w) r = Relu(c) y = Add(r, c)", "y", 0, "x w c r y"),
        ("c = Conv(x, w) r = Relu(c) y = Add(c, r)", "y", 0, "x w c r y"),
        ("c = Conv(x, w) y = Relu(c)", "y c", 0, "x w c y"),
    ],
)
def test_what_others_read_too_is_not_inside_of_a_chain(body, outputs, chains, points):
    """Another node, or the user, who reads an output."""
    graph = graph_of(body, constants=CONV, outputs=outputs)
    plan = make_plan(graph, rule_of(fuse=(("Conv", "Relu"),)))

    assert len(plan.chains) == chains
    assert {p.tensor for p in plan.points} == set(points.split())


MASKED = {
    "a mask computed from indices": (
        "s = MatMul(x, w) n = Shape(x) f = Cast<to=1>(n) m = ReduceMean<keepdims=0>(f) "
        "a = Add(s, m) y = Softmax(a)"
    ),
    "a constant mask": "s = MatMul(x, w) a = Add(s, mask) y = Softmax(a)",
    "a mask that is moved": (
        "s = MatMul(x, w) a = Add(s, mask) t = Transpose<perm=[0,1,2]>(a) y = Softmax(t)"
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_mask_is_left_float(name):
    weight = "float[6,6] w = {" + ",".join(str(i / 8 - 1) for i in range(36)) + "}"
    graph = graph_of(MASKED[name], constants=f"{weight}, float[6] mask = {{0,0,0,-1e9,-1e9,-1e9}}")
    op = OpRule(inputs="a", outputs="a", weight="w")
    rule = rule_of(ops=dict.fromkeys(("MatMul", "Add", "Softmax", "Transpose"), op))
    plan = make_plan(graph, rule)

    assert [p.tensor for p in plan.points] == ["x", "w", "s", "y"]
    assert all(
        "mask" in s.reason or s.op_type in ("Shape", "Cast", "ReduceMean") for s in plan.skips
    )


def test_ordinary_constant_is_no_mask():
    graph = graph_of(
        "c = Conv(x, w) y = Add(c, b)", constants=f"{CONV}, float[6] b = {{0,-70,3,1,1,1}}"
    )

    assert "b" in {p.tensor for p in make_plan(graph, rule_of()).points}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"depthwise": True}, ["c2"]),
        ({"depthwise": False}, ["c1", "c3", "c4"]),
        ({"kernel": (1, 1)}, ["c3"]),
        ({"kernel_above": 1}, ["c1", "c2", "c4"]),
        ({"group_above": 1}, ["c2"]),
        ({"dilation_above": 1}, []),
        ({"channels_above": 5}, ["c1", "c2", "c3"]),
        ({"position": "first"}, ["c1"]),
        ({"position": "last"}, []),
        ({"attributes": {"strides": (1, 1), "group": 1}}, ["c1", "c3", "c4"]),
        ({"kernel": (3, 3), "depthwise": False}, ["c1", "c4"]),
    ],
)
def test_exception_holds_where_its_conditions_do(condition, holds):
    graph = prepare(from_proto(convnet())).graph
    exception = RuleException(op=("Conv",), unsupported="for the test", **condition)
    plan = make_plan(graph, rule_of(exceptions=(exception,)))

    assert [s.node for s in plan.skips if s.unsupported] == [f"n_{name}" for name in holds]


@pytest.mark.parametrize(
    ("node", "shape", "holds"),
    [
        ("Conv<group = 4>(x, w)", (4, 1, 1), True),
        ("Conv<group = 4>(x, w)", (8, 1, 1), True),  # two filters for each channel
        ("Conv<group = 2>(x, w)", (4, 2, 1), False),
        ("ConvTranspose<group = 4>(x, w)", (4, 1, 1), True),
        ("ConvTranspose<group = 4>(x, w)", (4, 2, 1), True),
        ("ConvTranspose<group = 2>(x, w)", (4, 1, 1), False),
        ("ConvTranspose(x, w)", (4, 1, 1), False),
    ],
)
def test_depthwise_is_one_input_channel_in_each_of_several_groups(node, shape, holds):
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4,6] x) => (float[N,p,6] y, float[N,4,6] z) {{ y = {node} z = Relu(x) }}"""
    model, weight = onnx.parser.parse_model(text), np.ones(shape, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    exception = RuleException(op=("Conv", "ConvTranspose"), unsupported="no", depthwise=True)
    ops = dict.fromkeys(("Conv", "ConvTranspose", "Relu"), OpRule(outputs="a"))
    plan = make_plan(prepare(from_proto(model)).graph, rule_of(exceptions=(exception,), ops=ops))

    assert any(s.unsupported for s in plan.skips) == holds


def test_exception_changes_specs_and_the_first_one_decides():
    graph = prepare(from_proto(convnet())).graph
    exceptions = (
        RuleException(op=("Conv",), depthwise=True, changes=Changes(weight="b")),
        RuleException(op=("Conv",), changes=Changes(weight="none")),
    )
    plan = make_plan(graph, rule_of(exceptions=exceptions))
    weights = {p.tensor: p.spec.bits for p in plan.points if p.role == "weight"}

    assert weights["w2"] == 4
    assert not {"w1", "w3", "w4"} & weights.keys()


def test_exception_for_an_attribute_the_op_does_not_have():
    graph = prepare(from_proto(convnet())).graph
    exception = RuleException(op=("Conv",), attributes={"stride": (1, 1)}, unsupported="no")
    with pytest.raises(RuleError, match="Conv has no attribute 'stride'"):
        make_plan(graph, rule_of(exceptions=(exception,)))


def test_inputs_alone_share_and_the_output_has_its_own():
    graph = graph_of("a = Relu(x) b = Relu(x) y = Add(a, b)")
    op = OpRule(inputs="a", outputs="a", parameters="unify_inputs")
    plan = make_plan(graph, rule_of(ops={"Add": op}))

    assert [(p.tensor, p.group) for p in plan.points] == [("a", "a"), ("b", "a"), ("y", None)]


@pytest.mark.parametrize(
    ("parameters", "groups", "observed"),
    [
        ("own", [None, None, None], [True, True, True]),
        ("unify_inputs", ["a", "a", None], [True, True, True]),
        ("unify", ["a", "a", "a"], [True, True, True]),
        ("from_output", ["a", "a", "a"], [False, False, True]),
        ("passthrough", ["a", None, "a"], [True, True, True]),
    ],
)
@pytest.mark.parametrize("middle", ["y = Relu(s)", "t = Add(s, c) y = Relu(t)"])
def test_unit_shares_with_what_leaves_its_chain(parameters, groups, observed, middle):
    body = f"a = Sigmoid(x) b = Sigmoid(x) s = Sub(a, b) {middle}"
    op = OpRule(inputs="a", outputs="a", parameters=parameters)
    ops = {"Sub": op, "Add": OpRule(), "Relu": OpRule()}
    fuse = (("Sub", "BiasAdd", "Relu"), ("Sub", "Relu"))
    graph = graph_of(body, constants="float[6] c = {1,2,3,4,5,6}")
    plan = make_plan(graph, rule_of(ops=ops, fuse=fuse, bias="float"))

    assert [(p.tensor, p.group) for p in plan.points] == list(zip("aby", groups, strict=True))
    assert [p.observed for p in plan.points] == observed


def test_inputs_take_the_range_of_the_output():
    graph = graph_of("y = Min(x, limit)", constants="float limit = {0.5}")
    op = OpRule(inputs="a", outputs="a", parameters="from_output")
    plan = make_plan(graph, rule_of(ops={"Min": op}))
    model = prepare(
        from_proto(
            onnx.parser.parse_model(
                '<ir_version: 8, opset_import: ["": 17]> g (float[N,4,6] x) => (float[N,4,6] y) '
                "<float limit = {0.5}> {y = Min(x, limit)}"
            )
        )
    )
    empty = insert_pairs(model, plan, placeholder_params(model, plan), state="uncalibrated")
    x = np.zeros((1, 4, 6), np.float32)
    x[0, 0, :2] = -0.25, 100
    measured = calibrate(empty, [{"x": x}], observer="minmax")

    assert [p.observed for p in plan.points] == [False, True]
    assert float(measured.params["x"].scale) == np.float32(0.5) / np.float32(127)
    assert measured.floats.to_proto().SerializeToString(
        deterministic=True
    ) == model.to_proto().SerializeToString(deterministic=True)


def test_forced_range_is_passed_on_and_kept_out_of_other_groups():
    body = "a = Sigmoid(x) b, c = Split<axis=1>(a, sizes) d = Relu(b) y = Concat<axis=1>(d, c)"
    graph = graph_of(body, constants="int64[2] sizes = {2, 2}")
    plan = make_plan(graph, load_rule("sophgo-bm1684x"))
    found = {p.tensor: (p.group, p.spec.fixed_range) for p in plan.points}

    assert {found[name] for name in "abc"} == {("a", (0.0, 1.0))}
    assert found["y"] == (None, None)


@pytest.mark.parametrize("first", ["a = Add(x, k) r = Tanh(x)", "r = Tanh(x) a = Add(x, k)"])
@pytest.mark.parametrize(
    ("values", "scale"),
    [("-5.12, 2", 5.12 / 128), ("-5.12, 6.35", 6.35 / 127), ("10.2, 0", 10.2 / 255)],
)
def test_a_sum_holds_its_constant_and_so_does_what_is_joined_with_it(first, values, scale):
    """In int8, or uint8 where nothing is negative, whatever calibration sees."""
    body = f"{first} y = Concat<axis=1>(a, r)"
    graph = graph_of(body, constants=f"float[2] k = {{{values}}}", shape="N,2")
    plan = make_plan(graph, load_rule("sophgo-bm1684x"))
    smallest = {p.tensor: p.spec.min_scale for p in plan.points}

    assert {n: pytest.approx(scale, rel=1e-6) for n in "ary"} == {n: smallest[n] for n in "ary"}
    assert smallest["x"] == 0


def test_float_parameters_of_a_reader_have_no_point():
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[1,2,4,4] x, float[2] s) '
        "=> (float[1,2,8,8] y) <float[2] ones = {1, 1}> "
        "{t = Concat<axis=0>(ones, s) r = Relu(x) y = Resize(r, , t)}"
    )
    graph = prepare(from_proto(onnx.parser.parse_model(text))).graph
    op = OpRule(inputs="a", outputs="a")
    rule = rule_of(ops=dict.fromkeys(("Concat", "Relu", "Resize"), op))
    readers = {(p.tensor, e.index) for p in make_plan(graph, rule).points for e in p.consumers}

    assert ("r", 0) in readers
    assert ("t", 2) not in readers


def test_calibration_without_a_computed_activation():
    """Only the input and a weight are quantized, so that nothing is fetched."""
    floats, plan = networks.planned(convnet(), "ncnn", ("activation.quantize=false",))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    x = networks.samples(convnet(), 4)

    assert calibrate(empty, [{"input": x}]).state == "calibrated"


def planned(*overrides: str):
    graph = prepare(from_proto(convnet())).graph
    return make_plan(graph, load_rule("sophgo-bm1684x"), [parse_override(o) for o in overrides])


def test_nodes_between_two_tensors():
    plan = planned("between:r1->r3.quantize=false")

    assert [s.node for s in plan.skips] == ["n_c2", "n_r2", "n_c3", "n_a1", "n_r3"]


@pytest.mark.parametrize(
    ("selector", "message"),
    [("r9->r3", r"Nearest: r3"), ("r3->r1", "no path leads from r3 to r1")],
)
def test_no_nodes_between_two_tensors(selector, message):
    with pytest.raises(RuleError, match=message):
        planned(f"between:{selector}.quantize=false")


def test_later_inclusion_wins_over_exclusion():
    plan = planned("op:Conv.quantize=false", "name:n_c3.quantize=true")

    assert [s.node for s in plan.skips if s.op_type == "Conv"] == ["n_c1", "n_c2", "n_c4"]
    assert "w3" in {p.tensor for p in plan.points}


def test_inclusion_of_what_the_rule_leaves_float():
    graph = graph_of("c = Conv(x, w) y = Erf(c)", constants=CONV)
    included = [parse_override("op:Erf.quantize=true")]

    assert make_plan(graph, load_rule("tensorrt"), included).points[-1].reason == "written by Erf"
    with pytest.raises(RuleError, match="neither lists Erf nor has a spec 'activation'"):
        make_plan(graph, rule_of(), included)


def test_spec_of_the_rule_by_name():
    plan = planned("tensor:c3.spec=unit")
    point = next(p for p in plan.points if p.tensor == "c3")

    assert (point.spec.signedness, point.spec.fixed_range) == ("unsigned", (0.0, 1.0))
    with pytest.raises(RuleError, match=r"has no spec 'units'\. It has conv_weight"):
        planned("tensor:c3.spec=units")


def test_biases_left_float():
    assert not [p for p in planned("bias.quantize=false").points if p.role == "bias"]


def test_override_that_no_grid_can_do():
    with pytest.raises(RuleError, match="power_of_two needs symmetric"):
        make_plan(
            prepare(from_proto(convnet())).graph,
            load_rule("onnxruntime-cpu"),
            [parse_override("activation.power_of_two=true")],
        )


def test_overrides_from_a_file_are_those_of_the_command_line(tmp_path):
    path = tmp_path / "o.toml"
    path.write_text('[weight]\nbits = 4\n["name:n_c.*"]\nquantize = false\n[last]\nbits = 8\n')
    texts = ("weight.bits=4", "name:n_c.*.quantize=false", "last.bits=8")

    assert read_overrides(path) == [parse_override(t) for t in texts]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight = 4", r"'weight' is not a table. Write \[\"weight\"\]"),
        ("[weights]\nbits = 4", "unknown selector 'weights'"),
        ("[weight]\nbits = [4]", "Expected `int`"),
        ("[weight", "not valid TOML"),
        (f"x = {'[' * 5000}{']' * 5000}", "is nested too deeply"),
    ],
)
def test_wrong_overrides_file_says_so(tmp_path, text, message):
    path = tmp_path / "o.toml"
    path.write_text(text)
    with pytest.raises(RuleError, match=message):
        read_overrides(path)


def test_missing_overrides_file():
    with pytest.raises(RuleError, match="no such file"):
        read_overrides("missing.toml")
