"""Masks of attention, however they are computed, are neither quantized nor trained."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.evaluation.run import model_session
from onnxqat.model import Model, from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import HardwareRule, OpRule, RuleSpec
from onnxqat.train.form import training_form
from tests.oracles import sqnr_db

LENGTH, WIDTH = 6, 8
# What computes `m` of `s`, and writes `a`, which Softmax reads; the type of the input `mask`.
MASKS = {
    "1 - m times the smallest float": (
        "int64[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) c = Cast<to=1>(u) d = Sub(one, c) m = Mul(d, lowest) "
        "a = Add(s, m)"
    ),
    "behind a division": (
        "int64[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) c = Cast<to=1>(u) d = Sub(one, c) m = Mul(d, tenk) "
        "b = Add(s, m) a = Div(b, root)"
    ),
    "m - 1 times a large number": (
        "int64[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) c = Cast<to=1>(u) d = Sub(c, one) m = Mul(d, large) "
        "a = Add(s, m)"
    ),
    "minus a large number": (
        "int64[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) c = Cast<to=1>(u) d = Sub(one, c) m = Mul(d, large) "
        "t = Mul(s, c) a = Sub(t, m)"
    ),
    "Where of constants": (
        "bool[N,6] mask; u = Unsqueeze(mask, one_axis) m = Where(u, zero, infinite) a = Add(s, m)"
    ),
    "Where of scores": (
        "bool[N,6] mask; u = Unsqueeze(mask, one_axis) m = Not(u) a = Where(m, infinite, s)"
    ),
    "Cast of truth values": (
        "bool[N,6] mask; "
        "c = Cast<to=1>(mask) d = Sub(one, c) g = Mul(d, tenk) m = Unsqueeze(g, one_axis) "
        "a = Add(s, m)"
    ),
    "Expand and a second mask": (
        "int64[N,6] mask; "
        "c = Cast<to=1>(mask) u = Unsqueeze(c, one_axis) n = Shape(s) x = Expand(u, n) "
        "d = Sub(one, x) t = Cast<to=9>(d) m = Where(t, lowest, d) b = Add(s, m) "
        "o = ConstantOfShape<value = float[1] {-10000}>(n) q = Trilu<upper = 1>(o, one_int) "
        "f = Add(b, q) a = Max(f, lowest)"
    ),
    "a float input of 0 and 1": (
        "float[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) d = Sub(one, u) m = Mul(d, tenk) a = Add(s, m)"
    ),
    "a float input that is added": "float[N,1,6] mask; a = Add(s, mask)",
    "a float input that is moved and added": (
        "float[N,6] mask; u = Unsqueeze(mask, one_axis) n = Shape(s) m = Expand(u, n) a = Add(m, s)"
    ),
    "a float input that is compared": (
        "float[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) t = Less(u, one) c = Cast<to=1>(t) m = Mul(c, lowest) "
        "a = Add(s, m)"
    ),
    "the product of a column and a row": (
        "int64[N,6] mask; "
        "c = Cast<to=1>(mask) u = Unsqueeze(c, one_axis) v2 = Unsqueeze(c, two_axis) "
        "x = MatMul(v2, u) d = Sub(one, x) m = Mul(d, tenk) a = Add(s, m)"
    ),
    "the padding of ids": (
        "int64[N,6] mask; "
        "t = Equal(mask, zero_int) u = Unsqueeze(t, one_axis) c = Cast<to=1>(u) "
        "m = Mul(c, lowest) a = Add(s, m)"
    ),
    "compared positions": (
        "int64[N,6] mask; "
        "n = Shape<start = 1, end = 2>(mask) l = Squeeze(n) r = Range(zero_int, l, one_int) "
        "p1 = Unsqueeze(r, zero_axis) p2 = Unsqueeze(r, one_axis) t = LessOrEqual(p1, p2) "
        "m = Where(t, zero, infinite) b = Add(s, m) u = Unsqueeze(mask, one_axis) "
        "c = Cast<to=1>(u) d = Sub(one, c) m2 = Mul(d, tenk) a = Add(b, m2)"
    ),
    "a slice of a constant": (
        "int64[N,6] mask; "
        "n = Shape<start = 1, end = 2>(mask) k2 = Slice(causal, zero_axis, n, one_axis) "
        "b = Add(s, k2) u = Unsqueeze(mask, one_axis) c = Cast<to=1>(u) d = Sub(one, c) "
        "m = Mul(d, tenk) a = Add(b, m)"
    ),
    "masks that are added to each other": (
        "float[N,6] mask; "
        "u = Unsqueeze(mask, one_axis) d = Sub(one, u) g = Mul(d, tenk) m = Add(causal, g) "
        "a = Add(s, m)"
    ),
    "the logarithm of a float input": (
        "float[N,6] mask; u = Unsqueeze(mask, one_axis) m = Log(u) a = Add(s, m)"
    ),
    "8-bit integers": (
        "uint8[N,6] mask; "
        "c = Cast<to=1>(mask) u = Unsqueeze(c, one_axis) d = Sub(one, u) m = Mul(d, tenk) "
        "a = Add(s, m)"
    ),
}
MULTIPLIED = "minus a large number"  # scores times the mask, which are data
ADDED = {"a float input that is added", "a float input that is moved and added"}
OPS = (
    *("Add", "Sub", "Mul", "Div", "Where", "Max", "MatMul", "Softmax", "Transpose", "Unsqueeze"),
    *("Cast", "Expand", "Slice", "Gather", "Range", "ConstantOfShape", "Trilu", "Log", "Squeeze"),
    *("ReduceMean",),
)


def network(kind: str) -> Model:
    """One head of attention over ids of 20 words, and its mean."""
    declared, _, body = MASKS[kind].partition(";")
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (int64[N,6] ids, {declared}) => (float[N,8] y)
        <float one = {{1}}, float zero = {{0}}, float lowest = {{-3.4028234e38}},
         float large = {{1e30}}, float tenk = {{-10000}}, float root = {{2}},
         int64 zero_int = {{0}}, int64 one_int = {{1}},
         int64[1] zero_axis = {{0}}, int64[1] one_axis = {{1}}, int64[1] two_axis = {{2}}>
        {{ e = Gather(emb, ids) q0 = MatMul(e, wq) k0 = MatMul(e, wk) v = MatMul(e, wv)
           kt = Transpose<perm = [0, 2, 1]>(k0) s = MatMul(q0, kt) {body}
           p = Softmax(a) w = MatMul(p, v) y = ReduceMean<keepdims = 0>(w, one_axis) }}"""
    )
    rng = np.random.default_rng(0)
    shapes = {"emb": (20, WIDTH), **dict.fromkeys(("wq", "wk", "wv"), (WIDTH, WIDTH))}
    arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    arrays["causal"] = np.triu(np.full((LENGTH, LENGTH), -1e9, np.float32), 1)
    arrays["infinite"] = np.float32(-np.inf)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return prepare(from_proto(model), opset=21)


def feeds(model: Model, kind: str, *, padded: bool) -> dict[str, np.ndarray]:
    """Return 32 samples: all words count, or the last three of half of the samples do not."""
    rng = np.random.default_rng(1)
    keep = np.ones((32, LENGTH))
    keep[::2, 3:] = not padded
    mask = next(t for t in model.graph.inputs if t.name == "mask")
    values = (1 - keep) * -1e4 if kind in ADDED else keep
    values = values.reshape([32, *mask.shape[1:]]).astype(mask.dtype)
    return {"ids": rng.integers(1, 20, (32, LENGTH)), "mask": values}


def quantizing(*ops: str) -> HardwareRule:
    """Return a rule that quantizes everything around some ops, at 16 bits."""
    op = OpRule(inputs="a", outputs="a", weight="a")
    specs = {"a": RuleSpec(bits=16), "activation": RuleSpec(bits=16)}
    return HardwareRule(
        name="test", vendor="v", summary="s", sources=("s",), weight_bits=(16,),
        activation_bits=(16,), specs=specs, ops=dict.fromkeys(ops, op),
    )  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_mask_is_neither_quantized_nor_lost(kind):
    model = network(kind)
    names = [parse_override("name:.*.quantize=true")]
    plan = make_plan(model.graph, quantizing(*OPS), names)
    points = {p.tensor for p in plan.points}
    empty = insert_pairs(model, plan, placeholder_params(model, plan), state="uncalibrated")
    quantized = calibrate(empty, [feeds(model, kind, padded=False)], observer="minmax")
    padded = feeds(model, kind, padded=True)
    expected = model_session(model, "float").run(None, padded)[0]
    found = model_session(quantized, "qdq").run(None, padded)[0]

    scores = {"emb", "e", "wq", "q0", "wk", "k0", "wv", "v", "kt", "s", "p", "w", "y"}
    scores |= {"t", "c"} if kind == MULTIPLIED else set()

    assert points - {"emb"} == scores - {"emb"}
    assert sqnr_db(expected, found) > 20
    assert set(training_form(quantized).weights) <= {"emb", "wq", "wk", "wv"}


def plan_of(body: str, *overrides: str):
    """Plan for two float inputs and a constant, everything quantized."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[N,6] x, float[N,6] z)
        => (float[N,6] y)
        <float[6] k = {{0, -64, 3, 1, 1, 1}}, float[6] pixel = {{{", ".join(["-128"] * 6)}}},
         float[6,6] w = {{{", ".join(["1"] * 36)}}}> {{ {body} }}"""
    )
    graph = prepare(from_proto(model), opset=21).graph
    return make_plan(graph, quantizing(*OPS), [parse_override(o) for o in overrides])


@pytest.mark.parametrize(
    ("body", "points"),
    [
        ("s = MatMul(x, w) a = Add(s, x) y = Softmax(a)", "x w s a y"),
        ("s = MatMul(x, w) a = Add(s, k) y = Softmax(a)", "x w s k a y"),
        ("a = Sub(x, pixel) s = MatMul(a, w) y = Softmax(s)", "x pixel a w s y"),
        ("s = MatMul(x, w) y = Add(s, z)", "x w s z y"),
        ("s = MatMul(x, w) t = MatMul(z, w) a = Add(s, t) y = Softmax(a)", "x w s z t a y"),
    ],
)
def test_what_is_no_mask_is_quantized(body, points):
    assert {p.tensor for p in plan_of(body).points} == set(points.split())


@pytest.mark.parametrize(
    ("body", "values", "masks"),
    [
        ("a = Add(s, k)", "0, -49", False),  # exp(-50) of a score is nothing
        ("a = Add(s, k)", "0, -50", True),
        ("a = Add(s, k)", "-50, -50", False),  # a shift
        ("a = Sub(s, k)", "0, 49", False),
        ("a = Sub(s, k)", "0, 50", True),
        ("a = Sub(k, s)", "0, 9999", False),
        ("a = Sub(k, s)", "0, 10000", True),
        ("a = Max(s, k)", "-9999, -9999", False),  # no weight or factor is as large as 1e4
        ("a = Max(s, k)", "-10000, -10000", True),
        ("a = Max(s, k)", "0, -10000", False),
    ],
)
def test_where_a_constant_becomes_a_mask(body, values, masks):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[N,2] x) => (float[N,2] y)
        <float[2] k = {{{values}}}, float[2,2] w = {{1, 2, 3, 4}}>
        {{ s = MatMul(x, w) {body} y = Softmax(a) }}"""
    )
    plan = make_plan(prepare(from_proto(model), opset=21).graph, quantizing(*OPS))

    assert ("k" in {p.tensor for p in plan.points}) != masks
    assert any("mask" in s.reason for s in plan.skips) == masks


@pytest.mark.parametrize(("masked", "points"), [("-64", "x w s"), ("-49", "x w s k a v y")])
def test_a_weight_stays_float_where_a_mask_was_added_to_what_it_multiplies(masked, points):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[N,2] x) => (float[N,2] y)
        <float[2] k = {{0, {masked}}}, float[2,2] w = {{1, 2, 3, 4}}, float[2,2] v = {{1, 2, 3, 4}}>
        {{ s = MatMul(x, w) a = Add(s, k) y = MatMul(a, v) }}"""
    )
    plan = make_plan(prepare(from_proto(model), opset=21).graph, quantizing("Add", "MatMul"))

    assert {p.tensor for p in plan.points} - {"y"} == set(points.split()) - {"y"}


def test_mask_is_quantized_where_an_override_has_the_name_of_the_node():
    body = "s = MatMul(x, w) a = Add(s, z) y = Softmax(a)"
    node = next(s.node for s in plan_of(body).skips if s.op_type == "Add")

    assert "z" not in {p.tensor for p in plan_of(body, "name:.*.quantize=true").points}
    assert "z" in {p.tensor for p in plan_of(body, f"name:{node}.quantize=true").points}


@pytest.mark.parametrize("kind", ["float", "int64"])
def test_mask_of_attention_as_one_op_is_left_float(kind):
    cast = "k = Identity(mask)" if kind == "float" else "k = Cast<to = 1>(mask)"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (float[N,6,8] x, {kind}[N,1,6,6] mask) => (float[N,6,8] y)
        <float one = {{1}}, float low = {{-10000}}> {{
        {cast} d = Sub(one, k) m = Mul(d, low) z = MatMul(x, v)
        y = com.microsoft.Attention<num_heads = 2>(z, w, b, , , m) }}"""
    )
    arrays = {"w": (8, 24), "b": (24,), "v": (8, 8)}
    tensors = (onnx.numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in arrays.items())
    model.graph.initializer.extend(tensors)
    plan = make_plan(prepare(from_proto(model), opset=21).graph, quantizing(*OPS))

    assert {p.tensor for p in plan.points} == {"x", "v", "z"}


@pytest.mark.parametrize(
    "moved",
    [
        "Transpose<perm = [0, 1, 3, 2]>(a)",
        "DepthToSpace<blocksize = 2>(a)",
        "Expand(a, sizes)",
        "Tile(a, sizes)",
        "Slice(a, starts, ends)",
        "Split<axis = 1, num_outputs = 1>(a)",
        "Gather<axis = 1>(a, starts)",
    ],
)
def test_what_moves_a_sum_with_no_data_stays_float_like_the_sum(moved):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[1,4,2,2] x, int64[1,4,2,2] ids) => (float[n,c,h,k] y)
        <float[4,4,1,1] w = {{{", ".join(["0.5"] * 16)}}},
         int64[4] sizes = {{1, 1, 1, 1}}, int64[1] starts = {{0}}, int64[1] ends = {{1}}>
        {{ c = Conv(x, w) p = Cast<to = 1>(ids) a = Add(c, p) t = {moved} y = Tanh(t) }}"""
    )
    skips = make_plan(prepare(from_proto(model)).graph, quantizing("Conv", "Tanh")).skips
    reasons = {skip.op_type: skip.reason for skip in skips}

    assert reasons["Add"] == "adds 'p', which is not computed from data"
    assert reasons[moved.partition("<")[0].partition("(")[0]] == (
        "moves 'a', to which a mask was added"
    )
