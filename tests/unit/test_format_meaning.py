"""Each table, read by its documented meaning alone, makes the model that was trained."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest

from onnxqat.deploy import read_table, write_deployment
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import bundled_rules, load_rule
from tests import meanings
from tests.networks import attention, convnet, quantized, samples
from tests.oracles import run_ort

INT16 = [rule for rule in bundled_rules() if rule.endswith("16")]
NO_ADD = ("op:Add.quantize=false",)
OTHERS = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Flatten")
LAYERS = (*(f"op:{op}.quantize=false" for op in OTHERS), "name:n_r3.quantize=false")


def network(rule):
    return convnet(opset=21) if rule in INT16 else convnet()


def rebuilt(deployment, rule, overrides, table):
    """Return the Q/DQ model that read_table makes."""
    floats = prepare(load_model(deployment.files["model"]))
    plan = make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])
    plan, params = read_table(deployment.files["table"], floats, plan, table=table)
    return insert_pairs(floats, plan, params, state="calibrated")


def by_meaning(deployment, kind, meaning):
    """Return the Q/DQ model that the documented meaning makes."""
    reading = meanings.Reading(onnx.load(deployment.files["model"]))
    meaning(deployment.files[kind].read_bytes(), reading)
    return reading.fake_quantized()


COMPLETE = [
    *(("onnxqat", rule, meanings.neutral, ()) for rule in bundled_rules()),
    ("amct", "ascend", meanings.amct, NO_ADD),
    ("cambricon", "cambricon-mlu", meanings.catch_scales, ()),
    ("cambricon", "cambricon-mlu", meanings.catch_scales, ("weight.axis=channel",)),
    ("cambricon", "cambricon-mlu-int16", meanings.catch_scales, ()),
    ("horizon", "horizon-bayes", meanings.horizon, ()),
    ("horizon", "horizon-bernoulli2", meanings.horizon, ()),
    ("mindspore", "mindspore", meanings.mindspore, ()),
    ("mindspore", "mindspore", meanings.mindspore, ("weight.bits=4",)),
    ("mindspore", "mindspore", meanings.mindspore, ("weight.bits=7",)),
    ("mnn", "sophgo-cv183x", meanings.mnn, LAYERS),
    ("mnn", "sophgo-cv183x", meanings.mnn, ("weight.bits=4", *LAYERS)),
    ("mnn", "sophgo-cv183x", meanings.mnn, ("weight.axis=none", *LAYERS)),
    ("ncnn", "ncnn", meanings.ncnn, ()),
    ("qnn", "qnn-htp", meanings.encodings, ()),
    ("qnn", "qnn-htp-16", meanings.encodings, ()),
    ("qnn", "qnn-htp", meanings.encodings, ("weight.bits=4",)),
    ("qnn", "tflite", meanings.encodings, ()),
    ("qnn-1.0.0", "qnn-htp", meanings.encodings_1, ()),
    ("sophgo", "sophgo-bm1684x", meanings.sophgo, ()),
    ("sophgo", "sophgo-cv183x", meanings.sophgo, ()),
    (
        "sophgo",
        "sophgo-bm1684x",
        meanings.sophgo_asymmetric,
        load_rule("sophgo-bm1684x").asymmetric,
    ),
]
COMPLETE_IDS = [f"{f}-{r}{'-' + o[0] if o else ''}" for f, r, _, o in COMPLETE]


@pytest.mark.parametrize(("table", "rule", "meaning", "overrides"), COMPLETE, ids=COMPLETE_IDS)
def test_table_and_float_model_are_the_trained_one_bit_for_bit(
    table, rule, meaning, overrides, tmp_path
):
    net = network(rule)
    _, model = quantized(net, rule, overrides, observer="mse")
    deployment = write_deployment(model, tmp_path, table=table)
    again = rebuilt(deployment, rule, overrides, table)
    x = {"input": samples(net, 32, seed=5)}
    expected = run_ort(model.to_proto(), x)[0]

    assert deployment.regridded == {}
    assert again.plan == model.plan
    assert all(p.same_as(again.params[name]) for name, p in model.params.items())
    np.testing.assert_array_equal(run_ort(again.to_proto(), x)[0], expected)
    found = by_meaning(deployment, "table", meaning)
    np.testing.assert_array_equal(run_ort(found, x)[0], expected)


WITHOUT_WEIGHTS = [
    ("cambricon", "cambricon-mlu", "ranges", meanings.magicmind_ranges, ("weight.axis=channel",)),
    ("onnxruntime-calibration", "tensorrt", "table", meanings.calibration_json, ()),
    ("onnxruntime-calibration", "tensorrt", "cache", meanings.calibration_cache, ()),
    ("tengine", "axera-ax650", "table", meanings.tengine, ()),
    ("tensorrt", "tensorrt", "table", meanings.tensorrt_cache, ()),
    ("tensorrt", "tensorrt", "dynamic_range", meanings.dynamic_ranges, ()),
]


@pytest.mark.parametrize(
    ("table", "rule", "kind", "meaning", "overrides"),
    WITHOUT_WEIGHTS,
    ids=[f"{f}-{k}" for f, _, k, _, _ in WITHOUT_WEIGHTS],
)
def test_without_weight_scales_weights_are_by_absmax_and_counted(
    table, rule, kind, meaning, overrides, tmp_path
):
    net = convnet()
    _, model = quantized(net, rule, overrides, observer="mse")
    deployment = write_deployment(model, tmp_path, table=table)
    floats = prepare(load_model(deployment.files["model"]))
    plan = make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])
    plan, params = read_table(deployment.files[kind], floats, plan, table=table)
    trained = model.params
    x = {"input": samples(net, 32, seed=5)}
    again = insert_pairs(floats, plan, params, state="calibrated")
    reading = meanings.Reading(onnx.load(deployment.files["model"]))
    meaning(deployment.files[kind].read_bytes(), reading)

    for point in plan.grid_points():
        if point.role == "activation":
            assert params[point.parameters].same_as(trained[point.parameters])
    np.testing.assert_array_equal(
        run_ort(again.to_proto(), x)[0], run_ort(reading.fake_quantized(), x)[0]
    )
    if kind == "table":
        weights = [p for p in plan.grid_points() if p.role == "weight"]
        counts = {p.tensor: differing(model, deployment, reading, p) for p in weights}
        assert deployment.regridded == {name: count for name, count in counts.items() if count}
        names = deployment.left_out["weight scales"]
        assert sorted(names) == sorted(p.tensor for p in weights)


def differing(model, deployment, reading, point):
    """Count the integers that absmax / 127 of the written weight changes, in float32."""
    old = {t.name: t.values for t in model.floats.graph.tensors().values() if hasattr(t, "values")}
    grid = reading.edges[point.consumers[0].node, 1]
    integers = []
    for values, scale in (
        (old[point.tensor], model.params[point.parameters].scale),
        (reading.arrays[point.tensor], np.asarray(grid.scale)),
    ):
        shape = [1] * values.ndim
        if scale.ndim:
            shape[grid.axis] = -1
        levels = np.rint(values / scale.astype(np.float32).reshape(shape))
        integers.append(np.clip(levels, grid.low, grid.high))
    return int((integers[0] != integers[1]).sum())


def test_regridded_weights_are_told(tmp_path, caplog):
    """With the rule's -128 taken by a channel, absmax / 127 is another grid."""
    _, model = quantized(convnet(), "tensorrt", observer="mse")
    with caplog.at_level(logging.INFO):
        deployment = write_deployment(model, tmp_path)

    assert deployment.regridded.keys() == {"w2", "w3", "w4"}
    assert "w2 (3), w3 (2), w4 (7)" in caplog.text
    assert "leaves out 5 weight scales" in caplog.text


def test_axera_model_is_the_trained_one(tmp_path):
    net = convnet()
    _, model = quantized(net, "axera-ax650", observer="mse")
    deployment = write_deployment(model, tmp_path)
    exported = onnx.load(deployment.files["table"])
    onnx.checker.check_model(exported, full_check=True)
    x = {"input": samples(net, 32, seed=5)}
    expected = run_ort(model.to_proto(), x)[0]

    np.testing.assert_array_equal(run_ort(exported, x)[0], expected)
    again = rebuilt(deployment, "axera-ax650", (), "axera")
    np.testing.assert_array_equal(run_ort(again.to_proto(), x)[0], expected)


def test_axera_matmul_weights_stay_float_on_their_grid(tmp_path):
    net = attention()
    _, model = quantized(net, "axera-ax650", observer="mse")
    deployment = write_deployment(model, tmp_path)
    exported = onnx.load(deployment.files["table"])
    arrays = {t.name for t in exported.graph.initializer}
    x = {"input": samples(net, 32, seed=5)}

    assert deployment.left_out["weight scales"] == ("wk", "wq", "wv")
    assert {"wk", "wq", "wv"} <= arrays
    assert "wo/integers" in arrays
    np.testing.assert_array_equal(run_ort(exported, x)[0], run_ort(model.to_proto(), x)[0])


@pytest.mark.parametrize("rule", [r for r in bundled_rules() if r not in INT16])
def test_neutral_table_holds_for_attention_under_every_rule(rule, tmp_path):
    net = attention()
    _, model = quantized(net, rule, observer="mse")
    deployment = write_deployment(model, tmp_path, table="onnxqat")
    x = {"input": samples(net, 32, seed=5)}
    expected = run_ort(model.to_proto(), x)[0]

    found = by_meaning(deployment, "table", meanings.neutral)
    np.testing.assert_array_equal(run_ort(found, x)[0], expected)
    again = rebuilt(deployment, rule, (), "onnxqat")
    np.testing.assert_array_equal(run_ort(again.to_proto(), x)[0], expected)
