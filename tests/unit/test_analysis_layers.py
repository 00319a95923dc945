"""What layers cost, and what is advised about them."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.analysis import LayerFigures, PointFigures, Variants, analyze, overrides_file
from onnxqat.analysis.advice import advise
from onnxqat.analysis.sensitivity import ranked
from onnxqat.calibration import placeholder_params
from onnxqat.data import Batch
from onnxqat.errors import DataError, ModelError, PlanError, RuleError
from onnxqat.evaluation import evaluate
from onnxqat.model import from_proto
from onnxqat.overrides import overrides_text, parse_override, read_overrides
from onnxqat.plan import make_plan
from onnxqat.qparams import QuantParams
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import attention, convnet, detector, planned, quantized, samples, upsampling
from tests.oracles import run_ort


def batches(x, labels=None, size=8):
    def make():
        for i in range(0, len(x), size):
            part, indices = x[i : i + size], np.arange(len(x))[i : i + size]
            known = None if labels is None else labels[i : i + size]
            yield Batch(inputs={"input": part}, labels=known, indices=indices, size=len(part))

    return make


def points(plan, whole=None):
    """Return what of a plan says where pairs are; the order of readers says nothing.

    Nodes that requantize in the plan ``whole``, and no longer do, pass on what they read.
    """
    there = {p.tensor for p in plan.points}
    behind = {p.tensor: p.consumers for p in whole.points if p.tensor not in there} if whole else {}
    return {
        (p.tensor, p.role, frozenset(e for c in p.consumers for e in behind.get(c.node, (c,))))
        for p in plan.points
    }


def planted(network, bad=None, overrides=(), rule="onnxruntime-cpu"):
    """Return a calibrated model, one of whose weights has steps that are 20 times too large."""
    _, model = quantized(network, rule, overrides)
    params = dict(model.params)
    if bad is not None:
        known = params[bad]
        scale = np.float32(20) * known.scale
        params[bad] = QuantParams(scale=scale, zero_point=known.zero_point)
    return replace(model, params=params)


def plan_of(model, overrides):
    """Return the plan that ``insert`` makes with more overrides."""
    given = [*map(parse_override, model.plan.overrides), *overrides]
    return make_plan(model.floats.graph, load_rule(model.plan.rule), given)


SUPPORTED = ("onnxruntime-cpu", "sophgo-bm1684x", "ascend", "horizon-bernoulli2", "esp32-p4")


@pytest.mark.parametrize("rule", SUPPORTED)
@pytest.mark.parametrize("network", [convnet, attention, upsampling])
def test_variants_have_the_pairs_that_overrides_leave(network, rule):
    floats, plan = planned(network(), rule)
    params = placeholder_params(floats, plan)
    model = insert_pairs(floats, plan, params, state="calibrated")
    variants = Variants(model, load_rule(rule))

    assert len(variants.layers) >= 3
    for layer in variants.layers:
        names = "|".join(layer.nodes)
        without = plan_of(model, [parse_override(f"name:{names}.quantize=false")])
        alone = plan_of(model, [parse_override(f"name:(?!({names})$).*.quantize=false")])

        assert points(variants.left_float([layer]).plan, plan) == points(without)
        assert points(variants.only([layer]).plan, plan) == points(alone)


def test_variants_keep_what_the_model_leaves_float():
    """Overrides of tensors and widths are those of the model's points."""
    overrides = ("weight.bits=4", "tensor:r2.quantize=false", "name:n_c3.quantize=false")
    model = planted(convnet(), overrides=overrides)
    variants = Variants(model, load_rule("onnxruntime-cpu"))
    first = variants.layers[0]
    variant = variants.only([first])

    assert [layer.node for layer in variants.layers] == ["n_c1", "n_c2", "n_c4", "n_output"]
    assert {p.spec.bits for p in variant.plan.points if p.role == "weight"} == {4}
    assert "r2" not in {p.tensor for p in variants.left_float([first]).plan.points}


def test_variants_keep_what_the_user_includes():
    model = planted(convnet(), overrides=("op:MaxPool.quantize=true",), rule="tensorrt")
    given = {p.tensor: set(p.consumers) for p in model.plan.points}
    rule = {p.tensor: set(p.consumers) for p in planned(convnet(), "tensorrt")[1].points}
    more = {name for name, edges in given.items() if not edges <= rule.get(name, set())}
    variants = Variants(model, load_rule("tensorrt"))
    kept = {p.tensor for p in variants.left_float(variants.layers[:1]).plan.points}

    assert more
    assert more <= kept


def test_a_network_of_one_layer_is_all_or_nothing():
    g = [helper.make_node("Gemm", ["input", "w"], ["output"], name="only")]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("input", "output")
    ]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(g, "one", ends[:1], ends[1:], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = planted(proto)
    variants = Variants(model, load_rule("onnxruntime-cpu"))

    assert variants.only(variants.layers).plan == model.plan
    assert variants.left_float(variants.layers).plan.points == ()


def test_a_model_of_another_rule_is_refused():
    model = planted(convnet())

    with pytest.raises(ModelError, match="where rule 'ncnn' leaves it float"):
        Variants(model, load_rule("ncnn"))


@pytest.mark.parametrize("bad", ["w1", "w2", "w3"])
def test_the_layer_that_is_bad_comes_first(bad):
    model = planted(detector(), bad)
    x = samples(detector(), 16)
    found = analyze(model, batches(x), threads=1)
    floats = run_ort(model.floats.to_proto(), {"input": x})[0].astype(np.float64)
    spread = floats.var()

    def cost(quantized):
        outputs = run_ort(quantized.to_proto(), {"input": x})[0]
        return np.mean((outputs - floats) ** 2) / spread

    variants = Variants(model, load_rule("onnxruntime-cpu"))
    assert found.layers[0].layer.weights == (bad,)
    assert found.cost == pytest.approx(cost(model), rel=1e-4)
    for one in found.layers:
        assert one.alone == pytest.approx(cost(variants.only([one.layer])), rel=1e-4)
        assert one.left_float == pytest.approx(cost(variants.left_float([one.layer])), rel=1e-4)
    assert found.sessions == 7
    assert [one.output for one in found.evaluation.outputs] == ["output"]


def test_top1_and_agreement_are_costs_of_classifiers():
    network = convnet()
    model = planted(network, overrides=("weight.bits=2", "activation.bits=3"))
    x = samples(network, 40)
    truth = run_ort(model.floats.to_proto(), {"input": x})[0].argmax(axis=1)
    labels = np.where(np.arange(40) < 8, (truth + 1) % 5, truth)
    ours = run_ort(model.to_proto(), {"input": x})[0].argmax(axis=1)
    by_labels = analyze(model, batches(x, labels), metric="top1", threads=1)
    by_float = analyze(model, batches(x), metric="agreement", threads=1)

    assert by_labels.cost == pytest.approx(0.8 - np.mean(ours == labels), abs=1e-12)
    assert by_float.cost == pytest.approx(1 - np.mean(ours == truth), abs=1e-12)
    assert by_float.cost > 0


@pytest.mark.parametrize(
    ("network", "metric", "said"),
    [(convnet, "top1", "the data have no labels"), (detector, "agreement", "holds classes")],
)
def test_a_metric_that_does_not_fit_is_refused(network, metric, said):
    with pytest.raises(DataError, match=f"--metric {metric}: .*{said}"):
        analyze(planted(network()), batches(samples(network(), 8)), metric=metric, threads=1)


def test_a_model_that_is_not_calibrated_is_refused():
    floats, plan = planned(convnet(), "onnxruntime-cpu")
    params = placeholder_params(floats, plan)
    model = insert_pairs(floats, plan, params, state="uncalibrated")

    with pytest.raises(PlanError, match="is not calibrated"):
        analyze(model, batches(samples(convnet(), 8)))


def test_the_reference_is_the_float_model_that_is_given():
    model = planted(detector())
    x = samples(detector(), 16)
    other = detector(seed=3)
    found = analyze(model, batches(x), against=from_proto(other), threads=1)
    ours = run_ort(model.to_proto(), {"input": x})[0]
    theirs = run_ort(other, {"input": x})[0].astype(np.float64)

    assert found.cost == pytest.approx(np.mean((ours - theirs) ** 2) / theirs.var(), rel=1e-4)
    assert found.points[0].tensor == "w1" or found.points[0].role == "activation"
    assert min(p.sqnr for p in found.points if p.role == "weight") < 3


@pytest.mark.parametrize("bad", ["w2", "w3"])
def test_the_file_that_is_advised_does_what_it_says(bad, tmp_path):
    model = planted(detector(), bad, ("weight.axis=none",))
    x = samples(detector(), 16)
    found = analyze(model, batches(x), threads=1)
    path = tmp_path / "overrides.toml"
    path.write_text(overrides_file(model, found.advice), encoding="utf-8")
    read = read_overrides(path)
    plan = make_plan(model.floats.graph, load_rule("onnxruntime-cpu"), read)
    advised = insert_pairs(model.floats, plan, model.params, state="calibrated")
    result = evaluate(advised, batches(x)(), against=model.floats, threads=1)

    assert [layer.weights for layer in found.advice.layers] == [(bad,)]
    assert read == [parse_override("weight.axis=none"), *found.advice.overrides]
    assert found.advice.cost == result.outputs[0].relative_error ** 2
    assert found.advice.cost < found.cost / 2


def test_nothing_is_advised_where_nothing_is_lost():
    model = planted(detector())
    variants = Variants(model, load_rule("onnxruntime-cpu"))
    layers = [LayerFigures(layer=one, alone=0.0, left_float=0.0) for one in variants.layers]

    assert advise(variants, layers, (), None, cost=0.0).layers == ()


@pytest.mark.parametrize(
    ("alone_float", "others", "count", "left"),
    [
        (1.2, (1.1, 1.3), 0, 1.0),  # none helps
        (0.9, (0.7, 0.8), 2, 0.7),  # the best of those that do not suffice
        (0.9, (0.4, 0.1), 2, 0.4),  # enough
    ],
)
def test_as_many_layers_as_help_are_advised(alone_float, others, count, left):
    variants = Variants(planted(detector()), load_rule("onnxruntime-cpu"))
    layers = [LayerFigures(layer=x, alone=1.0, left_float=alone_float) for x in variants.layers]
    costs = iter(others)
    found = advise(variants, layers, (), lambda _: next(costs), cost=1.0)

    assert found.layers == variants.layers[:count]
    assert (found.cost, len(found.overrides)) == (left, count)
    assert found.tried == (2 if left == 0.4 else 3)


@pytest.mark.parametrize(
    ("rule", "weight", "expected", "after"),
    [
        ("cambricon-mlu-int16", 10, ["name:n_c2.bits=16"], (16, 16)),
        ("axera-ax650", 30, ["tensor:r1.bits=16"], (16, 8)),
        ("axera-ax650", 10, ["name:n_c2|n_r2.quantize=false"], (8, None)),
    ],
)
def test_16_bits_are_advised_where_the_chip_has_them(rule, weight, expected, after):
    """Of weights and activations, or of what a layer reads where that is the worse of the two."""
    model = planted(detector(), rule=rule)
    chip = load_rule(rule)
    variants = Variants(model, chip)
    point = PointFigures(tensor="", role="weight", bits=8, sqnr=0, cosine=1, alone_sqnr=20,
                         alone_cosine=1, clipped=0, outlier=1, channels=None,
                         dead_channels=None, clipping_range=(-1, 1), values=(-1, 1), scales=1,
                         histogram=None)  # fmt: skip
    points = [replace(point, tensor=p.tensor) for p in model.plan.grid_points()]
    points = [replace(p, alone_sqnr=weight) if p.tensor == "w2" else p for p in points]
    layer = next(one for one in variants.layers if one.node == "n_c2")
    figures = [LayerFigures(layer=layer, alone=1.0, left_float=0.1)]
    found = advise(variants, figures, points, None, cost=1.0)

    assert [str(o) for o in found.overrides] == expected
    bits = {p.tensor: p.spec.bits for p in plan_of(model, found.overrides).points}
    assert (bits["r1"], bits.get("w2")) == after


def test_an_advised_override_can_lie_in_a_file_with_one_of_its_name():
    given = ("name:n_c2.bits=8", "first.bits=16")
    model = planted(detector(), rule="cambricon-mlu-int16", overrides=given[:1])
    model = replace(model, plan=msgspec.structs.replace(model.plan, overrides=given))
    variants = Variants(model, load_rule("cambricon-mlu-int16"))
    figures = [LayerFigures(layer=variants.layers[1], alone=1.0, left_float=0.1)]
    advice = advise(variants, figures, (), None, cost=1.0)

    assert [str(o) for o in advice.overrides] == ["name:(?:n_c2).bits=16"]
    assert overrides_file(model, advice) == (
        '["name:n_c2"]\nbits = 8\n\n["first"]\nbits = 16\n\n["name:(?:n_c2)"]\nbits = 16\n'
    )


def test_layers_without_a_number_come_first():
    variants = Variants(planted(detector()), load_rule("onnxruntime-cpu"))
    first, second, third = variants.layers
    costs = {first: (1.0, 3.0), second: (math.nan, 0.0), third: (2.0, 3.0)}
    found = ranked([LayerFigures(layer=k, alone=a, left_float=b) for k, (a, b) in costs.items()])

    assert [one.layer for one in found] == [second, third, first]


def test_overrides_are_written_as_they_are_read(tmp_path):
    texts = [
        "weight.bits=4",
        "weight.axis=none",
        r'name:a\.b"c\ \x7f.*|größe.quantize=false',
        "tensor:x=y.bits=16",
        "op:Conv.spec=weight",
        "activation.min_range=1e-06",
    ]
    given = [parse_override(text) for text in texts]
    path = tmp_path / "overrides.toml"
    path.write_text(overrides_text(given), encoding="utf-8")

    assert read_overrides(path) == given


def test_overrides_of_one_selector_come_together_where_their_order_is_free():
    texts = ("weight.bits=4", "activation.bits=8", "weight.axis=none", "weight.bits=2")

    with pytest.raises(RuleError, match="an overrides file cannot contain 'weight' twice"):
        overrides_text([parse_override(text) for text in texts])
    assert overrides_text([parse_override(text) for text in texts[:3]]) == (
        '["weight"]\nbits = 4\naxis = "none"\n\n["activation"]\nbits = 8\n'
    )
    with pytest.raises(RuleError, match="an overrides file cannot contain 'weight' twice"):
        overrides_text([parse_override(t) for t in (*texts[:2], "weight.spec=weight")])
