"""Gradients against numpy's formula and against finite differences in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from onnxqat.qparams import QuantSpec, choose_qparams, quantize, quantized_range
from onnxqat.quantized import insert_pairs
from onnxqat.train.engine import StepSession
from onnxqat.train.fake_quantize import FakeQuantize
from onnxqat.train.form import training_form
from onnxqat.train.losses import LABELS, read_loss, teacher_input
from tests.fake_quantizers import SPECS, one_op, values_with_ties_and_ends, variant_of
from tests.networks import attention, convnet, quantized, samples, upsampling
from tests.oracles import run_ort

WIDE_SPECS = {
    "int16": QuantSpec(bits=16),
    "uint16": QuantSpec(bits=16, signedness="unsigned"),
    "asymmetric": QuantSpec(bits=16, signedness="unsigned", symmetric=False),
    "per-axis 0": QuantSpec(bits=16, axis=0),
    "per-axis 1 asymmetric": QuantSpec(bits=16, axis=1, signedness="unsigned", symmetric=False),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("learns_x", [True, False], ids=["x", "data"])
@pytest.mark.parametrize("rank_is_known", [True, False])
def test_fake_quantize_gradient_is_the_formula(spec, learns_x, rank_is_known):
    channels = () if spec.axis is None else ((4, 6, 5)[spec.axis],)
    high = np.linspace(0.5, 1.5, int(np.prod(channels)), dtype=np.float32).reshape(channels)
    low = np.zeros_like(high) if spec.signedness == "unsigned" and spec.symmetric else -high
    params = choose_qparams(low, high, spec)
    x = values_with_ties_and_ends(spec, params)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    qmin, qmax = quantized_range(spec, signed=params.signed)
    rank = x.ndim if rank_is_known or spec.axis is not None else None
    result = one_op(variant_of(spec, params, rank, learns_x=learns_x), x, params, upstream)

    def aligned(a):
        return (
            a if spec.axis is None else np.expand_dims(a, [i for i in range(3) if i != spec.axis])
        )

    s, z = aligned(params.scale), aligned(params.zero_point).astype(np.float32)
    position = np.rint(x / s) + z
    inside = (qmin <= position) & (position <= qmax)
    # exactly half a level past an end either answer will do: the mask calls it inside
    ends = np.minimum(abs(x / s + z - (qmax + 0.5)), abs(x / s + z - (qmin - 0.5)))
    tie = ends < 2**-13
    assert tie.sum() <= 3
    inside |= tie
    q = quantize(x, params, spec).astype(np.float64)
    terms = upstream * np.where(inside, q - z - x.astype(np.float64) / s, q - z)
    axes = None if spec.axis is None else tuple(i for i in range(3) if i != spec.axis)

    if learns_x:
        np.testing.assert_array_equal(result["x_grad"], upstream * inside)
    assert result["s_grad"].shape == channels
    # float32 sums of terms that reach q: each is right to 2^-22 of its parts
    bound = 2.0**-22 * (np.abs(upstream) * (np.abs(q - z) + np.abs(x / s))).sum(axes)
    assert (np.abs(result["s_grad"] - terms.sum(axes)) <= bound).all()


@pytest.mark.parametrize("method", ["lsq", "lsq+", "ste"])
@pytest.mark.parametrize("ceiling", [np.inf, 0.5, 1.5, 6.0])
@pytest.mark.parametrize("spec", ["int8", "uint8", "asymmetric", "uint4"])
def test_a_mask_shared_with_a_relu_or_clip_is_the_formula_of_both(spec, ceiling, method):
    spec = SPECS[spec]
    params = choose_qparams(np.float32(0), np.float32(1), spec)
    u = np.random.default_rng(0).normal(size=(4, 6, 50)).astype(np.float32)
    x = np.clip(u, 0, ceiling).astype(np.float32)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    variant = variant_of(spec, params, 3, method=method).sharing_mask(ceiling)
    result = one_op(variant, x, params, upstream)
    qmin, qmax = quantized_range(spec, signed=params.signed)
    z = float(params.zero_point)
    inside = np.rint(x / params.scale) + z <= qmax
    q = np.clip(np.rint(x / params.scale) + z, qmin, qmax)
    terms = upstream * np.where(inside, q - z - x.astype(np.float64) / params.scale, q - z)

    assert variant.ceiling == ceiling
    np.testing.assert_array_equal(result["x_grad"], upstream * (inside & (u > 0) & (u < ceiling)))
    if method != "ste":
        assert abs(result["s_grad"] - terms.sum()) <= 1e-6 * np.abs(terms).sum()


@pytest.mark.parametrize("rule", ["sophgo-bm1684x", "onnxruntime-cpu"])
@pytest.mark.parametrize("activation", ["Relu(a)", "Clip(a, zero, six)", "Clip(a, zero, half)"])
def test_a_shared_mask_changes_no_gradient(rule, activation, monkeypatch):
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] input) => (float[N,4] output)
    <float[4,4] w = {{1,0,0,2, 0,-1,0,0, 0,3,1,0, 3,0,0,1}}, float[4,4] v = {{1,0,0,2, 0,1,0,0,
     0,0,-1,0, 3,0,0,1}}, float zero = {{0}}, float six = {{6}}, float half = {{0.5}}> {{
        a = MatMul(input, w)
        b = {activation}
        output = MatMul(b, v)
    }}"""
    network = onnx.parser.parse_model(text)
    _, qdq = quantized(network, rule)
    x = 3 * samples(network, 16)
    found = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(FakeQuantize, "sharing_mask", lambda self, _: self)
        form = training_form(qdq)
        assert any("below" in node.op_type for node in form.proto.graph.node) == shares
        session = StepSession(form, read_loss("mse"), batch_size=16, threads=1)
        session.run({"input": x, teacher_input("output"): np.ones((16, 4), np.float32)})
        found.append(session.gradients.views)
    assert np.any(found[0]["w"])
    for name, gradient in found[0].items():
        np.testing.assert_allclose(gradient, found[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_mask_is_not_shared_where_something_else_reads_the_relu():
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] input) => (float[N,4] output)
    <float[4,4] w = {1,0,0,2, 0,-1,0,0, 0,3,1,0, 3,0,0,1}> {
        a = MatMul(input, w)
        b = Relu(a)
        c = MatMul(b, w)
        [float] d = Exp(b)
        output = Add(c, d)
    }"""
    floats, qdq = quantized(onnx.parser.parse_model(text), "onnxruntime-cpu")
    points = [
        replace(p, consumers=tuple(e for e in p.consumers if e.node != "float"))
        for p in qdq.plan.points
    ]
    plan = replace(qdq.plan, points=tuple(points))
    form = training_form(insert_pairs(floats, plan, qdq.params, state="calibrated"))
    (exp,) = (node for node in form.proto.graph.node if node.op_type == "Exp")

    assert exp.input[0] == "b"
    assert not any("below" in node.op_type for node in form.proto.graph.node)


@pytest.mark.parametrize("rank", [2, None])
def test_gradient_of_a_scale_survives_large_sums_that_cancel(rank):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 50_000)).astype(np.float32)
    params = choose_qparams(np.float32(-2), np.float32(2), SPECS["int8"])
    variant = variant_of(SPECS["int8"], params, rank)
    result = one_op(variant, x, params, x)  # sum(dy * y) and sum(dL/dx * x) are sums of squares

    level = np.rint(x / params.scale).astype(np.float64)  # the float32 quotient decides ties
    q, position = np.clip(level, -128, 127), x / np.float64(params.scale)
    terms = x * (q - np.where(q == level, position, 0.0))
    assert abs(result["s_grad"] - terms.sum()) <= 1e-6 * np.abs(terms).sum()


@pytest.mark.parametrize("spec", WIDE_SPECS.values(), ids=WIDE_SPECS)
def test_mask_of_16_bits_is_exact_at_ties_and_range_ends(spec):
    channels = () if spec.axis is None else ((4, 6, 5)[spec.axis],)
    high = np.linspace(0.5, 1.5, int(np.prod(channels)), dtype=np.float32).reshape(channels)
    low = np.zeros_like(high) if spec.signedness == "unsigned" and spec.symmetric else -high
    params = choose_qparams(low, high, spec)
    qmin, qmax = quantized_range(spec, signed=params.signed)
    shape = [1, 1, 1]
    if spec.axis is not None:
        shape[spec.axis] = -1
    s, z = params.scale.reshape(shape), params.zero_point.astype(np.float32).reshape(shape)
    # levels around both ends, half a level and one float32 to each side of it
    ends = np.float32([qmin - 1, qmin, qmax, qmax + 1, (qmin + qmax) // 2])
    offsets = np.float32([0, 0.5, -0.5, 0.5 + 2**-8, 0.5 - 2**-8, -0.5 + 2**-8])
    x = ((ends + offsets[:, None])[None] - z).repeat(4, axis=0)[:4, :6] * s
    x = np.broadcast_to(x, (4, 6, 5)).astype(np.float32)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    result = one_op(variant_of(spec, params, x.ndim), x, params, upstream, opset=21)
    position = np.rint(x / s) + z
    inside = (qmin <= position) & (position <= qmax)
    q = np.clip(position, qmin, qmax).astype(np.float64)
    terms = upstream * np.where(inside, q - z - x.astype(np.float64) / s, q - z)
    axes = None if spec.axis is None else tuple(i for i in range(3) if i != spec.axis)
    bound = 2.0**-22 * (np.abs(upstream) * (np.abs(q - z) + np.abs(x / s))).sum(axes)

    assert 20 < inside.sum() < 100
    np.testing.assert_array_equal(result["x_grad"], upstream * inside)
    assert (np.abs(result["s_grad"] - terms.sum(axes)) <= bound).all()


class Surrogate:
    """The network with every rounding error held constant, in float64.

    Around the current parameters LSQ treats fake-quantize as ``y = inside * x + s * c`` with the
    constant ``c = q - z - x / s`` inside the range and ``q - z`` outside; finite differences of
    that network are the gradient that training should compute.
    """

    def __init__(self, qdq, x):
        self.values = {}
        proto = qdq.to_proto()
        params = qdq.params
        points = qdq.plan.grid_points()
        observed = self._observe(proto, [p.tensor for p in points], x)
        for tensor in proto.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32:
                self.values[tensor.name] = array.astype(np.float64)
        nodes, skipped = [], {}
        for point in points:
            entry = params[point.parameters]
            target = next(
                n.output[0]
                for n in proto.graph.node
                if n.name == f"{point.tensor}/DequantizeLinear"
            )
            source = next(
                n.input[0] for n in proto.graph.node if n.name == f"{point.tensor}/QuantizeLinear"
            )
            skipped[f"{point.tensor}/QuantizeLinear"] = self._pair(
                point, entry, observed[point.tensor], source, target
            )
        for node in proto.graph.node:
            if node.name in skipped:
                nodes += skipped[node.name]
            elif not node.name.endswith(("/Clip", "/DequantizeLinear")):
                nodes.append(node)
        self.constants = {}
        integers = [
            t for t in proto.graph.initializer
            if numpy_helper.to_array(t).dtype == np.int64
        ]  # fmt: skip
        inputs = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in self.values]
        inputs.append(helper.make_tensor_value_info("input", TensorProto.DOUBLE, None))
        outputs = [helper.make_tensor_value_info("output", TensorProto.DOUBLE, None)]
        graph = helper.make_graph(nodes, "surrogate", inputs, outputs, integers)
        opset = helper.make_opsetid("", proto.opset_import[0].version)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        self.run_model = onnx.reference.ReferenceEvaluator(model)
        self.x = x.astype(np.float64)

    @staticmethod
    def _observe(proto, tensors, x):
        watched = onnx.ModelProto()
        watched.CopyFrom(proto)
        sources = {
            n.name.removesuffix("/QuantizeLinear"): n.input[0]
            for n in proto.graph.node
            if n.op_type == "QuantizeLinear"
        }
        weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        fetched = [s for t in tensors if (s := sources[t]) not in weights and s != "input"]
        del watched.graph.output[:]
        for name in fetched:
            watched.graph.output.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            )
        found = dict(zip(fetched, run_ort(watched, {"input": x}), strict=True))
        found |= weights | {"input": x}
        return {t: found[sources[t]] for t in tensors}

    def _pair(self, point, entry, value, source, target):
        spec = point.spec
        qmin, qmax = quantized_range(spec, signed=entry.signed)
        shape = [1] * value.ndim
        if spec.axis is not None:
            shape[spec.axis] = -1
        s = entry.scale.reshape(shape if spec.axis is not None else ())
        z = entry.zero_point.astype(np.float64).reshape(s.shape)
        position = np.rint(value / s) + z
        inside = ((qmin <= position) & (position <= qmax)).astype(np.float64)
        q = np.clip(position, qmin, qmax)
        residual = q - z - inside * (value.astype(np.float64) / s)
        name = point.tensor
        self.values[f"{name}/inside"], self.values[f"{name}/residual"] = inside, residual
        scale = f"{point.parameters}/scale"
        nodes = []
        if spec.axis is not None:
            axes = [i for i in range(value.ndim) if i != spec.axis]
            constant = numpy_helper.from_array(np.array(axes, np.int64))
            nodes = [
                helper.make_node("Constant", [], [f"{name}/axes"], value=constant),
                helper.make_node("Unsqueeze", [scale, f"{name}/axes"], [f"{name}/s"]),
            ]
            scale = f"{name}/s"
        return [
            *nodes,
            helper.make_node("Mul", [source, f"{name}/inside"], [f"{name}/kept"]),
            helper.make_node("Mul", [scale, f"{name}/residual"], [f"{name}/error"]),
            helper.make_node("Add", [f"{name}/kept", f"{name}/error"], [target]),
        ]

    def output(self, **changed):
        feeds = self.values | changed | {"input": self.x}
        return self.run_model.run(None, feeds)[0]


def log_softmax(scores):
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def loss_of(scores, labels, teacher):
    log_q, log_p = log_softmax(scores), log_softmax(teacher.astype(np.float64))
    cross_entropy = -log_q[np.arange(len(labels)), labels].mean()
    return cross_entropy + (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()


@pytest.mark.parametrize("rule", ["sophgo-bm1684x", "onnxruntime-cpu"])
@pytest.mark.parametrize(
    "network",
    [lambda: convnet(kinks=False), attention, upsampling],
    ids=["convnet", "attention", "upsampling"],
)
def test_gradient_of_every_parameter_matches_finite_differences(network, rule):
    network = network()
    _, qdq = quantized(network, rule)
    rng = np.random.default_rng(3)
    x = samples(network, 4, seed=5)
    form = training_form(qdq)
    session = StepSession(form, read_loss("cross-entropy+kl"), batch_size=4, threads=1)
    surrogate = Surrogate(qdq, x)
    scores = surrogate.output()
    labels = rng.integers(scores.shape[1], size=4)
    teacher = rng.normal(size=scores.shape).astype(np.float32)
    loss = session.run({"input": x, LABELS: labels, teacher_input("output"): teacher})

    assert loss == pytest.approx(loss_of(scores, labels, teacher), rel=1e-5)
    assert session.gradients.views.keys() == form.learned
    for name, gradient in session.gradients.views.items():
        value = surrogate.values[name]
        move = 1e-6 * np.maximum(abs(value), 1e-3) * rng.choice([-1, 1], value.shape)
        ends = [
            loss_of(surrogate.output(**{name: value + sign * move}), labels, teacher)
            for sign in (1, -1)
        ]
        found = gradient.astype(np.float64) * move
        # float32 against float64; a key's bias has gradient 0, its float32 sum has not quite
        largest = max(np.abs(gradient).max(), 0.1 * np.abs(session.gradients.buffer).max())
        bound = 5e-4 * np.abs(found).sum() + 1e-4 * largest * np.linalg.norm(move)
        assert found.sum() == pytest.approx((ends[0] - ends[1]) / 2, rel=0, abs=bound), name


def test_a_scale_that_only_a_comparison_reads_has_no_gradient():
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] input) => (float[N,4] output)
    <float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1},
     float[4] c = {1,2,3,4}, float zero = {0}> {
        a = MatMul(input, w)
        b = Add(a, c)
        below = Less(b, zero)
        tenth = Mul(a, c)
        output = Where(below, tenth, a)
    }"""
    network = onnx.parser.parse_model(text)
    _, qdq = quantized(network)
    form = training_form(qdq)
    session = StepSession(form, read_loss("mse"), batch_size=4, threads=1)
    x = samples(network, 4)
    session.run({"input": x, teacher_input("output"): np.zeros((4, 4), np.float32)})

    assert "b/scale" in form.parameters
    assert "b/scale" not in session.gradients.views
    assert np.abs(session.gradients.views["w"]).max() > 0
