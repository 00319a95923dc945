"""Cross-layer equalization: the function stays, and channel ranges become equal."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.preparation.statistics import statistics_of
from onnxqat.repair import SMALL_DB, equalize, unevenness
from onnxqat.repair.channels import find_channels
from onnxqat.repair.difference import Difference
from onnxqat.repair.equalization import _refuse_changes
from onnxqat.repair.relu6 import Replaced
from tests.networks import _Graph, convnet, samples

PADS = {"pads": [1, 1, 1, 1]}


def uneven(model: onnx.ModelProto, *, seed: int = 5) -> onnx.ModelProto:
    """Let the channels of each weight differ by up to 2**8, on both sides."""
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim >= 2 and values.dtype == np.float32:
            spread = [2 ** rng.uniform(-4, 4, n) for n in values.shape[:2]]
            factors = np.multiply.outer(*spread).reshape(
                values.shape[:2] + (1,) * (values.ndim - 2)
            )
            changed = numpy_helper.from_array((values * factors).astype(np.float32), tensor.name)
            tensor.CopyFrom(changed)
    return model


def chain(activation="Relu", **attributes):
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 3, 3), g.weight("b1", 6)], "c1", **PADS)
    slope = [g.weight("slope", 6, 1, 1)] if activation == "PRelu" else []
    g.node(activation, ["c1", *slope], "r1", **attributes)
    g.node("Conv", ["r1", g.weight("w2", 5, 6, 3, 3), g.weight("b2", 5)], "output", **PADS)
    return g.model(["N", 3, 8, 8], ["N", 5, 8, 8])


def depthwise():
    g = _Graph(1)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 1, 1), g.weight("b1", 6)], "c1")
    g.node("LeakyRelu", ["c1"], "r1", alpha=0.1)
    g.node("Conv", ["r1", g.weight("w2", 12, 1, 3, 3), g.weight("b2", 12)], "c2", group=6, **PADS)
    g.node("Relu", ["c2"], "r2")
    g.node("MaxPool", ["r2"], "p2", kernel_shape=[2, 2], strides=[2, 2])
    g.node("Conv", ["p2", g.weight("w3", 4, 12, 1, 1)], "output")
    return g.model(["N", 3, 8, 8], ["N", 4, 4, 4])


def residual():
    g = _Graph(2)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 1, 1), g.weight("b1", 6)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 6, 6, 3, 3), g.weight("b2", 6)], "c2", **PADS)
    g.node("Add", ["c2", "r1"], "a2")
    g.node("Relu", ["a2"], "r2")
    g.node("GlobalAveragePool", ["r2"], "v")
    g.node("Flatten", ["v"], "f")
    g.node("Gemm", ["f", g.weight("w3", 4, 6), g.weight("b3", 4)], "output", transB=1)
    return g.model(["N", 3, 8, 8], ["N", 4])


def shuffled():
    """Concat, channel shuffle, Split, Pad, nearest Resize, a ConvTranspose with groups."""
    g = _Graph(3)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 1, 1), g.weight("b1", 4)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 4, 4, 1, 1), g.weight("b2", 4)], "c2")
    g.node("Concat", ["c2", "r1"], "k", axis=1)
    g.node("Reshape", ["k", g.constant("s1", np.int64([-1, 2, 4, 4, 4]))], "k1")
    g.node("Transpose", ["k1"], "k2", perm=[0, 2, 1, 3, 4])
    g.node("Reshape", ["k2", g.constant("s2", np.int64([-1, 8, 4, 4]))], "k3")
    halves = g.constant("halves", np.int64([4, 4]))
    g.nodes.append(helper.make_node("Split", ["k3", halves], ["d1", "d2"], name="split", axis=1))
    g.node("Pad", ["d1", g.constant("pads", np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], "e1")
    scales = g.constant("scales", np.float32([1, 1, 1.5, 1.5]))
    g.node("Resize", ["d2", "", scales], "e2", mode="nearest")
    g.node("Add", ["e1", "e2"], "a")
    up = {"group": 2, "kernel_shape": [2, 2], "strides": [2, 2]}
    g.node("ConvTranspose", ["a", g.weight("w3", 4, 3, 2, 2), g.weight("b3", 6)], "t", **up)
    g.node("Relu", ["t"], "r3")
    g.node("ReduceMean", ["r3"], "m", axes=[2, 3], keepdims=0)
    g.node("Gemm", ["m", g.weight("w4", 6, 4), g.constant("b4", np.float32(0.5))], "h")
    g.node("Relu", ["h"], "r4")
    g.node("Gemm", ["r4", g.weight("w5", 4, 3)], "output")
    return g.model(["N", 3, 4, 4], ["N", 3])


def products():
    """MatMul with an added bias, a factor, and a row that is not scaled."""
    g = _Graph(4)
    g.node("MatMul", ["input", g.weight("w1", 8, 16)], "m1")
    g.node("Add", ["m1", g.weight("b1", 16)], "a1")
    g.node("Relu", ["a1"], "r1")
    g.node("Mul", ["r1", g.weight("f1", 1, 1, 16)], "u1")
    g.node("MatMul", ["u1", g.weight("w2", 16, 8)], "m2")
    g.node("Sub", [g.weight("b2", 8), "m2"], "a2")
    g.node("Neg", ["a2"], "n2")
    g.node("MatMul", ["n2", g.weight("w3", 8, 4)], "output")
    return g.model(["N", 6, 8], ["N", 6, 4])


NETWORKS = {
    "chain": chain,
    "leaky": lambda: chain("LeakyRelu", alpha=0.2),
    "prelu": lambda: chain("PRelu"),
    "depthwise": depthwise,
    "residual": residual,
    "shuffled": shuffled,
    "products": products,
    "convnet": convnet,
}


def run(model, inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.to_proto().SerializeToString(), options)
    return session.run(None, {"input": inputs})[0]


def weights(model):
    return {name: t.values for name, t in model.graph.tensors().items() if hasattr(t, "values")}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_up_to_rounding(name):
    network = uneven(NETWORKS[name]())
    prepared = prepare(from_proto(network))
    inputs = samples(network, 4)

    result = equalize(prepared)

    expected = run(prepared, inputs)
    assert np.abs(run(result.model, inputs) - expected).max() <= 2e-5 * np.abs(expected).max()
    assert result.layers
    assert any(
        not np.array_equal(v, weights(prepared)[n]) for n, v in weights(result.model).items()
    )


def test_scales_of_a_pair_are_those_of_the_paper():
    prepared = prepare(from_proto(uneven(chain())))
    before = weights(prepared)

    after = weights(equalize(prepared).model)

    r1 = np.abs(before["w1"]).max(axis=(1, 2, 3)).astype(np.float64)
    r2 = np.abs(before["w2"]).max(axis=(0, 2, 3)).astype(np.float64)
    s = np.sqrt(r1 * r2) / r2
    expected = {
        "w1": before["w1"] / s[:, None, None, None],
        "b1": before["b1"] / s,
        "w2": before["w2"] * s[:, None, None],
        "b2": before["b2"],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(after[name], values, rtol=3e-6)  # ranges are in float32


def channel_range(values, axis):
    return np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis))


def ratio(first, second):
    """Return how much the quotient of two ranges differs between channels."""
    quotient = first / second
    return quotient.max() / quotient.min()


def test_ranges_of_a_depthwise_convolution_are_those_on_both_sides_of_it():
    after = weights(equalize(prepare(from_proto(uneven(depthwise())))).model)

    groups = np.abs(after["w2"]).reshape(6, 2, 9).max(axis=(1, 2))
    assert ratio(channel_range(after["w1"], 0), groups) < 1.003
    assert ratio(channel_range(after["w2"], 0), channel_range(after["w3"], 1)) < 1.003


def test_branches_of_a_residual_share_their_scales():
    prepared = prepare(from_proto(uneven(residual())))
    before = weights(prepared)

    after = weights(equalize(prepared).model)

    scale = before["b1"] / after["b1"]
    np.testing.assert_allclose(before["b2"] / after["b2"], scale, rtol=1e-6)
    np.testing.assert_allclose(after["w3"] / before["w3"], np.tile(scale, (4, 1)), rtol=1e-6)
    written = [channel_range(after[name], 0) for name in ("w1", "w2")]
    read = [channel_range(after[name], 1) for name in ("w2", "w3")]
    together = [np.max([r / r.max() for r in ranges], axis=0) for ranges in (written, read)]
    assert ratio(*together) < 1.003


def test_a_channel_without_weights_keeps_its_scale():
    network = uneven(chain())
    dead = next(t for t in network.graph.initializer if t.name == "w1")
    values = numpy_helper.to_array(dead).copy()
    values[2] *= 1e-9
    dead.CopyFrom(numpy_helper.from_array(values, "w1"))
    prepared = prepare(from_proto(network))

    after = weights(equalize(prepared).model)

    assert after["b1"][2] == weights(prepared)["b1"][2]
    np.testing.assert_array_equal(after["w1"][2], values[2])


def test_a_bias_that_two_layers_share_becomes_two():
    g = _Graph(0)
    shared = g.weight("b", 6)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 1, 1), shared], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 6, 6, 1, 1), shared], "output")
    prepared = prepare(from_proto(uneven(g.model(["N", 3, 8, 8], ["N", 6, 8, 8]))))

    before, after = weights(prepared), weights(equalize(prepared).model)

    np.testing.assert_array_equal(after["b"], before["b"])
    scale = (before["w1"] / after["w1"])[:, 0, 0, 0]
    np.testing.assert_allclose(after["n_c1.bias"], before["b"] / scale, rtol=1e-6)


@pytest.mark.parametrize("activation", ["Sigmoid", "Softplus", "Clip"])
def test_what_is_not_homogeneous_is_left_alone_and_says_why(activation):
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 1, 1), g.weight("b1", 6)], "c1")
    limits = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    g.node(activation, ["c1", *(limits if activation == "Clip" else [])], "r1")
    g.node("Conv", ["r1", g.weight("w2", 5, 6, 1, 1), g.weight("b2", 5)], "output")
    prepared = prepare(from_proto(uneven(g.model(["N", 3, 8, 8], ["N", 5, 8, 8]))))

    result = equalize(prepared)

    assert result.layers == ()
    assert [skip.node for skip in result.skips] == ["n_c1", "n_output"]
    assert f"'n_r1' ({activation}) reads it" in result.skips[0].reason
    assert "'output' is an output of the model" in result.skips[1].reason
    for name, values in weights(result.model).items():
        np.testing.assert_array_equal(values, weights(prepared)[name])


def test_a_weight_with_two_readers_is_left_alone():
    network = chain()
    network.graph.node[2].input[1] = "w3"
    extra = helper.make_node("Conv", ["r1", "w3"], ["other"], name="n_other", **PADS)
    network.graph.node.append(extra)
    network.graph.initializer.append(
        numpy_helper.from_array(np.ones((5, 6, 3, 3), np.float32), "w3")
    )
    network.graph.output.append(
        helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, ["N", 5, 8, 8])
    )

    result = equalize(prepare(from_proto(network)))

    assert result.layers == ()
    assert "other nodes also read the weight" in result.skips[0].reason


def test_channels_that_are_mixed_with_positions_are_left_alone():
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 1, 1)], "c1")
    g.node("Reshape", ["c1", g.constant("s", np.int64([0, 16, 2, 2]))], "k")
    g.node("Conv", ["k", g.weight("w2", 5, 16, 1, 1)], "output")
    network = uneven(g.model(["N", 3, 4, 4], ["N", 5, 2, 2]))
    prepared = prepare(from_proto(network))

    result = equalize(prepared)

    # 16 channels behind the Reshape are 4 rows of each of the 4 channels before it
    before, after = weights(prepared), weights(result.model)
    scale = (before["w1"] / after["w1"])[:, 0, 0, 0]
    read = (after["w2"] / before["w2"])[0, :, 0, 0]
    np.testing.assert_allclose(read, np.repeat(scale, 4), rtol=1e-6)


def test_relu6_is_replaced_on_request_and_its_cost_is_told():
    network = uneven(convnet())
    prepared = prepare(from_proto(network))
    inputs = 4 * samples(network, 4)

    kept = equalize(prepared, [{"input": inputs}], relu6="keep")
    replaced = equalize(prepared, [{"input": inputs}], relu6="replace")

    assert kept.relu6 == Replaced(kept=("n_r2",))
    assert replaced.relu6.nodes == ("n_r2",)
    assert "Clip" not in {node.op for node in replaced.model.graph.nodes}
    expected = run(prepared, inputs)
    cost = replaced.relu6.cost[0]
    error = np.abs(run(replaced.model, inputs) - expected).max()
    assert cost.max_abs_diff == pytest.approx(error, rel=1e-3)
    assert cost.max_abs_diff > 1e-3 * np.abs(expected).max()
    assert len(replaced.skips) < len(kept.skips)


@pytest.mark.parametrize(("size", "small"), [(1e-3, True), (4.0, False)])
def test_relu6_is_replaced_where_the_outputs_on_the_data_hardly_change(size, small):
    network = uneven(convnet())
    prepared = prepare(from_proto(network))
    feeds = [{"input": np.float32(size) * samples(network, 4)}]

    result = equalize(prepared, feeds)
    without = equalize(prepared)

    assert (result.relu6.cost[0].sqnr_db >= SMALL_DB) == small
    assert (result.relu6.nodes == ("n_r2",)) == small
    assert (result.relu6.kept == ("n_r2",)) == (not small)
    assert ("Clip" in {node.op for node in result.model.graph.nodes}) != small
    assert without.relu6 == Replaced(kept=("n_r2",))


def test_what_is_remembered_of_the_first_normalization_is_scaled_with_its_channels():
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 1, 1)], "c1")
    statistics = {
        "scale": np.linspace(1, 2, 6),
        "shift": np.linspace(-1, 1, 6),
        "mean": np.linspace(0, 1, 6),
        "variance": np.linspace(1, 3, 6),
    }
    names = [g.constant(name, v.astype(np.float32)) for name, v in statistics.items()]
    g.node("BatchNormalization", ["c1", *names], "n1")
    g.node("Relu", ["n1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 4, 6, 1, 1)], "output")
    prepared = prepare(from_proto(uneven(g.model(["N", 3, 8, 8], ["N", 4, 8, 8]))))

    result = equalize(prepared).model

    before, after = statistics_of(prepared), statistics_of(result)
    scale = (weights(result)["w2"] / weights(prepared)["w2"])[0, :, 0, 0]
    np.testing.assert_allclose(before.mean / scale, after.mean, rtol=1e-5)
    np.testing.assert_allclose(before.deviation / scale, after.deviation, rtol=1e-5)


def test_a_change_beyond_rounding_is_refused():
    changed = Difference(output="y", largest=2.0, max_abs_diff=1e-3, sqnr_db=90.0)

    with pytest.raises(ModelError, match="changed the outputs by more than float rounding: 'y'"):
        _refuse_changes([changed], "model.onnx")


def test_uneven_channels_are_named_the_worst_first():
    even, strange = prepare(from_proto(depthwise())), prepare(from_proto(uneven(depthwise())))

    found = unevenness(strange.graph)

    assert unevenness(even.graph) == []
    assert found
    assert found[0].before - found[0].after >= 2
    assert found == sorted(found, key=lambda one: one.after - one.before)


@pytest.mark.parametrize("text", ["y = Conv(x, w)", "y = ConvTranspose(x, w)"])
def test_a_layer_whose_result_has_no_known_shape_is_left_alone(text):
    body = f"""<ir_version: 8, opset_import: ["": 17]> g (float[N,2,4,4] x) => (float[N,2,4,4] z)
        <float[2,2,1,1] w = {{1, 2, 3, 4}}> {{ {text} z = Relu(y) }}"""
    graph = prepare(from_proto(onnx.parser.parse_model(body))).graph
    graph.nodes[0].outputs[0].shape = None

    network = find_channels(graph)
    assert network.layers == []
    assert unevenness(graph) == []


def test_a_layer_that_cannot_take_what_it_reads_shares_no_channels_with_it():
    graph = prepare(from_proto(chain())).graph
    first, second = (node for node in graph.nodes if node.op == "Conv")
    first.inputs[1] = gs.Constant("w", np.ones((2, 3, 1, 1), np.float32))  # of 6 channels before
    first.outputs[0].shape = second.inputs[0].shape = [1, 2, 8, 8]

    _, layer = find_channels(graph).layers
    assert len(np.unique(layer.inputs)) == 6
    assert unevenness(graph) == []


def test_a_product_that_says_another_rank_than_its_data_shares_no_channels_with_it():
    body = """<ir_version: 8, opset_import: ["": 17]> g (float[N,3] x) => (float[N,2] z)
        <float[3,2] a = {1, 2, 3, 4, 5, 6}, float[2,2] b = {1, 2, 3, 4}>
        { y = MatMul(x, a) r = Relu(y) z = MatMul(r, b) }"""
    graph = prepare(from_proto(onnx.parser.parse_model(body))).graph
    graph.nodes[-1].outputs[0].shape = [1, 1, 1, 2]

    first, second = find_channels(graph).layers
    assert not set(second.inputs.flat) & set(first.outputs.flat)


def test_weights_too_large_for_advice_are_not_looked_at(monkeypatch):
    strange = prepare(from_proto(uneven(depthwise())))
    monkeypatch.setattr("onnxqat.repair.equalization.MOST_ELEMENTS", 10)
    monkeypatch.setattr("onnxqat.repair.scales.constant_values", None)  # would be called

    assert unevenness(strange.graph) == []


def test_channels_are_not_followed_through_a_tensor_that_is_very_large():
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 6, 3, 1, 1)], "c1")
    g.node("Tile", ["c1", g.constant("r", np.int64([1, 1, 4000, 4000]))], "t1")
    g.node("GlobalAveragePool", ["t1"], "v1")
    g.node("Conv", ["v1", g.weight("w2", 4, 6, 1, 1)], "output")
    prepared = prepare(from_proto(g.model([1, 3, 8, 8], [1, 4, 1, 1])))

    result = equalize(prepared)

    assert result.layers == ()
    assert "'n_t1' (Tile) reads it" in result.skips[0].reason
