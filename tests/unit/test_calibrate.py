from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxqat.calibration import OBSERVERS, calibrate, placeholder_params
from onnxqat.deploy import deployed_model
from onnxqat.errors import DataError, ModelError
from onnxqat.model import from_proto
from onnxqat.parallel import Workers
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.qparams import choose_qparams
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import convnet, joined_to_a_constant, quantized, samples
from tests.oracles import run_ort

RULE = "sophgo-bm1684x"


def uncalibrated(network, rule=RULE):
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule(rule))
    return insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")


def test_minmax_scales_are_those_of_the_extremes():
    """Against the float model's own tensors, fetched with plain onnxruntime."""
    network = convnet()
    _, qdq = quantized(network)
    watched = prepare(from_proto(network)).to_proto()
    del watched.graph.output[:]
    for name in ("r1", "c3"):
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    runs = [run_ort(watched, {"input": samples(network, 16, seed=s)}) for s in range(2)]
    params = qdq.params
    largest_r1 = max(r[0].max() for r in runs)
    largest_c3 = max(np.abs(r[1]).max() for r in runs)

    assert params["r1"].scale == np.float32(largest_r1) / np.float32(255)
    assert params["r1"].zero_point.dtype == np.uint8
    assert params["c3"].scale == np.float32(largest_c3) / np.float32(127)
    assert params["c3"].zero_point.dtype == np.int8


def test_group_takes_the_range_of_all_its_tensors():
    network = convnet()
    _, qdq = quantized(network)
    watched = prepare(from_proto(network)).to_proto()
    del watched.graph.output[:]
    for name in ("r3", "c4"):
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    runs = [run_ort(watched, {"input": samples(network, 16, seed=s)}) for s in range(2)]
    largest = max(np.abs(a).max() for r in runs for a in r)

    assert qdq.params["r3"].scale == np.float32(largest) / np.float32(127)


def test_signedness_is_settled_and_stored():
    _, qdq = quantized(convnet())

    assert {p.spec.signedness for p in qdq.plan.grid_points()} == {"signed", "unsigned"}
    assert qdq.state == "calibrated"


class WaitingError(Exception):
    """A process but the first waits for what the first makes."""


class Shared(Workers):
    """One of several processes that run one after the other, the first last."""

    def __init__(self, rank, size, sent):
        self.rank, self.size, self.sent = rank, size, sent

    def gather(self, value):
        self.sent[self.rank].append(value)
        index = len(self.sent[self.rank]) - 1
        return [] if self.rank else [sent[index] for sent in self.sent]

    def first(self, make):
        if self.rank:
            raise WaitingError
        return make()


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_with_their_share_measure_what_one_does(observer, size):
    """Also a constant that shares its parameters with an activation, which each of them holds."""
    model = uncalibrated(joined_to_a_constant())
    batches = [{"input": samples(joined_to_a_constant(), 4, seed=s) * (s + 1)} for s in range(5)]
    sent = [[] for _ in range(size)]
    for rank in range(size - 1, 0, -1):
        workers = Shared(rank, size, sent)
        with pytest.raises(WaitingError):
            calibrate(model, batches[workers.share(5)], observer=observer, workers=workers)
    first = Shared(0, size, sent)
    found = calibrate(model, batches[first.share(5)], observer=observer, workers=first)
    expected = calibrate(model, batches, observer=observer)

    assert any(p.role == "weight" and p.group for p in model.plan.grid_points())
    assert found.to_proto() == expected.to_proto()


def test_points_have_observers_of_their_own():
    """Each scale is the one that a run with that observer for all of them gives."""
    network = convnet()
    narrow = ("weight.bits=4",)
    mixed = (*narrow, "tensor:r1.observer=percentile", "tensor:c3.observer=moving-average")
    _, found = quantized(network, overrides=(*mixed, "weight.observer=mse"), observer="minmax")
    runs = {
        observer: quantized(network, overrides=narrow, observer=observer)[1].params
        for observer in ("minmax", "percentile", "moving-average", "mse")
    }
    expected = {"r1": "percentile", "c3": "moving-average"}

    assert not runs["percentile"]["r1"].same_as(runs["minmax"]["r1"])
    assert not runs["moving-average"]["c3"].same_as(runs["minmax"]["c3"])
    assert not runs["mse"]["w1"].same_as(runs["minmax"]["w1"])
    for point in found.plan.grid_points():
        chosen = "mse" if point.role == "weight" else "minmax"
        observer = expected.get(point.tensor, chosen)
        assert found.params[point.parameters].same_as(runs[observer][point.parameters])


def test_weights_take_the_least_error_with_auto_too():
    network = convnet()
    auto, mse, minmax = (
        quantized(network, overrides=("weight.bits=4",), observer=name)[1].params
        for name in ("auto", "mse", "minmax")
    )

    assert auto["w1"].same_as(mse["w1"])
    assert not auto["w1"].same_as(minmax["w1"])


def test_batches_are_read_one_at_a_time():
    network = convnet()
    alive = []

    def batches():
        for seed in range(4):
            batch = {"input": samples(network, 4, seed=seed)}
            alive.append(seed)
            yield batch

    steps = []
    calibrate(uncalibrated(network), batches(), progress=lambda: steps.append(len(alive)))

    assert steps == [1, 2, 3, 4]  # each was used before the next was made


def test_calibrating_changes_nothing_given():
    network = convnet()
    model = uncalibrated(network)
    before = model.to_proto().SerializeToString(deterministic=True)
    calibrate(model, [{"input": samples(network, 4)}])

    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_no_data_and_bad_data_are_errors():
    model = uncalibrated(convnet())
    with pytest.raises(DataError):
        calibrate(model, [])
    x = samples(convnet(), 4)
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="nan"):
        calibrate(model, [{"input": x}])


def test_fine_tuned_model_is_not_calibrated_again():
    _, qdq = quantized(convnet())
    tuned = qdq.with_params(qdq.params, state="finetuned")
    with pytest.raises(ModelError, match="is fine-tuned"):
        calibrate(tuned, [])


def bias_levels(qdq, bias="b1", x="input", w="w1"):
    """Return the integers of a bias before they are rounded, in float64."""
    params, values = qdq.params, qdq.floats.graph.tensors()[bias].values
    return values / (params[x].scale.astype(np.float64) * params[w].scale)


def with_weight(network, name, change):
    """Return a network one weight of which is changed."""
    (stored,) = (t for t in network.graph.initializer if t.name == name)
    values = numpy_helper.to_array(stored)
    stored.CopyFrom(numpy_helper.from_array(change(values).astype(np.float32), name))
    return network


@pytest.mark.parametrize("size", [0, 1e-25, 1e-8])
def test_scale_of_a_dead_channel_is_raised_so_that_its_bias_fits(size):
    """And no other scale; the channel was folded to almost nothing, its bias was not."""
    dead = np.array([1, 1, size, 1, 1, 1]).reshape(-1, 1, 1, 1)
    _, plain = quantized(convnet(), "onnxruntime-cpu")
    _, qdq = quantized(with_weight(convnet(), "w1", lambda w: w * dead), "onnxruntime-cpu")
    found, expected = (np.delete(m.params["w1"].scale, 2) for m in (qdq, plain))

    assert [p.tensor for p in qdq.plan.points if p.role == "bias"] == ["b1", "b2", "b4", "b5"]
    assert np.abs(bias_levels(qdq)).max() <= 2**30 * (1 + 2**-20)
    np.testing.assert_array_equal(found, expected)


# sophgo-bm1684x and qnn-htp have a floor below their scales, esp32 has powers of two and 20 bits
BIAS_RULES = ["onnxruntime-cpu", "tflite", "esp32-p4", "esp32-s3", "horizon-bayes", "qnn-htp", RULE]


@pytest.mark.parametrize("rule", BIAS_RULES)
@pytest.mark.parametrize("high", [0.0, 1e-30, 1e-6])
def test_a_range_of_almost_nothing_leaves_the_weights_as_they_are(rule, high, caplog):
    """The bias stays float instead: no int32 of the tiny scale holds it."""
    model = uncalibrated(convnet(), rule)
    weights = {p.parameters for p in model.plan.points if p.role == "weight"}
    ordinary = calibrate(model, [{"input": samples(convnet(), 4)}], observer="minmax")
    caplog.clear()
    tiny = np.linspace(0, high, 4 * 3 * 8 * 8, dtype=np.float32).reshape(4, 3, 8, 8)
    found = calibrate(model, [{"input": tiny}], observer="minmax")
    expected, params = ordinary.params, found.params

    assert weights
    assert all(params[name].same_as(expected[name]) for name in weights)
    if "b1" in {p.tensor for p in found.plan.points}:
        assert np.abs(bias_levels(found)).max() < 2**31
    else:
        assert "'b1' of 'n_c1'" in caplog.text
    assert ("'input' (0)" in caplog.text) == (high == 0)
    deployed = deployed_model(found, weights="snapped").graph.tensors()
    for name in ("w1", "w2", "w3", "w4", "w5"):
        assert snr(found.floats.graph.tensors()[name].values, deployed[name].values) >= 35


def snr(exact, found):
    """Return the ratio of signal to noise in decibel."""
    noise = np.sum(np.square(np.subtract(exact, found, dtype=np.float64)))
    return 10 * np.log10(np.sum(np.square(exact, dtype=np.float64)) / noise)


def test_every_constant_activation_is_named_and_no_other(caplog):
    """Also one that shares its parameters, and the constant of a worker with other data."""
    x = np.zeros((4, 3, 8, 8), np.float32)
    x[:] = 0.5
    calibrate(uncalibrated(convnet()), [{"input": x}, {"input": x}])
    assert (
        "1 activations had only one value in all of the calibration data: 'input' (0.5)"
        in caplog.text
    )
    caplog.clear()
    calibrate(uncalibrated(convnet()), [{"input": x}, {"input": 2 * x}])

    assert "one value" not in caplog.text


def test_placeholders_are_valid_and_weights_are_real():
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    params = placeholder_params(floats, plan)
    weight = floats.graph.tensors()["w1"].values
    spec = next(p.spec for p in plan.points if p.tensor == "w1")
    expected = choose_qparams(weight.min(axis=(1, 2, 3)), weight.max(axis=(1, 2, 3)), spec)

    assert params["w1"].same_as(expected)
    assert params["r1"].scale > 0


def test_a_dead_channel_is_raised_for_the_biases_of_every_group():
    """Of a ConvTranspose, whose groups share their scales: that of channel 0 is for 0 and 3."""
    network = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N,4,5,5] input) => (float[N,6,5,5] y)
        <float[6] b = {0, 0, 0, 5, 0, 0}> { y = ConvTranspose<group = 2>(input, w, b) }"""
    )
    weight = np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)
    weight[:, 0] = 0
    network.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    _, model = quantized(network)
    scales = model.params["w"].scale * model.params["input"].scale

    assert 5 / scales[0] < 2**31
    assert [p.tensor for p in model.plan.points if p.role == "bias"] == ["b"]


def test_a_small_channel_that_counts_keeps_its_scale():
    """Its bias does not fit, and stays float: a coarser grid would round its weights away."""
    small = np.array([1, 1, 2**-10, 1, 1, 1]).reshape(-1, 1, 1, 1)
    network = with_weight(convnet(), "w1", lambda w: (w * small).astype(np.float32))
    network = with_weight(network, "b1", lambda b: b * np.float32(1e4))
    _, plain = quantized(with_weight(convnet(), "w1", lambda w: (w * small).astype(np.float32)))
    _, model = quantized(network)

    np.testing.assert_array_equal(model.params["w1"].scale, plain.params["w1"].scale)
    assert "b1" not in {p.tensor for p in model.plan.points if p.role == "bias"}


def test_a_weight_without_finite_values_is_named():
    model = prepare(from_proto(convnet()))
    plan = make_plan(model.graph, load_rule("sophgo-bm1684x"))
    name = next(p.tensor for p in plan.points if p.role == "weight")
    model.graph.tensors()[name].values[0] = np.nan
    with pytest.raises(DataError, match=f"'{name}': Weight contains NaN"):
        placeholder_params(model, plan)
