"""What each table says in its own words, and what it refuses to say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxqat.deploy
from onnxqat.deploy import deployed_model, read_table, write_deployment
from onnxqat.errors import FormatError, RuleError
from onnxqat.formats import FORMATS, Calibrated, Found, Table, sophgo
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.qparams import quantize
from onnxqat.quantized import load_model
from onnxqat.rules import bundled_rules, load_rule
from tests.networks import _Graph, attention, convnet, quantized

BITS_8 = [rule for rule in bundled_rules() if not rule.endswith("16")]


@cache
def calibrated(rule, overrides=()):
    return quantized(convnet(), rule, overrides)[1]


def written(name, rule, overrides=(), network=None):
    """Return the files of a format, and what it leaves out."""
    model = quantized(network, rule, overrides)[1] if network else calibrated(rule, overrides)
    return FORMATS[name].write(Calibrated(model)), model.params


def read(name, text, rule, overrides=()):
    """Read a table for the convnet."""
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])
    data = text if isinstance(text, bytes) else text.encode()
    return FORMATS[name].read(Table(name="t", data=data), floats.graph, plan).complete()


# --- weights on the grid ----------------------------------------------------------------------

ROUNDINGS = {
    "half-even": np.rint,
    "half-away": lambda x: np.trunc(x + np.copysign(x.dtype.type(0.5), x)),
    "half-up": lambda x: np.floor(x + x.dtype.type(0.5)),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", BITS_8)
def test_snapped_weights_round_to_the_same_integers_in_any_mode(rule, rounding):
    """Dividing or multiplying by the reciprocal, in float32 or float64."""
    model = calibrated(rule)
    old, new = model.floats.graph.tensors(), deployed_model(model, weights="snapped")
    params, count = model.params, 0
    for point in (p for p in model.plan.grid_points() if p.role == "weight"):
        entry = params[point.parameters]
        trained = quantize(old[point.tensor].values, entry, point.spec)
        values = new.graph.tensors()[point.tensor].values
        shape = [1] * values.ndim
        if point.spec.axis is not None:
            shape[point.spec.axis] = -1
        for dtype in (np.float32, np.float64):
            x, scale = values.astype(dtype), entry.scale.astype(dtype).reshape(shape)
            for levels in (x / scale, x * (dtype(1) / scale)):
                found = ROUNDINGS[rounding](levels)
                np.testing.assert_array_equal(found, trained)
                count += found.size

    assert count > 1000


def test_tuned_weights_do_depend_on_the_mode():
    """Otherwise the test above could not fail: a weight halfway between two integers does."""
    x = np.float32([0.5, -0.5, 1.5, 2.5])
    found = {name: tuple(rounding(x)) for name, rounding in ROUNDINGS.items()}

    assert len(set(found.values())) == 3


# --- words and units --------------------------------------------------------------------------


def test_tensorrt_cache_has_the_header_and_the_bits_of_the_scales():
    made, params = written("tensorrt", "tensorrt")
    lines = made.files["table"].splitlines()

    assert lines[0] == "TRT-8501-EntropyCalibration2"
    assert lines[1] == f"input: {params['input'].scale.astype('>f4').tobytes().hex()}"
    assert len(lines) == 9
    ranges = json.loads(made.files["dynamic_range"])["tensorrt"]["blob_range"]
    assert ranges["input"] == 127 * float(params["input"].scale)
    assert made.left_out == {"weight scales": ("w1", "w2", "w3", "w4", "w5")}


def test_onnxruntime_reads_its_own_calibration_json(tmp_path):
    """Its writer, fed with our JSON, writes our cache."""
    pytest.importorskip("flatbuffers", reason="onnxruntime's writer needs flatbuffers")
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.quant_utils import write_calibration_table

    made, _ = written("onnxruntime-calibration", "tensorrt")
    ranges = json.loads(made.files["table"])
    try:
        write_calibration_table(ranges, str(tmp_path))
        number = str
    except AttributeError:  # newer ones take objects of float32 in the place of lists
        ends = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in ranges.items()
        }
        write_calibration_table(ends, str(tmp_path))
        number = np.float32

    theirs, ours = (
        [(name, number(value)) for name, value in map(str.split, text.splitlines())]
        for text in ((tmp_path / "calibration.cache").read_text(), made.files["cache"])
    )
    assert theirs == ours


def test_encodings_say_widths_as_aimet_does():
    made, params = written("qnn", "qnn-htp")
    document = json.loads(made.files["table"])
    (x,) = document["activation_encodings"]["input"]
    scale, zero_point = float(params["input"].scale), int(params["input"].zero_point)

    assert document["version"] == "0.6.1"
    assert (x["bitwidth"], x["dtype"], x["is_symmetric"]) == (8, "int", "False")
    assert (x["scale"], x["offset"]) == (scale, -zero_point)
    assert (x["min"], x["max"]) == (-zero_point * scale, (255 - zero_point) * scale)
    assert len(document["param_encodings"]["w1"]) == 6
    assert {c["offset"] for c in document["param_encodings"]["w1"]} == {-128}
    assert {c["is_symmetric"] for c in document["param_encodings"]["w1"]} == {"True"}
    assert document["quantizer_args"]["per_channel_quantization"] is True
    assert made.left_out == {"biases": ("b1", "b2", "b4", "b5")}


def test_amct_lists_additions_at_two_scales():
    made, params = written("amct", "ascend")
    text = made.files["table"]

    assert made.left_out == {
        "ops with inputs at two scales": ("n_a1",),
        "tensors of other ops": ("c3",),
    }
    assert 'key: "n_a1"' not in text
    record = re.search(r'record \{\n  key: "n_c1"\n  value \{\n(.*?)  \}\n\}', text, re.DOTALL)
    assert record is not None
    lines = record[1].split("\n")
    assert lines[0] == f"    scale_d: {float(params['input'].scale)!r}"
    assert lines[1] == f"    offset_d: {int(params['input'].zero_point)}"
    assert lines[2:8] == [f"    scale_w: {float(s)!r}" for s in params["w1"].scale]
    assert lines[8:14] == ["    offset_w: 0"] * 6


def test_ncnn_lists_weights_first_as_reciprocals():
    made, params = written("ncnn", "ncnn")
    lines = made.files["table"].splitlines()
    name, *numbers = lines[0].split(" ")

    assert [line.split()[0] for line in lines[4:6]] == ["n_output_param_0", "n_c1"]
    assert name == "n_c1_param_0"
    assert [float(n) for n in numbers] == [1 / float(s) for s in params["w1"].scale]
    assert not any("e" in number for line in lines for number in line.split()[1:])
    assert all(line.strip() for line in lines)  # ncnn2int8 stops at an empty one


def grouped() -> onnx.ModelProto:
    """A convolution of two groups with two channels each, of unlike sizes."""
    g = _Graph(0)
    weight = g.rng.normal(size=(4, 2, 3, 3)).astype(np.float32)
    weight *= np.float32([1.0, 0.1, 0.5, 0.7]).reshape(4, 1, 1, 1)
    g.node("Conv", ["input", g.constant("w", weight)], "c", group=2, pads=[1, 1, 1, 1])
    g.node("GlobalAveragePool", ["c"], "p")
    g.node("Flatten", ["p"], "f")
    g.node("Gemm", ["f", g.weight("v", 4, 4)], "output")
    return g.model(["N", 4, 8, 8], ["N", 4])


def test_ncnn_takes_the_largest_scale_of_a_group_and_says_so(tmp_path):
    _, model = quantized(grouped(), "ncnn")
    deployment = write_deployment(model, tmp_path)
    scales = model.params["w"].scale.astype(np.float64)
    first = deployment.files["table"].read_text().splitlines()[0].split()

    assert [1 / float(n) for n in first[1:]] == pytest.approx([scales[0], scales[3]])
    assert deployment.regridded.keys() == {"w"}
    assert 18 <= deployment.regridded["w"] <= 36  # of the two smaller channels


def test_sophgo_lists_one_scale_for_each_channel_of_every_group():
    """The groups of a ConvTranspose share their scales, and the compiler reads one per channel."""
    g = _Graph(0)
    weight = g.rng.normal(size=(4, 3, 2, 2)) * np.reshape([1, 2, 4], (3, 1, 1))
    g.node("ConvTranspose", ["input", g.constant("w", weight.astype(np.float32))], "t", group=2)
    g.node("Conv", ["t", g.weight("v", 5, 6, 1, 1)], "output")
    floats, model = quantized(g.model(["N", 4, 5, 5], ["N", 5, 6, 6]))
    table = FORMATS["sophgo"].write(Calibrated(model)).files["table"]
    weights, scales = sophgo.read(table, "t").weights, model.params
    found = FORMATS["sophgo"].read(Table(name="t", data=table.encode()), floats.graph, model.plan)

    assert scales["w"].scale.shape == (3,)
    assert weights["t_ConvTranspose_weight"].scales == (*scales["w"].scale, *scales["w"].scale)
    assert weights["output_Conv_weight"].scales == tuple(scales["v"].scale)
    assert found.complete()["w"].same_as(scales["w"])


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [((), "QAT_all_int8"), (("name:n_c2.bits=4",), "int4_and_int8_mix")],
)
def test_sophgo_says_whether_there_are_4_bits(overrides, mode):
    made, _ = written("sophgo", "sophgo-bm1684x", overrides)

    assert sophgo.read(made.files["table"], "t").work_mode == mode


@pytest.mark.parametrize(("overrides", "axis"), [((), 0), (("weight.axis=none",), None)])
def test_a_bias_has_an_axis_where_its_weight_has_one(overrides, axis):
    made, params = written("onnxqat", "onnxruntime-cpu", overrides)
    biases = {b["tensor"]: b for b in json.loads(made.files["table"])["biases"]}
    scale = np.atleast_1d(params["input"].scale * params["w1"].scale)

    assert biases["b1"]["axis"] == axis
    np.testing.assert_array_equal(np.atleast_1d(biases["b1"]["scale"]), scale)


def test_modules_of_catch_go_by_their_weight():
    proto = convnet()
    for node in proto.graph.node:
        node.input[:] = ["block.conv.weight" if t == "w1" else t for t in node.input]
    next(t for t in proto.graph.initializer if t.name == "w1").name = "block.conv.weight"
    made, params = written("cambricon", "cambricon-mlu", network=proto)
    state = json.loads(made.files["table"])
    x, weight = (1 / float(params[n].scale) for n in ("input", "block.conv.weight"))

    assert state["block.conv.scale"] == [x, weight]
    assert state["block.conv.quantized_mode"] == [1]
    assert "n_c2.scale" in state
    ranges = json.loads(made.files["ranges"])["custom_ranges"]
    assert ranges["input"]["max"] == [127 * float(params["input"].scale)]
    assert json.loads(made.files["config"])["precision_config"] == {
        "precision_mode": "qint8_mixed_float16",
        "weight_quant_granularity": "per_tensor",
        "activation_quant_algo": "symmetric",
    }


def test_per_channel_scales_of_catch_have_their_own_key():
    made, params = written("cambricon", "cambricon-mlu", ("weight.axis=channel",))
    state = json.loads(made.files["table"])

    assert state["n_c1.scale"] == [1 / float(params["input"].scale), 0]
    assert state["n_c1.quantized_by_channel"] == [1]
    assert state["n_c1.scale_weight_per_channel"] == [1 / float(s) for s in params["w1"].scale]


def test_horizon_says_the_width_of_a_node():
    made, params = written("horizon", "horizon-bayes")
    nodes = {n["tensor"]: n for n in json.loads(made.files["table"])["calibration_nodes"]}

    assert nodes["input"]["thresholds"] == [127 * float(params["input"].scale)]
    assert nodes["input"]["nodes"] == ["n_c1"]
    assert nodes["w1"]["axis"] == 0
    assert json.loads(made.files["config"])["node_config"]["n_c1"] == {"qtype": "int8"}


@pytest.mark.parametrize(
    ("wide", "widths"),
    [
        ((), {"n_q0": "int8", "n_k0": "int8", "n_s0": "int8"}),
        (("q",), {"n_q0": "int8", "n_k0": "int8", "n_s0": "int16"}),
        (("kt",), {"n_q0": "int8", "n_k0": "int8", "n_s0": "int16"}),
        (("input",), {"n_q0": "int16", "n_k0": "int16", "n_s0": "int8"}),
    ],
)
def test_a_node_runs_in_the_width_of_its_widest_input(wide, widths):
    """``n_s0`` multiplies ``q`` with ``kt``."""
    overrides = tuple(f"tensor:{name}.bits=16" for name in wide)
    made, _ = written("horizon", "horizon-bayes", overrides, network=attention())
    config = json.loads(made.files["config"])["node_config"]

    assert {name: config[name]["qtype"] for name in widths} == widths


def test_mindspore_uses_the_names_of_its_attributes():
    made, params = written("mindspore", "mindspore")
    node = json.loads(made.files["table"])["nodes"]["n_c1"]
    x, w = params["input"], params["w1"]

    assert node["input_minq"] == -int(x.zero_point) * float(x.scale)
    assert node["input_maxq"] == (255 - int(x.zero_point)) * float(x.scale)
    assert node["filter_maxq"] == [127 * float(s) for s in w.scale]
    assert node["filter_minq"] == [-127 * float(s) for s in w.scale]
    assert (node["weight_num_bits"], node["act_num_bits"]) == (8, 8)
    assert (node["symmetric"], node["weight_narrow_range"]) == (True, True)
    assert node["input_narrow_range"] is False
    assert node["output_minq"] == 0  # of the Relu it is fused with


def test_mnn_gives_a_layer_its_three_grids_under_every_name_it_may_have():
    made, params = written("mnn", "sophgo-cv183x")
    document = json.loads(made.files["table"])
    (algorithm,) = document["algo"]
    layers = {e["output"][0]["name"]: e for e in algorithm["quantParams"]["layer"]}

    assert document["version"] == "0.0.0"
    assert layers.keys() == {"c1", "r1", "c2", "r2", "c3", "c4", "output"}
    first = layers["c1"]
    assert first["input"] == layers["r1"]["input"]
    assert first["weight"] == layers["r1"]["weight"]
    assert first["output"] == [layers["r1"]["output"][0] | {"name": "c1"}]
    grid = {"bits": 8, "zeroPoint": 0, "clampMin": -128, "clampMax": 127}
    scales = [float(params["r1"].scale)]
    assert first["output"] == [{"name": "c1", "scales": scales} | grid]
    assert first["weight"][0]["scales"] == [float(s) for s in params["w1"].scale]
    assert (first["weight"][0]["clampMin"], first["weight"][0]["clampMax"]) == (-127, 127)
    assert made.left_out["ops that MNN runs in float"] == (
        "n_a1", "n_p1", "n_k1", "n_v1", "n_v2", "n_f1")  # fmt: skip


def test_mnn_repeats_the_one_scale_of_a_weight_for_each_channel():
    made, params = written("mnn", "sophgo-cv183x", ("weight.axis=none",))
    (algorithm,) = json.loads(made.files["table"])["algo"]
    first = algorithm["quantParams"]["layer"][0]

    assert first["weight"][0]["scales"] == [float(params["w1"].scale)] * 6


def products() -> onnx.ModelProto:
    """Layers that the converter takes apart or names itself, between two that it keeps."""
    g = _Graph(0)
    pads = {"pads": [1, 1, 1, 1]}
    g.node("Conv", ["input", g.weight("w1", 4, 3, 3, 3)], "kept", **pads)
    g.node("Conv", ["kept", g.weight("w2", 4, 2, 3, 3)], "grouped", group=2, **pads)
    g.node("Conv", ["grouped", g.weight("w3", 4, 4, 3, 3)], "scaled", **pads)
    g.node("Mul", ["scaled", g.constant("two", np.float32(2))], "twice")
    g.node("GlobalAveragePool", ["twice"], "p")
    g.node("Flatten", ["p"], "f")
    g.node("Gemm", ["f", g.weight("v", 4, 5)], "y")
    g.node("Relu", ["y"], "hidden")
    g.node("Gemm", ["hidden", g.weight("u", 5, 3)], "output")
    return g.model(["N", 3, 8, 8], ["N", 3])


def test_mnn_writes_only_layers_that_its_converter_keeps_by_name():
    made, _ = written("mnn", "sophgo-cv183x", network=products())
    (algorithm,) = json.loads(made.files["table"])["algo"]
    names = [layer["output"][0]["name"] for layer in algorithm["quantParams"]["layer"]]

    assert names == ["kept", "output"]
    floats = made.left_out["ops that MNN runs in float"]
    assert {"n_grouped", "n_scaled", "n_twice", "n_y"} <= set(floats)


def test_tengine_repeats_the_line_of_a_relu_for_its_convolution():
    made, params = written("tengine", "axera-ax650")
    lines = dict(line.split(" ", 1) for line in made.files["table"].splitlines())

    assert lines["c1"] == lines["r1"]
    assert lines["input"] == f"{float(params['input'].scale)!r} {int(params['input'].zero_point)}"


def test_neutral_table_lists_biases_and_float_nodes():
    made, params = written("onnxqat", "tflite")
    document = json.loads(made.files["table"])
    bias = document["biases"][0]
    expected = params["input"].scale * params["w1"].scale

    assert document["schema"] == "onnxqat.table/1"
    assert (bias["tensor"], bias["node"], bias["index"]) == ("b1", "n_c1", 2)
    assert np.float32(bias["scale"]).tolist() == expected.tolist()
    assert document["rule"] == "tflite"


# --- what cannot be said ----------------------------------------------------------------------

REFUSED = [
    ("amct", "tensorrt", ("weight.bits=4",), "'w1' is not int8"),
    ("amct", "openvino", (), "'input' is not int8"),
    ("amct", "tensorrt", (), "'w5' is per-axis, but 'n_output' is a Gemm"),
    ("cambricon", "openvino", (), "'input' has a zero_point other than 0"),
    ("cambricon", "cambricon-mlu", ("weight.bits=4",), "'w1' has 4 bits"),
    ("horizon", "openvino", (), "'input' has a zero_point other than 0"),
    ("horizon", "sophgo-bm1684x", (), "'r1' has unsigned integers"),
    ("mindspore", "mindspore", ("activation.bits=4",), "'input' has 4 bits"),
    ("mnn", "tflite", (), "'r1' has unsigned integers or a zero_point other than 0"),
    ("mnn", "cambricon-mlu", (), "no layer of the model has all three"),
    ("mnn", "sophgo-cv183x", ("activation.bits=4",), "'input' has 4 bits"),
    ("ncnn", "openvino", (), "'input' has a zero_point other than 0"),
    ("onnxruntime-calibration", "openvino", (), "'input' has a zero_point other than 0"),
    ("qnn", "qnn-htp", ("weight.bits=3",), "'w1' has 3 bits"),
    ("qnn-1.0.0", "qnn-htp", ("weight.bits=2",), "'w1' has 2 bits"),
    ("tengine", "axera-ax650", ("activation.bits=4",), "'input' has 4 bits"),
    ("tensorrt", "openvino", (), "'input' has a zero_point other than 0"),
    ("tensorrt", "tensorrt", ("weight.bits=4",), "'w1' has 4 bits"),
]


@pytest.mark.parametrize(("name", "rule", "overrides", "message"), REFUSED)
def test_what_a_table_cannot_say_is_listed(name, rule, overrides, message, tmp_path):
    model = calibrated(rule, overrides)
    with pytest.raises(FormatError, match=message):
        write_deployment(model, tmp_path / "chip", table=name)

    assert not (tmp_path / "chip").exists()


def renamed_node(name):
    proto = convnet()
    proto.graph.node[0].name = name
    return proto


@pytest.mark.parametrize(
    ("table", "rule", "name"),
    [
        ("ncnn", "ncnn", "conv 1"),
        ("ncnn", "ncnn", "conv_param_1"),
        ("ncnn", "ncnn", "c" * 250),
        ("ncnn", "ncnn", "conv\x7f1"),
    ],
)
def test_names_the_target_could_not_read_are_refused(table, rule, name):
    with pytest.raises(FormatError, match=re.escape(repr(name)[1:-1])):
        written(table, rule, network=renamed_node(name))


@pytest.mark.parametrize(
    ("table", "rule", "name"),
    [
        ("tensorrt", "tensorrt", "a: b"),
        ("tengine", "axera-ax650", "a b"),
        ("onnxruntime-calibration", "tensorrt", "a\tb"),
    ],
)
def test_tensor_names_that_hold_separators_are_refused(table, rule, name):
    proto = convnet()
    for node in proto.graph.node:
        node.input[:] = [name if t == "r1" else t for t in node.input]
        node.output[:] = [name if t == "r1" else t for t in node.output]
    with pytest.raises(FormatError, match=re.escape(repr(name))):
        written(table, rule, network=proto)


ENCODED = '{"version": "0.6.1", "activation_encodings": {"input": %s}, "param_encodings": {}}'

# --- tables that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "rule", "message"),
    [
        ("tensorrt", "TRT-1-X\ninput: xyz\n", "tensorrt", "t:2: expected 'tensor: 3c010a14'"),
        ("tensorrt", "input: 3c010a14\n", "tensorrt", "t:1: expected a header"),
        ("tensorrt", "TRT-1-X\na: 1\n\na: 1\n", "tensorrt", "t:4: 'a' appears twice"),
        ("tensorrt", "TRT-1-X\ninput: ff800000\n", "tensorrt", "t:2: scale -inf is not positive"),
        ("ncnn", "n_c1 1.0\nn_c2\n", "ncnn", "t:2: 0 numbers after the name"),
        ("ncnn", "n_c1 1.0\nn_c2 1,5\n", "ncnn", "t:2: '1,5' is not a decimal number"),
        ("ncnn", "n_c1_param_0 1 2 3 4 5\nn_c1 1\n", "ncnn", "has 5 scales; its tensor takes 6"),
        ("ncnn", "n_c1_param_0 1 2 3 4 5 0\nn_c1 1\n", "ncnn", "not a positive float32"),
        ("amct", 'record {\n key: "a"\n value {\n scale_x: 1 } }', "ascend", "t:4: 'scale_x' is"),
        ("amct", 'record {\n key: "a"\n value {\n', "ascend", "t:4: expected ':', found the end"),
        ("amct", 'record { key: "n_c1" value { } }', "ascend", "t:1: a record needs one scale_d"),
        ("qnn", "{\n  3", "qnn-htp", "t:2: not JSON"),
        ("qnn", '{"version": "2.0.0"}', "qnn-htp", "version '2.0.0' is not 0.x or 1.0.0"),
        ("qnn", ENCODED % '[{"bitwidth": "8"}]', "qnn-htp", "Expected `int`, got `str` - at"),
        ("qnn", '{"version": "0.6.1", "version": "0.6.1"}', "qnn-htp", "key 'version' appears"),
        ("onnxqat", '{"schema": "onnxqat.table/2", "points": []}', "tflite", r"at `\$.schema`"),
        ("onnxruntime-calibration", '{"input": [-1.0, 2.0]}', "tensorrt", "is not symmetric"),
        ("axera", b"\x08\x01", "axera-ax650", "lacks 12 names"),
        ("mnn", '{"version": NaN}', "sophgo-cv183x", "NaN is not a number of JSON"),
        ("cambricon", '{"n_c1.scale": [1.0, 1.0], "n_c1.quantized_mode": [2]}', "cambricon-mlu",
         "'n_c1.quantized_mode' does not stand for 8 bits"),
    ],
)  # fmt: skip
def test_wrong_tables_say_where_and_what(name, text, rule, message):
    with pytest.raises(FormatError, match=message):
        read(name, text, rule)


@pytest.mark.parametrize(
    ("name", "made_with", "read_with", "message"),
    [
        ("qnn", "qnn-htp", "tflite", "'c4' differs from another entry of the same group"),
        ("qnn", "sophgo-bm1684x", "sophgo-cv183x", "'r1' has a zero_point other than 0"),
        ("qnn", "tensorrt", "qnn-htp", "has 8 bits, symmetric True; the plan has 8, False"),
        ("horizon", "horizon-bayes", "cambricon-mlu", "'w1' has int8, axis 0; the plan has int8"),
        (
            "onnxqat",
            "tflite",
            "qnn-htp",
            "'input' has dtype, qmin, qmax, axis int8, .* uint8|'input' is signed",
        ),
        ("mindspore", "mindspore", "openvino", "lacks|differs"),
        ("tengine", "axera-ax650", "sophgo-bm1684x", "may be signed or unsigned"),
    ],
)
def test_table_of_another_rule_is_refused(name, made_with, read_with, message):
    made, _ = written(name, made_with)
    with pytest.raises(FormatError, match=message):
        read(name, made.files["table"], read_with)


def test_zero_points_of_an_axera_file_are_integers():
    made, _ = written("axera", "axera-ax650")
    proto = onnx.load_model_from_string(made.files["table"])
    tensor = next(t for t in proto.graph.initializer if t.name == "input/zero_point")
    tensor.CopyFrom(numpy_helper.from_array(np.array([b"x"], object), tensor.name))
    with pytest.raises(FormatError, match="'input' has no float32 scale and zero_point"):
        read("axera", proto.SerializeToString(), "axera-ax650")


def test_axera_files_do_not_lead_to_other_files():
    made, _ = written("axera", "axera-ax650")
    proto = onnx.load_model_from_string(made.files["table"])
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    with pytest.raises(FormatError, match="keeps its data outside of the file"):
        read("axera", proto.SerializeToString(), "axera-ax650")


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxqat.deploy, "MAX_BYTES", 10)
    (tmp_path / "table").write_text("0123456789a")
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("ncnn"))
    with pytest.raises(FormatError, match="larger than 256 MiB"):
        read_table(tmp_path / "table", floats, plan)


def test_rule_without_a_table_asks_for_the_format(tmp_path):
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("openvino"))
    with pytest.raises(FormatError, match=r"'openvino' has no table format\. Name the"):
        read_table(tmp_path / "table", floats, plan)


def test_rule_of_the_users_own_needs_the_format(tmp_path):
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, msgspec.structs.replace(load_rule("ncnn"), name="mine"))
    with pytest.raises(RuleError, match=r"'mine' is not bundled.*with --format"):
        read_table(tmp_path / "table", floats, plan)


def test_a_table_that_does_not_read_back_is_not_written(tmp_path, monkeypatch):
    def doubled(table, graph, plan):
        found = before["onnxqat"].read(table, graph, plan)
        x = found.params["input"]
        found.params["input"] = replace(x, scale=x.scale * np.float32(2))
        return found

    before = dict(FORMATS)
    wrong = {**before, "onnxqat": replace(FORMATS["onnxqat"], read=doubled)}
    monkeypatch.setattr(onnxqat.deploy, "FORMATS", wrong)
    model = calibrated("tflite")
    with pytest.raises(FormatError, match="'input' has other parameters when its table"):
        write_deployment(model, tmp_path / "chip", table="onnxqat")

    assert not (tmp_path / "chip").exists()


def test_every_format_names_its_files_apart():
    suffixes = [suffix for f in FORMATS.values() for suffix in f.files.values()]

    assert len(suffixes) == len(set(suffixes))
    assert all("table" in f.files for f in FORMATS.values())


@pytest.mark.parametrize("rule", bundled_rules())
def test_tables_of_the_rules_exist(rule):
    table = load_rule(rule).table

    assert table is None or table in FORMATS


@pytest.mark.parametrize("rule", [r for r in BITS_8 if load_rule(r).table])
def test_default_table_of_a_rule_says_all_of_attention(rule, tmp_path):
    _, model = quantized(attention(), rule)
    deployment = write_deployment(model, tmp_path)

    assert deployment.files["table"].is_file()
    assert load_model(deployment.files["model"]).metadata == {}
    assert isinstance(Found("t", model.floats.graph).complete(), dict)
