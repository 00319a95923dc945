from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import placeholder_params
from onnxqat.deploy import deployed_model, read_table, write_deployment
from onnxqat.errors import FormatError, ModelError, PlanError
from onnxqat.formats import sophgo
from onnxqat.formats.sophgo_names import found_in, op_modes, table_of
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.qparams import fake_quantize, quantize
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from tests.contents import as_bytes
from tests.networks import W4A4, _Graph, attention, convnet, quantized, samples
from tests.oracles import run_ort

OVERRIDES = pytest.mark.parametrize("overrides", [(), W4A4], ids=["w8a8", "w4a4"])
NETWORKS = pytest.mark.parametrize("network", [convnet, attention], ids=["convnet", "attention"])
RULE = "sophgo-bm1684x"


def imported(folder, overrides, rule=RULE, table=None):
    """Return the Q/DQ model that the files in a folder make."""
    floats = prepare(load_model(folder / "model.onnx"))
    plan = make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])
    plan, params = read_table(folder / "model_cali_table", floats, plan, table=table)
    return insert_pairs(floats, plan, params, state="calibrated")


# --- weights ----------------------------------------------------------------------------------


@OVERRIDES
@NETWORKS
def test_snapped_weights_are_on_the_grid(network, overrides):
    _, model = quantized(network(), RULE, overrides)
    params = model.params
    before, after = (
        m.graph.tensors() for m in (model.floats, deployed_model(model, weights="snapped"))
    )
    weights = [p for p in model.plan.grid_points() if p.role == "weight"]

    assert weights
    for point in weights:
        kept, old = after[point.tensor].values, before[point.tensor].values
        entry = params[point.parameters]
        np.testing.assert_array_equal(kept, fake_quantize(kept, entry, point.spec))
        np.testing.assert_array_equal(
            quantize(kept, entry, point.spec), quantize(old, entry, point.spec)
        )
        assert kept.ndim == 0 or not np.array_equal(kept, old)  # a scalar has its own grid


@NETWORKS
def test_snapping_touches_nothing_but_weights(network):
    _, model = quantized(network())
    before, after = (
        m.graph.tensors() for m in (model.floats, deployed_model(model, weights="snapped"))
    )
    weights = {p.tensor for p in model.plan.grid_points() if p.role == "weight"}
    changed = {
        name
        for name, tensor in before.items()
        if isinstance(tensor, gs.Constant) and not np.array_equal(tensor.values, after[name].values)
    }

    assert changed == weights - {"scaling"}  # a scalar is on its own grid


@NETWORKS
def test_tuned_weights_are_kept_as_they_are(network):
    _, model = quantized(network())

    assert as_bytes(deployed_model(model, weights="tuned")) == as_bytes(model.floats)


# --- the round trip ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RULE, "sophgo-bm1690"])
@OVERRIDES
@NETWORKS
def test_table_and_stripped_model_reproduce_the_model_bit_for_bit(
    network, overrides, rule, tmp_path
):
    network = network()
    _, model = quantized(network, rule, overrides, observer="mse")
    write_deployment(model, tmp_path)
    again = imported(tmp_path, overrides, rule)
    old, new = model.params, again.params
    x = {"input": samples(network, 32, seed=5)}

    assert again.plan == model.plan
    assert old.keys() == new.keys()
    assert all(old[name].same_as(new[name]) for name in old)
    np.testing.assert_array_equal(run_ort(again.to_proto(), x)[0], run_ort(model.to_proto(), x)[0])


def concat_of_a_constant() -> onnx.ModelProto:
    """Relu and a non-negative constant share unsigned parameters behind Concat."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(4, 3, 1, 1)).astype(np.float32),
        "k": np.linspace(0, 3, 32, dtype=np.float32).reshape(1, 2, 4, 4),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Concat", ["r", "k"], ["output"], name="concat", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 6, 4, 4])],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_constant_in_an_unsigned_group_comes_back_unsigned(tmp_path):
    network = concat_of_a_constant()
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule(RULE), [])
    _, model = calibrated_on_one(floats, plan)
    write_deployment(model, tmp_path)
    again = imported(tmp_path, ())

    assert not model.params["r"].signed
    assert again.plan == model.plan
    assert all(p.same_as(again.params[name]) for name, p in model.params.items())


def calibrated_on_one(floats, plan):
    from onnxqat.calibration import calibrate

    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    x = np.random.default_rng(1).normal(size=(1, 3, 4, 4)).astype(np.float32)
    return floats, calibrate(empty, [{"input": x}], observer="minmax")


# --- the names the compiler looks up ----------------------------------------------------------


def looked_up(model) -> set[str]:
    """Return every name of an activation, by the naming rule of the compiler alone."""
    graph = model.floats.graph
    names = {t.name for t in graph.inputs}
    return names | {
        f"{t.name}_{n.op}" for n in graph.nodes for t in n.outputs if t.dtype == np.float32
    }


@OVERRIDES
@NETWORKS
def test_every_activation_has_a_line_or_stands_in_the_qtable(network, overrides):
    _, model = quantized(network(), RULE, overrides)
    table = table_of(model)
    lines = table.activations.keys() | table.int4.keys()
    gemms = {name for name in lines if name.removesuffix("_Gemm") + "_Add" in lines}

    assert looked_up(model) <= lines | set(op_modes(model))
    assert lines - gemms <= looked_up(model)
    assert "input" in lines


def test_inner_tensors_of_a_chain_have_the_line_of_its_end():
    table = table_of(quantized(convnet())[1]).activations

    assert table["c1_Conv"] == table["r1_Relu"]
    assert table["c2_Conv"] == table["r2_Clip"]
    assert table["a1_Add"] == table["r3_Relu"]
    assert table["r1_Relu"].low == 0


def test_a_matmul_and_its_bias_stand_under_the_name_of_a_gemm_too():
    """tpu-mlir makes one Gemm of them where they have two dimensions, and looks that up."""
    _, qdq = quantized(attention(), "sophgo-bm1684x")
    table = table_of(qdq)

    assert table.activations["q_Gemm"] == table.activations["q_Add"]
    assert table.weights["q_Gemm_weight"] == table.weights["q_Add_weight"]
    assert "s0_Gemm" not in table.activations  # no bias follows


def test_a_table_without_the_names_of_gemms_is_complete():
    floats, qdq = quantized(attention(), "sophgo-bm1684x")
    table = table_of(qdq)
    gemms = ("q_Gemm", "k_Gemm", "v_Gemm")
    lines = {k: v for k, v in table.activations.items() if k not in gemms}
    weights = {k: v for k, v in table.weights.items() if k.removesuffix("_weight") not in gemms}
    table = dataclasses.replace(table, activations=lines, weights=weights)

    assert not found_in(table, floats.graph, qdq.plan, "table").missing


def test_weights_go_by_the_end_of_their_chain():
    _, model = quantized(convnet())
    table = table_of(model).weights

    assert table.keys() == {
        "r1_Relu_weight",
        "r2_Clip_weight",
        "c3_Conv_weight",
        "c4_Conv_weight",
        "output_Gemm_weight",
    }
    scales = model.params["w1"].scale.astype(np.float64)
    np.testing.assert_array_equal(table["r1_Relu_weight"].scales, scales)


def test_mixed_widths_stand_in_their_own_section():
    _, model = quantized(convnet(), RULE, W4A4)
    table = table_of(model)

    assert table.work_mode == "int4_and_int8_mix"
    assert "input" in table.activations
    assert table.int4.keys() >= {"r2_Clip", "c2_Conv"}
    # ops of 8 bits that write or read them look them up with 8 bits, at the same range
    assert {name: table.activations[name] for name in table.int4} == table.int4


def test_ops_of_4_bits_are_listed_where_the_chip_has_4_bits():
    _, model = quantized(convnet(), "sophgo-bm1688", W4A4)
    bm1688 = load_rule("sophgo-bm1688")

    assert table_of(model, bm1688).int4_ops == ("c3_Conv", "c4_Conv")
    # the first and the last have 8 bits; 'r2_Clip' is the end of a depthwise convolution
    assert op_modes(model, bm1688) == dict.fromkeys(("r1_Relu", "r2_Clip", "output_Gemm"), "INT8")
    assert table_of(model, load_rule("sophgo-bm1684x")).int4_ops == ()
    assert op_modes(model, load_rule("sophgo-bm1684x")) == {}


def test_float_ops_are_those_the_plan_left_float():
    _, model = quantized(attention())

    assert op_modes(model) == {"l_LayerNormalization": "F32"}
    assert op_modes(quantized(convnet())[1]) == {}


@pytest.mark.parametrize(
    ("rule", "largest", "mode"),
    [
        ("sophgo-bm1684x", 65504.0, "F16"),
        ("sophgo-bm1684x", 65536.0, "F32"),  # more than float16 holds
        ("sophgo-cv183x", 65536.0, "BF16"),
    ],
)
def test_float_ops_have_the_float_type_of_the_chip(rule, largest, mode):
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w", 4, 3, 1, 1)], "c")
    g.node("Mul", ["c", g.constant("k", np.float32([largest]))], "output")
    _, model = quantized(g.model(["N", 3, 4, 4], ["N", 4, 4, 4]), rule, ("op:Mul.quantize=false",))

    assert op_modes(model, load_rule(rule))["output_Mul"] == mode


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name:n_c3.quantize=false", {"c3_Conv"}),
        ("tensor:w3.quantize=false", {"c3_Conv"}),
        ("tensor:w1.quantize=false", {"c1_Conv", "r1_Relu"}),  # a chain is one node
        ("tensor:output.quantize=false", {"output_Gemm"}),
        ("tensor:input.quantize=false", {"c1_Conv", "r1_Relu"}),
    ],
)
def test_what_an_override_leaves_float_stands_in_the_qtable(override, expected):
    _, model = quantized(convnet(), RULE, (override,))
    table = table_of(model)

    assert set(op_modes(model)) == expected
    assert looked_up(model) <= table.activations.keys() | expected | {"input"}


# --- files ------------------------------------------------------------------------------------


def test_files_are_what_they_are_called(tmp_path):
    _, model = quantized(attention())
    files = write_deployment(model, tmp_path / "new" / "chip").files

    assert {k: p.name for k, p in files.items()} == {
        "model": "model.onnx",
        "table": "model_cali_table",
        "qtable": "model_qtable",
        "compile.sh": "compile.sh",
    }
    assert sorted(files.values()) == sorted((tmp_path / "new" / "chip").iterdir())
    assert files["table"].read_text() == sophgo.write(table_of(model))
    assert files["qtable"].read_text().splitlines()[2:] == ["l_LayerNormalization F16"]
    assert load_model(files["model"]).metadata == {}


def test_force_removes_the_table_of_an_earlier_model(tmp_path):
    write_deployment(quantized(attention())[1], tmp_path)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model_cali_table").unlink()
    (tmp_path / "compile.sh").unlink()
    model = quantized(convnet())[1]
    with pytest.raises(Exception, match="model_qtable: already exists"):
        write_deployment(model, tmp_path)
    write_deployment(model, tmp_path, force=True)

    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model.onnx", "model_cali_table", "compile.sh"}


def test_rule_without_a_table_writes_none(tmp_path):
    _, model = quantized(convnet(), "onnxruntime-cpu")

    assert write_deployment(model, tmp_path).files.keys() == {"model", "compile.py"}


def test_ranges_that_the_compiler_makes_symmetric_are_told(tmp_path):
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w", 4, 3, 1, 1)], "c")
    g.node("Mul", ["c", "input1"], "m")
    g.node("Relu", ["m"], "output")
    g.nodes.insert(1, helper.make_node("Sigmoid", ["c"], ["input1"], name="n_s"))
    net = g.model(["N", 3, 4, 4], ["N", 4, 4, 4])
    asymmetric = ("activation.signedness=unsigned", "activation.symmetric=false")
    _, model = quantized(net, RULE, (*asymmetric, "name:n_output.quantize=false"))
    found = write_deployment(model, tmp_path).left_out

    assert found["asymmetric ranges of Abs, Sub and Mul"] == ("m",)


def test_asymmetric_ranges_have_8_bits(tmp_path):
    overrides = ("activation.signedness=unsigned", "activation.symmetric=false")
    _, model = quantized(convnet(), RULE, (*overrides, "activation.bits=4"))
    with pytest.raises(FormatError, match="4 bits; an asymmetric Sophgo table holds 8 bits"):
        write_deployment(model, tmp_path / "chip")

    assert not (tmp_path / "chip").exists()


def test_widths_the_table_lacks_cannot_be_said(tmp_path):
    _, model = quantized(convnet(), RULE, ("activation.bits=6",))
    with pytest.raises(FormatError, match="has 6 bits"):
        write_deployment(model, tmp_path)


def test_uncalibrated_and_float_models_are_refused(tmp_path):
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule(RULE), [])
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    with pytest.raises(PlanError, match="is not calibrated"):
        write_deployment(empty, tmp_path)
    with pytest.raises(ModelError, match="contains no quantization plan"):
        write_deployment(floats, tmp_path)


# --- tables that do not fit -------------------------------------------------------------------


@pytest.fixture
def deployed(tmp_path):
    write_deployment(quantized(convnet())[1], tmp_path)
    return tmp_path


def edit(folder, old, new):
    path = folder / "model_cali_table"
    text = path.read_text()

    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_lines_of_one_group_must_agree(deployed):
    edit(deployed, "\np1_MaxPool ", "\np1_MaxPool 1.0 0.0 1.0\nformer_Op ")
    with pytest.raises(FormatError, match="differs from another entry of the same group"):
        imported(deployed, ())


def test_weight_of_another_shape_is_refused(deployed):
    with pytest.raises(FormatError, match="'r1_Relu_weight' has 6 scales; its tensor takes 1"):
        imported(deployed, ("weight.axis=none",))


def test_missing_lines_are_named(deployed):
    edit(deployed, "\ninput ", "\nother ")
    with pytest.raises(FormatError, match="lacks 1 names that the model needs: input"):
        imported(deployed, ())


def test_lines_nobody_reads_are_told(deployed, caplog):
    imported(deployed, ("name:n_c3.quantize=false",))

    assert "c3_Conv_weight" in caplog.text


def test_weight_zero_points_are_refused(deployed):
    path = deployed / "model_cali_table"
    lines = path.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("r1_Relu_weight "))
    lines[index] = lines[index][:-1] + "3"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(FormatError, match="zero_point other than 0"):
        imported(deployed, ())


def test_binary_table_is_refused(deployed):
    (deployed / "model_cali_table").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="cannot be read"):
        imported(deployed, ())


def test_a_table_of_the_other_symmetry_is_refused(deployed, tmp_path):
    asymmetric = ("activation.signedness=unsigned", "activation.symmetric=false")
    with pytest.raises(FormatError, match="'input' has the symmetric range"):
        imported(deployed, asymmetric)
    net = onnx.load(deployed / "model.onnx")
    write_deployment(quantized(net, RULE, asymmetric)[1], tmp_path / "asymmetric")
    with pytest.raises(FormatError, match=r"has the asymmetric range .*, but is symmetric in the"):
        imported(tmp_path / "asymmetric", ())


def test_per_tensor_convolution_lists_its_scale_for_every_channel():
    """The compiler reads one scale per output channel of a convolution, whatever the grid."""
    _, qdq = quantized(convnet(), overrides=("weight.axis=none",))
    table = table_of(qdq)
    scale = float(qdq.params["w1"].scale)

    assert table.weights["r1_Relu_weight"].scales == (scale,) * 6
    assert len(table.weights["output_Gemm_weight"].scales) == 1
    params = found_in(table, qdq.floats.graph, qdq.plan, "table").complete()
    assert all(params[name].same_as(p) for name, p in qdq.params.items())


def test_unequal_scales_for_a_per_tensor_grid_are_refused():
    _, qdq = quantized(convnet())
    table = table_of(qdq)
    _, per_tensor = quantized(convnet(), overrides=("weight.axis=none",))
    with pytest.raises(FormatError, match="has 6 scales; its tensor takes 1"):
        found_in(table, qdq.floats.graph, per_tensor.plan, "table")


# --- attributes ---------------------------------------------------------------------------------


def defaults():
    """Return a network whose nodes leave out the attributes that have their default."""
    g = _Graph(0)
    g.node("Elu", ["input"], "elu")
    g.node("LeakyRelu", ["elu"], "leaky")
    g.node("HardSigmoid", ["leaky"], "sigmoid", beta=0.25)
    g.node("MaxPool", ["sigmoid"], "largest", kernel_shape=[2, 2])
    g.node("AveragePool", ["largest"], "output", kernel_shape=[2, 3])
    return g.model(["N", 2, 6, 6], ["N", 2, 4, 3])


def test_defaults_that_the_compiler_would_misread_are_written_out(tmp_path):
    model = quantized(defaults(), RULE)[1]
    x = {"input": np.random.default_rng(0).normal(size=(2, 2, 6, 6)).astype(np.float32)}

    write_deployment(model, tmp_path / "chip")
    write_deployment(model, tmp_path / "other", table="onnxqat")

    found, other = (onnx.load(tmp_path / name / "model.onnx") for name in ("chip", "other"))
    states = {n.op_type: {a.name: helper.get_attribute_value(a) for a in n.attribute}
              for n in found.graph.node}  # fmt: skip
    assert states["Elu"]["alpha"] == 1
    assert states["LeakyRelu"]["alpha"] == pytest.approx(0.01)
    assert states["HardSigmoid"] == {"alpha": pytest.approx(0.2), "beta": 0.25}
    assert states["MaxPool"]["strides"] == states["AveragePool"]["strides"] == [1, 1]
    np.testing.assert_array_equal(run_ort(found, x), run_ort(defaults(), x))
    assert not any(a.name == "strides" for n in other.graph.node for a in n.attribute)
