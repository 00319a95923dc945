"""Figures of points against plain numpy over all data at once."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxqat.analysis import compare_points
from onnxqat.analysis.biases import look_at_biases
from onnxqat.analysis.channels import ChannelRanges, channels_of
from onnxqat.analysis.histogram import LevelCounts
from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.data import Batch
from onnxqat.errors import DataError, ModelError
from onnxqat.evaluation.similarity import Similarity, decibels
from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.qparams import QuantParams
from onnxqat.quantized import insert_pairs
from tests.networks import attention, convnet, joined_to_a_constant, planned, quantized, samples
from tests.oracles import run_ort

CLOSE = 1e-12  # relative, of sums in another order


def batches(x, size=5):
    for i in range(0, len(x), size):
        part = x[i : i + size]
        yield Batch(inputs={"input": part}, labels=None, indices=np.arange(len(part)),
                    size=len(part))  # fmt: skip


def everything(proto, x):
    """Return all tensors of a model by name, as onnxruntime computes them unfused."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    outputs = {value.name for value in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name]
    extra = [name for name in names if name not in outputs]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    order = [value.name for value in proto.graph.output]
    found = dict(zip(order, run_ort(proto, {"input": x}), strict=True))
    found |= {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return {**found, "input": x}


def plain(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    noise = np.sum((x - y) ** 2)
    sqnr = math.inf if noise == 0 else 10 * np.log10(np.sum(x**2) / noise)
    return sqnr, np.sum(x * y) / np.sqrt(np.sum(x**2) * np.sum(y**2))


def rounded(x, params, point):
    """Return the values on the grid, which of them the range cuts off, and their integers."""
    spec, shape = point.spec, [1] * x.ndim
    if spec.axis is not None:
        shape[spec.axis] = -1
    scale, zero = params.scale.reshape(shape), params.zero_point.astype(float).reshape(shape)
    low = -(2 ** (spec.bits - 1)) if params.signed else 0
    high = low + 2**spec.bits - 1
    low += params.signed and spec.narrow_range
    levels = np.rint(x / scale) + zero
    cut = np.clip(levels, low, high)
    return (np.float32(cut - zero) * scale).astype(np.float32), cut != levels, levels


@pytest.mark.parametrize(
    ("network", "rule", "overrides"),
    [
        (convnet, "sophgo-bm1684x", ()),
        (convnet, "onnxruntime-cpu", ("weight.bits=4", "activation.bits=4")),
        (attention, "openvino", ()),
        (joined_to_a_constant, "esp32-p4", ()),
    ],
)
def test_figures_are_those_of_numpy_over_all_data(network, rule, overrides):
    size = 4 if network is joined_to_a_constant else 5
    floats, model = quantized(network(), rule, overrides) if size == 5 else of_batches(network())
    x = 2 * samples(network(), 3 * size, seed=9)  # wider than what calibration saw
    found = {p.tensor: p for p in compare_points(model, batches(x, size), floats=floats, threads=1)}
    parts = [everything(floats.to_proto(), x[i : i + size]) for i in range(0, len(x), size)]
    others = [everything(model.to_proto(), x[i : i + size]) for i in range(0, len(x), size)]
    outputs = {t.name for t in floats.graph.outputs}
    constants = {t.name for t in floats.to_proto().graph.initializer}

    assert found.keys() == {p.tensor for p in model.plan.grid_points()}
    for point in model.plan.grid_points():
        one, params = found[point.tensor], model.params[point.parameters]
        once = slice(1) if point.tensor in constants else slice(None)
        name = point.tensor if point.tensor in outputs else f"{point.tensor}/dequantized"
        expected = np.concatenate([p[point.tensor].reshape(-1) for p in parts[once]])
        actual = np.concatenate([p[name].reshape(-1) for p in others[once]])
        grids = [rounded(p[point.tensor], params, point) for p in parts[once]]
        alone = np.concatenate([grid.reshape(-1) for grid, _, _ in grids])
        wide = expected.astype(np.float64)

        assert (one.sqnr, one.cosine) == pytest.approx(plain(expected, actual), rel=CLOSE)
        assert (one.alone_sqnr, one.alone_cosine) == pytest.approx(
            plain(expected, alone), rel=CLOSE
        )
        assert one.clipped == np.mean(np.concatenate([cut.reshape(-1) for _, cut, _ in grids]))
        assert one.outlier == pytest.approx(
            np.abs(wide).max() / np.sqrt(np.mean(wide**2)), rel=CLOSE
        )
        assert (one.role, one.bits) == (point.role, point.spec.bits)
        assert one.values == (expected.min(), expected.max())
        levels = np.concatenate([whole.reshape(-1) for _, _, whole in grids])
        assert_counted(one.histogram, levels.astype(np.float64))
        ends = [
            [rounded(np.float32(far), grid, per_tensor(point))[0] for grid in each(params)]
            for far in (-1e30, 1e30)
        ]
        assert one.clipping_range == (min(ends[0]), max(ends[1]))
        assert one.scales == params.scale.size
    assert max(p.clipped for p in found.values()) > 0.01


def each(params):
    """Yield the parameters of each channel."""
    for scale, zero_point in zip(
        params.scale.reshape(-1), params.zero_point.reshape(-1), strict=True
    ):
        yield QuantParams(scale=scale, zero_point=zero_point)


def per_tensor(point):
    return msgspec.structs.replace(point, spec=msgspec.structs.replace(point.spec, axis=None))


def assert_counted(histogram, levels):
    """Hold a histogram to numpy's, whose outermost bins reach to infinity."""
    edges = histogram.first + histogram.width * np.arange(len(histogram.counts) + 1.0) - 0.5
    edges[[0, -1]] = -np.inf, np.inf
    finite = np.clip(levels, -1e38, 1e38)
    counts = [np.count_nonzero((finite > a) & (finite < b)) for a, b in pairwise(edges)]

    assert list(histogram.counts) == counts
    assert sum(counts) == levels.size
    inside = (histogram.qmax - histogram.qmin + 1) / histogram.width
    assert histogram.first == histogram.qmin - 8 * histogram.width
    assert len(histogram.counts) == math.ceil(inside) + 16
    assert inside <= 32


@pytest.mark.parametrize(("low", "high"), [(-127, 127), (0, 255), (-2, 1), (-32768, 32767)])
def test_histograms_take_any_levels(low, high):
    counts, rng = LevelCounts(low, high), np.random.default_rng(0)
    parts = [np.rint(rng.normal(0, spread, (7, 9))).astype(np.float32)
             for spread in (1, high, 1e30)]  # fmt: skip
    parts.append(np.float32([np.inf, -np.inf, low, high, low - 1, high + 1]))
    for part in parts:
        counts.add(part)
    counts.add(np.float32([np.nan]))

    assert_counted(counts.result(), np.concatenate([part.reshape(-1) for part in parts]))


def of_batches(network):
    """Return a model whose batches are of 4."""
    floats, plan = planned(network, "esp32-p4")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return floats, calibrate(empty, [{"input": samples(network, 4)}], observer="minmax")


def test_samples_that_fill_a_batch_do_not_count():
    _, model = of_batches(joined_to_a_constant())
    x = samples(joined_to_a_constant(), 4)
    filled = np.concatenate([x[:3], x[:1]])
    one = Batch(inputs={"input": filled}, labels=None, indices=np.arange(3), size=4)
    found = {p.tensor: p for p in compare_points(model, [one], floats=model.floats, threads=1)}
    tensors = everything(model.floats.to_proto(), filled)
    others = everything(model.to_proto(), filled)

    assert found["r1"].sqnr == pytest.approx(
        plain(tensors["r1"][:3], others["r1/dequantized"][:3])[0], rel=CLOSE
    )


def with_weights(network, changes):
    for tensor in network.graph.initializer:
        if tensor.name in changes:
            values = changes[tensor.name](numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return network


def test_dead_channels_are_counted():
    def without(channel):
        def change(values):
            values = np.array(values)
            values[channel] = 0
            return values

        return change

    network = with_weights(convnet(), {"w1": without(2), "b1": without(2), "w3": without(1)})
    _, model = quantized(network, "sophgo-bm1684x")
    x = samples(network, 10)
    found = {p.tensor: p for p in compare_points(model, batches(x), floats=model.floats, threads=1)}

    assert (found["w1"].channels, found["w1"].dead_channels) == (6, 1)
    assert (found["w2"].channels, found["w2"].dead_channels) == (6, 0)
    assert found["w3"].dead_channels == 1
    assert (found["r1"].channels, found["r1"].dead_channels) == (6, 1)
    assert (found["input"].channels, found["input"].dead_channels) == (3, 0)


def test_channels_are_followed_over_all_parts():
    """Of values 0 and 2, 1 and 1, 0 and 0, -1 and 0: two hold one value, one only zeros."""
    ranges = ChannelRanges(1)
    for part in ([[0, 1, 0, -1]], [[2, 1, 0, 0]]):
        ranges.add(np.float32(part))

    assert (ranges.count, ranges.constant, ranges.zeros) == (4, 2, 1)
    ranges.add(np.zeros((1, 3), np.float32))
    assert (ranges.count, ranges.constant, ranges.zeros) == (None, None, None)


def test_a_weight_channel_of_one_value_is_not_dead():
    def change(values):
        return np.where(np.arange(6).reshape(6, 1, 1, 1) == 2, np.float32(0.5), values)

    _, model = quantized(with_weights(convnet(), {"w1": change}), "sophgo-bm1684x")
    x = samples(convnet(), 5)
    found = {p.tensor: p for p in compare_points(model, batches(x), floats=model.floats, threads=1)}

    assert found["w1"].dead_channels == 0


def test_channels_of_transformers_are_the_last_axis():
    _, model = quantized(attention(), "openvino")
    axes = {p.tensor: channels_of(model.floats.graph, p) for p in model.plan.grid_points()}

    assert {axes[name] for name in ("input", "s2", "v")} == {2}
    assert axes["p"] == axes["wq"] == 1


def test_another_float_model_is_the_reference():
    network = convnet()
    floats, model = quantized(network, "sophgo-bm1684x")
    other = from_proto(with_weights(convnet(), {"w3": lambda v: v + np.float32(0.01)}))
    x = samples(network, 10)
    found = {
        p.tensor: p for p in compare_points(model, batches(x), floats=prepare(other), threads=1)
    }
    values = numpy_helper.to_array(
        next(t for t in other.to_proto().graph.initializer if t.name == "w3")
    )
    point = next(p for p in model.plan.points if p.tensor == "w3")
    params = model.params["w3"]
    ours = next(t for t in floats.to_proto().graph.initializer if t.name == "w3")

    assert found["w3"].sqnr == pytest.approx(
        plain(values, rounded(numpy_helper.to_array(ours), params, point)[0])[0], rel=CLOSE
    )
    assert found["w3"].alone_sqnr == pytest.approx(
        plain(values, rounded(values, params, point)[0])[0], rel=CLOSE
    )


def test_a_float_model_without_the_tensors_is_refused():
    _, model = quantized(convnet(), "sophgo-bm1684x")
    other, _ = quantized(attention(), "sophgo-bm1684x")

    with pytest.raises(ModelError, match="lacks the quantized tensor"):
        compare_points(model, batches(samples(convnet(), 5)), floats=other)


def test_no_samples_are_refused():
    _, model = quantized(convnet(), "sophgo-bm1684x")

    with pytest.raises(DataError, match="There are no samples to analyze"):
        compare_points(model, [], floats=model.floats)


def test_memory_is_that_of_one_batch_whatever_the_number():
    _, model = quantized(convnet(), "sophgo-bm1684x")
    x = samples(convnet(), 20)

    def peak(count):
        tracemalloc.start()
        compare_points(model, (b for _ in range(count) for b in batches(x, 20)),
                       floats=model.floats, threads=1)  # fmt: skip
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1)
    assert peak(12) < 1.5 * peak(2)


@pytest.mark.parametrize("small", [False, True])
def test_biases_that_leave_their_integers_are_counted(small):
    _, model = quantized(convnet(), "sophgo-bm1684x")
    x, w = model.params["r1"], model.params["w2"]
    scale = np.array(2**-40 / w.scale.max() if small else x.scale, np.float32)
    tiny = QuantParams(scale=scale, zero_point=x.zero_point)
    changed = replace(model, params={**model.params, "r1": tiny})
    found = {b.tensor: b for b in look_at_biases(changed)}["b2"]
    bias = model.floats.graph.tensors()["b2"].values.astype(float)
    step = float(changed.params["r1"].scale) * w.scale.astype(float)
    levels = np.rint(bias / step)
    cut = np.clip(levels, -(2**31), 2**31 - 1)

    assert (found.values, found.bits, found.node) == (6, 32, "n_c2")
    assert found.saturated == np.count_nonzero(cut != levels)
    assert (found.saturated > 0) == small
    assert found.sqnr == pytest.approx(plain(bias, cut * step)[0], rel=1e-9)


def test_equal_signals_have_no_noise():
    one = Similarity()
    one.add(np.zeros(3, np.float32), np.zeros(3, np.float32))

    assert (one.sqnr, one.cosine) == (math.inf, 1.0)
    one.add(np.zeros(3, np.float32), np.ones(3, np.float32))
    assert one.sqnr == -math.inf
    assert math.isnan(one.cosine)
    assert decibels(1000.0) == pytest.approx(30)
