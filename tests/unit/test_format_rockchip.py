"""The Q/DQ model for Rockchip: no tensor has zero points that are all 0, and no value changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxqat.deploy import write_deployment
from onnxqat.errors import FormatError, RuleError
from onnxqat.formats import EXPORTS
from onnxqat.qparams import QuantParams, choose_qparams
from onnxqat.quantized import insert_pairs
from onnxqat.rules import bundled_rules, load_rule
from tests.networks import _Graph, attention, convnet, quantized, samples
from tests.oracles import run_ort

RULES = [name for name in bundled_rules() if load_rule(name).table == "rockchip"]


def arrays_of(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def weights_of(proto):
    """Return integers, scale, zero_point and axis of each weight that is stored as integers."""
    arrays = arrays_of(proto)
    return {
        node.input[0]: (
            *(arrays[name] for name in node.input[:3]),
            next((a.i for a in node.attribute if a.name == "axis"), None),
        )
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays
    }


def dequantized(integers, scale, zero_point, axis):
    shape = [1] * integers.ndim
    if scale.ndim:
        shape[axis] = -1
    levels = integers.astype(np.int64) - zero_point.reshape(shape)
    return levels.astype(np.float32) * scale.reshape(shape)


@pytest.fixture(scope="module", params=[convnet, attention], ids=["convnet", "attention"])
def network(request):
    net = request.param()
    return net, quantized(net, "rockchip-rk3588")[1]


def test_no_zero_points_are_all_at_the_center(network):
    proto = EXPORTS["rockchip"](network[1]).to_proto()
    onnx.checker.check_model(proto, full_check=True)
    arrays = arrays_of(proto)
    read = {n.input[2] for n in proto.graph.node if "uantizeLinear" in n.op_type}
    found = [arrays[name] for name in read if arrays[name].dtype == np.int8]

    assert len(found) > 8
    assert all(z.any() for z in found)


def test_each_weight_keeps_its_values_and_differs_in_one_channel(network):
    plain = weights_of(EXPORTS["onnxruntime"](network[1]).to_proto())
    moved = weights_of(EXPORTS["rockchip"](network[1]).to_proto())

    assert plain.keys() == moved.keys()
    for name, before in plain.items():
        after = moved[name]
        np.testing.assert_array_equal(dequantized(*after), dequantized(*before))
        if before[0].dtype == np.int32:  # a bias
            np.testing.assert_array_equal(after[2], before[2])
        elif not before[2].any():
            assert sorted(np.ravel(after[2])) == [-1] + [0] * (before[2].size - 1)


def test_the_model_computes_the_same(network):
    net, qdq = network
    x = {"input": samples(net, 16, seed=3)}
    plain, moved = (EXPORTS[name](qdq).to_proto() for name in ("onnxruntime", "rockchip"))

    np.testing.assert_array_equal(run_ort(moved, x)[0], run_ort(plain, x)[0])


def test_the_reference_evaluator_computes_the_same():
    net = convnet(opset=21)  # the first whose QuantizeLinear it knows
    _, qdq = quantized(net, "rockchip-rk3588")
    x = {"input": samples(net, 4, seed=3)}
    plain, moved = (EXPORTS[name](qdq).to_proto() for name in ("onnxruntime", "rockchip"))
    expected, actual = (ReferenceEvaluator(proto).run(None, x)[0] for proto in (plain, moved))

    np.testing.assert_array_equal(actual, expected)


def two_rows(*rows):
    """Return the exported integers and zero_points of a Gemm whose weight has these integers."""
    g = _Graph(0)
    g.node("Gemm", ["input", g.constant("w", np.float32(rows))], "output", transB=1)
    floats, model = quantized(
        g.model(["N", len(rows[0])], ["N", len(rows)]),
        "rockchip-rk3588",
        ("weight.narrow_range=false",),
    )
    ones = QuantParams(
        scale=np.ones(len(rows), np.float32), zero_point=np.zeros(len(rows), np.int8)
    )
    params = {name: ones if name == "w" else p for name, p in model.params.items()}
    again = insert_pairs(floats, model.plan, params, state="calibrated")
    ((integers, _, zero_point, _),) = weights_of(EXPORTS["rockchip"](again).to_proto()).values()
    return integers.tolist(), zero_point.tolist()


def test_the_first_channel_with_a_free_level_is_moved():
    assert two_rows([-127, 3], [1, 127]) == ([[-128, 2], [1, 127]], [-1, 0])
    assert two_rows([-128, 127], [1, 127]) == ([[-128, 127], [0, 126]], [0, -1])
    assert two_rows([-128, 3], [-128, 127]) == ([[-127, 4], [-128, 127]], [1, 0])
    with pytest.raises(FormatError, match="'w' uses all 256 levels in every channel"):
        two_rows([-128, 127], [127, -128])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("activation.bits=16",), "'input' has 16 bits"),
        (("activation.bits=4",), "'input' has 4 bits"),
        (("activation.narrow_range=true",), "'input' needs a Clip"),
    ],
)
def test_what_the_loader_cannot_read_is_refused(overrides, message):
    net = convnet(opset=21)
    _, qdq = quantized(net, "rockchip-rk3588", overrides)
    with pytest.raises(FormatError, match=message):
        EXPORTS["rockchip"](qdq)


@pytest.mark.parametrize(("dtype", "center"), [(np.int8, 0), (np.uint8, 128)])
def test_an_activation_at_the_center_is_refused(dtype, center):
    kind = "signed" if dtype == np.int8 else "unsigned"
    floats, model = quantized(
        convnet(),
        "rockchip-rk3588",
        (f"activation.signedness={kind}", "activation.off_center=false"),
    )
    moved = QuantParams(scale=model.params["c4"].scale, zero_point=np.asarray(center, dtype))
    params = {**model.params, "c4": moved}
    with pytest.raises(FormatError, match=f"'c4' has a zero_point of {center}, the center"):
        EXPORTS["rockchip"](insert_pairs(floats, model.plan, params, state="calibrated"))


def test_scales_too_far_apart_are_refused():
    floats, model = quantized(convnet(), "rockchip-rk3588")
    for ratio, allowed in ((2**14, True), (2**14 + 1, False)):
        scale = np.ones_like(model.params["w1"].scale)
        scale[0] = 1 / ratio
        own = QuantParams(scale=scale, zero_point=model.params["w1"].zero_point)
        again = insert_pairs(floats, model.plan, {**model.params, "w1": own}, state="calibrated")
        if allowed:
            EXPORTS["rockchip"](again)
            continue
        with pytest.raises(FormatError, match="'w1' has scales more than 16384 times apart"):
            EXPORTS["rockchip"](again)


@pytest.mark.parametrize("rule", RULES)
def test_a_dead_channel_gets_the_scale_that_the_loader_would_give_it(rule):
    specs = load_rule(rule).specs
    ends = np.float32([0, 1e-9, 1])
    params = choose_qparams(-ends, ends, specs["weight"].resolve(0))

    assert params.scale.tolist() == [params.scale[2] / 2**14] * 2 + [params.scale[2]]


def test_symmetric_activations_are_refused_by_the_rule():
    with pytest.raises(RuleError, match="off_center needs symmetric = false"):
        quantized(convnet(), "rockchip-rk3588", ("activation.symmetric=true",))


@pytest.mark.parametrize("rule", RULES)
def test_strip_writes_the_export(rule, tmp_path):
    _, qdq = quantized(convnet(), rule)
    path = write_deployment(qdq, tmp_path).files["table"]
    expected = EXPORTS["rockchip"](qdq).to_proto().SerializeToString(deterministic=True)

    assert path.read_bytes() == expected


def test_attributes_that_the_toolkit_needs_are_written():
    g = _Graph(0)
    g.node("HardSigmoid", ["input"], "h")
    ln = [g.constant("gamma", np.ones(4, np.float32)), g.constant("beta", np.zeros(4, np.float32))]
    g.node("LayerNormalization", ["h", *ln], "l")
    g.node("Gemm", ["l", g.weight("w", 4, 3)], "output")
    net = g.model(["N", 4], ["N", 3])
    _, qdq = quantized(net, "rockchip-rk3588")
    proto = EXPORTS["rockchip"](qdq).to_proto()
    x = {"input": samples(net, 8, seed=3)}
    found = {
        (n.op_type, a.name): round(a.f, 9)
        for n in proto.graph.node
        for a in n.attribute
        if a.type == onnx.AttributeProto.FLOAT
    }

    assert found[("HardSigmoid", "alpha")] == pytest.approx(0.2)
    assert found[("HardSigmoid", "beta")] == 0.5
    assert found[("LayerNormalization", "epsilon")] == pytest.approx(1e-5)
    np.testing.assert_array_equal(
        run_ort(proto, x)[0], run_ort(EXPORTS["onnxruntime"](qdq).to_proto(), x)[0]
    )


def test_spec_of_the_rule_keeps_zero_points_off_the_center():
    specs = load_rule("rockchip-rk3588").specs
    asymmetric = [s for s in specs.values() if not s.symmetric]

    assert asymmetric
    assert all(s.off_center for s in asymmetric)
    assert all(s.signedness == "signed" for s in asymmetric)
