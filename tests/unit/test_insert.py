from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import onnx
import pytest

from onnxqat.calibration import placeholder_params
from onnxqat.errors import ModelError, PlanError
from onnxqat.model import from_proto
from onnxqat.pairs import remove_pairs
from onnxqat.plan import make_plan, remove_requantizations
from onnxqat.preparation import prepare
from onnxqat.qparams import choose_qparams, fake_quantize
from onnxqat.quantized import insert_pairs, load_model, require_quantized
from onnxqat.rules import load_rule
from tests.contents import as_bytes
from tests.networks import RULES, W4A4, attention, convnet, planned, quantized, samples
from tests.oracles import run_ort

OVERRIDES = pytest.mark.parametrize("overrides", [(), W4A4], ids=["w8a8", "w4a4"])
NETWORKS = pytest.mark.parametrize("network", [convnet, attention], ids=["convnet", "attention"])
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


@EVERY_RULE
@OVERRIDES
@NETWORKS
def test_strip_undoes_insert_bit_for_bit(network, rule, overrides, tmp_path):
    floats, qdq = quantized(network(), rule, overrides)
    qdq.save(tmp_path / "model.qdq.onnx")

    loaded = load_model(tmp_path / "model.qdq.onnx").floats
    assert as_bytes(loaded) == as_bytes(qdq.floats)
    assert (as_bytes(loaded) == as_bytes(floats)) == (not qdq.plan.requantized())
    remove_requantizations(loaded.graph)
    assert as_bytes(loaded) == as_bytes(floats)


@EVERY_RULE
@OVERRIDES
@NETWORKS
def test_every_state_is_a_valid_model_that_runs(network, rule, overrides):
    network = network()
    floats, plan = planned(network, rule)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    _, calibrated = quantized(network, rule, overrides)
    for model in (empty, calibrated):
        proto = model.to_proto()
        onnx.checker.check_model(proto, full_check=True)
        del proto.metadata_props[:]  # the file is whole without our metadata
        outputs = run_ort(proto, {"input": samples(network, 4)})

        assert [o.name for o in proto.graph.output] == ["output"]
        assert np.isfinite(outputs[0]).all()


@pytest.mark.parametrize(
    ("rule", "overrides"),
    [("sophgo-bm1684x", ("activation.bits=4",)), ("qnn-htp-16", ()), ("esp32-s3", ())],
)
def test_qdq_arithmetic_is_that_of_the_parameters(rule, overrides):
    """The value behind the first activation pair, computed by numpy alone."""
    network = convnet()
    _, qdq = quantized(network, rule, overrides)
    point = next(p for p in qdq.plan.points if p.tensor == "r1")
    proto = qdq.to_proto()
    for name in ("r1", "r1/dequantized"):
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    _, before, after = run_ort(proto, {"input": samples(network, 4)})
    expected = fake_quantize(before, qdq.params["r1"], point.spec)

    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("narrow", ["true", "false"])
def test_both_ends_of_a_range_are_those_of_the_spec(bits, narrow):
    """[-127, 127] too, which is no dtype's own."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[9] x) => (float[9] y)
    { y = LeakyRelu(x) }"""
    wide = ("symmetric=true", "signedness=signed", f"narrow_range={narrow}", f"bits={bits}")
    overrides = tuple(f"activation.{field}" for field in wide)
    floats, plan = planned(onnx.parser.parse_model(text), "onnxruntime-cpu", overrides)
    spec = plan.points[0].spec
    params = dict.fromkeys("xy", choose_qparams(np.float32(-1), np.float32(1), spec))
    proto = insert_pairs(floats, plan, params, state="calibrated").to_proto()
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    read = next(n for n in proto.graph.node if n.op_type == "LeakyRelu").input[0]
    (found,) = run_ort(onnx.utils.Extractor(proto).extract_model(["x"], [read]), {"x": x})

    np.testing.assert_array_equal(found, fake_quantize(x, params["x"], spec))
    top = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(found[0], -1 if narrow == "true" else -(top + 1) / top, rtol=1e-6)


def test_16_bits_at_an_opset_without_them_are_an_error():
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("qnn-htp-16"))
    with pytest.raises(PlanError, match=r"opset 17 cannot write\. Prepare with opset=21"):
        insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")


def test_insert_changes_neither_model_nor_plan():
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    before = as_bytes(floats), plan.to_json()
    insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")

    assert (as_bytes(floats), plan.to_json()) == before


def test_parameters_read_back_bit_for_bit():
    _, qdq = quantized(convnet())
    params = qdq.params
    again = qdq.with_params(params, state="calibrated").params

    assert params.keys() == again.keys()
    assert all(params[name].same_as(again[name]) for name in params)


def test_group_shares_one_scale():
    _, qdq = quantized(convnet())
    scales = {
        n.inputs[1].name for n in qdq.qdq().graph.nodes if n.name.startswith(("r3/", "k1/", "c4/"))
    }

    assert "r3/scale" in scales
    assert not scales & {"k1/scale", "c4/scale"}


def test_shared_weight_has_one_pair():
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,4] y)
    <float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1}> {
        a = MatMul(x, w)
        y = MatMul(a, w)
    }"""
    floats = prepare(from_proto(onnx.parser.parse_model(text)))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    qdq = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    weights = [p for p in plan.points if p.role == "weight"]

    assert len(weights) == 1
    assert len(weights[0].consumers) == 2
    assert [n.name for n in qdq.qdq().graph.nodes].count("w/QuantizeLinear") == 1
    assert as_bytes(qdq.floats) == as_bytes(floats)


@pytest.mark.parametrize("outputs", ["quantized", "float"])
def test_an_output_that_a_node_reads_too_is_quantized_for_whom_the_plan_says(outputs):
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,2,3] x) => (float[N,2,3] y, float[N,2,3] z)
    <float[2,2,1] w = {1, 2, -3, 4}> { y = LeakyRelu(x) z = Conv(y, w) }"""
    floats = prepare(from_proto(onnx.parser.parse_model(text)))
    rule = msgspec.structs.replace(load_rule("onnxruntime-cpu"), graph_outputs=outputs)
    plan = make_plan(floats.graph, rule)
    spec = next(p.spec for p in plan.points if p.tensor == "y")
    grid = choose_qparams(np.float32(-1), np.float32(1), spec)
    params = placeholder_params(floats, plan) | {"x": grid, "y": grid}
    qdq = insert_pairs(floats, plan, params, state="calibrated")

    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    seen = fake_quantize(x, grid, spec)
    y = np.where(seen < 0, np.float32(0.01) * seen, seen)
    on_grid = fake_quantize(y, grid, spec)
    proto = qdq.to_proto()
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    before_conv = onnx.utils.Extractor(proto).extract_model(["x"], [conv.input[0]])

    assert not np.array_equal(y, on_grid)
    assert [t.name for t in proto.graph.output] == ["y", "z"]
    np.testing.assert_array_equal(run_ort(before_conv, {"x": x})[0], on_grid)
    expected = on_grid if outputs == "quantized" else y
    np.testing.assert_array_equal(run_ort(proto, {"x": x})[0], expected)
    assert as_bytes(qdq.floats) == as_bytes(floats)


def test_the_stored_hash_is_of_the_names_and_values_of_all_weights():
    """Files keep it: it says later whether the weights are still those of the float model."""
    floats, qdq = quantized(attention())
    digest = hashlib.sha256()
    for tensor in sorted(floats.to_proto().graph.initializer, key=lambda t: t.name):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            digest.update(tensor.name.encode() + onnx.numpy_helper.to_array(tensor).tobytes())

    assert qdq.source == digest.hexdigest()


def test_inserting_twice_is_refused():
    _, qdq = quantized(convnet())
    with pytest.raises(ModelError, match="already contains a quantization plan"):
        insert_pairs(qdq, qdq.plan, qdq.params, state="calibrated")


def test_missing_parameters_are_named():
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    with pytest.raises(PlanError, match="No parameters for 'input'"):
        insert_pairs(floats, plan, {}, state="calibrated")


def test_plan_of_another_model_is_refused():
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    params = placeholder_params(floats, plan)
    first = plan.points[0]
    moved = msgspec.structs.replace(first, consumers=(first.consumers[0].__class__("n_c2", 0),))
    wrong = msgspec.structs.replace(plan, points=(moved, *plan.points[1:]))
    with pytest.raises(PlanError, match="input 0 of 'n_c2' is 'input'"):
        insert_pairs(floats, wrong, params, state="calibrated")


def test_file_without_plan_or_pairs_says_what_to_do():
    with pytest.raises(ModelError, match="Run 'onnxqat insert'"):
        require_quantized(from_proto(convnet()))

    _, qdq = quantized(convnet())
    broken = qdq.qdq()
    broken.graph.nodes = [n for n in broken.graph.nodes if n.name != "r1/QuantizeLinear"]
    with pytest.raises(PlanError, match="Q/DQ pair of 'r1' is missing"):
        remove_pairs(broken.graph, qdq.plan)


def test_state_is_stored():
    assert quantized(convnet())[1].state == "calibrated"


@pytest.mark.parametrize("name", ["output/float", "r1/clipped", "w1/scale", "c3/zero_point"])
def test_a_name_that_a_pair_needs_is_refused(name):
    network = convnet()
    for node in network.graph.node:  # rename what the second Conv writes
        node.input[:] = [name if tensor == "c2" else tensor for tensor in node.input]
        node.output[:] = [name if tensor == "c2" else tensor for tensor in node.output]
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule("tflite"))
    with pytest.raises(ModelError, match=f"Name '{name}'"):
        insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
