from __future__ import annotations

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import numpy_helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import TrainingError
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from onnxqat.runtime import open_session
from onnxqat.train.engine import StepSession, forward_session
from onnxqat.train.form import training_form, untrainable_nodes
from onnxqat.train.losses import add_loss, read_loss, teacher_input
from onnxqat.train.lowering import fixed_shapes
from tests.networks import RULES, W4A4, attention, convnet, quantized, samples, upsampling


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overrides", [(), W4A4], ids=["w8a8", "w4a4"])
@pytest.mark.parametrize(
    "network",
    [convnet, attention, lambda: convnet(activation="LeakyRelu")],
    ids=["convnet", "attention", "leaky"],
)
def test_training_forward_equals_the_saved_file_bit_for_bit(network, rule, overrides, tmp_path):
    network = network()
    _, qdq = quantized(network, rule, overrides)
    qdq.save(tmp_path / "model.onnx")
    x = samples(network, 32, seed=7) * 2  # some values are clipped
    saved = load_model(tmp_path / "model.onnx").to_proto()
    expected = open_session(saved, optimization="none", threads=1).run(None, {"input": x})
    form = training_form(qdq)
    actual = forward_session(form, threads=1).run(None, {"input": x, **form.parameters})

    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_redundant_pairs_are_left_out_and_nothing_else():
    _, qdq = quantized(convnet())
    form = training_form(qdq)
    pairs = {n.name.split("/")[0] for n in form.proto.graph.node if n.domain == "onnxqat"}

    # behind MaxPool, Concat and Flatten the values lie on the grid already
    assert not pairs & {"p1", "k1", "f1"}
    assert {"input", "r1", "r2", "r3", "c3", "c4", "v1", "v2", "output"} <= pairs


def test_a_pair_behind_what_keeps_a_grid_is_left_out():
    _, qdq = quantized(upsampling())
    form = training_form(qdq)
    pairs = {n.name.split("/")[0] for n in form.proto.graph.node if n.domain == "onnxqat"}

    assert {p.tensor: p.group for p in qdq.plan.grid_points()}["e1"] == "m1"
    assert not pairs & {"k1", "e1"}  # behind a Concat, and a Pad by reflection
    assert {"m1", "t1", "z1"} <= pairs  # of the same group; z1 is behind a linear Resize


def test_weights_biases_and_scales_are_parameters():
    form = training_form(quantized(convnet())[1])

    assert {"w1", "b1", "w5", "b5"} <= form.weights.keys()
    assert {"input/scale", "w1/scale", "r3/scale"} <= form.parameters.keys()


UNTRAINABLE = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,4] x) => (float[N,4] y)
<float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1}> {
    [before] h = Hardmax(x)
    a = MatMul(h, w)
    [pick] b = Hardmax(a)
    c = Relu(b)
    [again] y = Hardmax(c)
}"""


def test_every_op_without_gradient_is_named():
    floats, qdq = quantized_text(UNTRAINABLE)
    reason = "onnxqat has no gradient for it"
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))

    assert untrainable_nodes(floats, plan) == [
        ("pick", "Hardmax", reason),
        ("again", "Hardmax", reason),
    ]
    with pytest.raises(TrainingError, match=r"2 nodes: 'pick' \(Hardmax: .*'again' \(Hardmax: "):
        training_form(qdq)


def test_a_trainable_network_has_no_untrainable_nodes():
    floats, _ = quantized(convnet())

    assert untrainable_nodes(floats, make_plan(floats.graph, load_rule("sophgo-bm1684x"))) == []


def test_an_op_of_ours_behind_softmax_is_not_taken_for_fake_quantize():
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,4] y)
    <float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1}> {
        a = MatMul(x, w)
        p = Softmax(a)
        y = HardSigmoid(p)
    }"""
    _, qdq = quantized_text(text)
    form = training_form(qdq)
    with_loss = add_loss(form.proto, read_loss("kl"))

    assert any(node.op_type.startswith("HardSigmoid_") for node in with_loss.graph.node)
    assert not any(node.op_type == "Log" for node in with_loss.graph.node)


def widened(network, rule):
    """Return a Q/DQ model with activations of 16 bits, which no rule asks for yet."""
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule(rule))
    points = [
        replace(p, spec=replace(p.spec, bits=16)) if p.role == "activation" else p
        for p in plan.points
    ]
    plan = replace(plan, points=tuple(points))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [{"input": samples(network, 16)}], observer="minmax")


@pytest.mark.parametrize("rule", ["sophgo-bm1684x", "onnxruntime-cpu"])
def test_16_bits_of_opset_21_train_and_equal_the_file_bit_for_bit(rule):
    network = convnet(opset=21)
    qdq = widened(network, rule)
    x = samples(network, 4, seed=7) * 2
    expected = open_session(qdq.to_proto(), optimization="none", threads=1).run(None, {"input": x})
    form = training_form(qdq)
    actual = forward_session(form, threads=1).run(None, {"input": x, **form.parameters})
    session = StepSession(form, read_loss("mse"), batch_size=4, threads=1)
    session.run({"input": x, teacher_input("output"): np.zeros_like(expected[0])})

    assert any("int16" in node.op_type for node in form.proto.graph.node)
    np.testing.assert_array_equal(actual[0], expected[0])
    assert all(np.any(gradient) for gradient in session.gradients.views.values())


SAMPLED = """<ir_version: 8, opset_import: ["": 17]>
g (float[2,1,2,4] x) => (float[2,1,1,3] y)
<float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1}, float[1,3] v = {1,0.5,2},
 float[2,1,1,2] grid = {0,0.5,-0.5,0}> {
    [first] a = MatMul(x, w)
    [sample] h = GridSample(a, grid)
    [second] y = MatMul(h, v)
}"""


def test_sampling_at_positions_is_refused_with_its_reason():
    _, qdq = quantized_text(SAMPLED)
    message = r"'sample' \(GridSample: onnxqat has no .*--set 'name:REGEX.quantize=false'"
    with pytest.raises(TrainingError, match=message):
        training_form(qdq)


def test_what_stands_before_it_can_be_excluded_and_is_not_trained():
    _, qdq = quantized_text(SAMPLED, overrides=("name:first.quantize=false",))
    form = training_form(qdq)

    assert form.weights.keys() == {"v"}


SCALED = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,4] x) => (float[N,4] y)
<float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1}, float two = {2}> {
    a = MatMul(x, w)
    b = Mul(a, two)
    y = Pow(b, two)
}"""


def test_an_exponent_is_not_trained_although_a_product_reads_it_too():
    _, qdq = quantized_text(SCALED, "onnxruntime-cpu")
    form = training_form(qdq)

    assert form.weights.keys() == {"w"}


SHUFFLED = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,4,5,6] x) => (float[N,4,10,12] y)
<int64[1] first = {0}, int64[3] rest = {4,5,6}, int64[1] half = {2},
 int64[3] parts = {2,5,6}, float[4] scales = {1,1,2,2}> {
    a = Conv(x, w)
    s = Shape(a)
    n = Gather(s, first)
    split = Concat <axis = 0> (n, half, parts)
    b = Reshape(a, split)
    c = Transpose <perm = [0, 2, 1, 3, 4]> (b)
    whole = Concat <axis = 0> (n, rest)
    d = Reshape(c, whole)
    y = Resize <mode = "linear"> (d, , scales)
}"""


def test_shapes_that_a_free_batch_hides_are_found():
    network = onnx.parser.parse_model(SHUFFLED)
    values = np.arange(16, dtype=np.float32).reshape(4, 4, 1, 1)
    network.graph.initializer.append(numpy_helper.from_array(values, "w"))
    floats, qdq = quantized_text(network)
    form = training_form(qdq)

    assert fixed_shapes(floats)["d"] == [None, 4, 5, 6]
    assert any(node.op_type.startswith("Resize_") for node in form.proto.graph.node)


def test_lowered_ops_leave_the_forward_pass_as_it_was_bit_for_bit():
    network = upsampling()
    _, qdq = quantized(network, "sophgo-bm1684x")
    x = samples(network, 4, seed=7)
    expected = open_session(qdq.to_proto(), optimization="none", threads=1).run(None, {"input": x})
    form = training_form(qdq)
    actual = forward_session(form, threads=1).run(None, {"input": x, **form.parameters})

    np.testing.assert_array_equal(actual[0], expected[0])


def quantized_text(network, rule="sophgo-bm1684x", overrides=()):
    if isinstance(network, str):
        network = onnx.parser.parse_model(network)
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return floats, empty.with_params(placeholder_params(floats, plan), state="calibrated")
