from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import FormatError
from onnxqat.formats.onnxruntime_qdq import integer_model, quantize_bias
from onnxqat.qparams import quantize
from onnxqat.quantized import insert_pairs
from tests.networks import W4A4, convnet, planned, quantized, samples
from tests.oracles import run_ort


def optimized(model: onnx.ModelProto, path) -> onnx.ModelProto:
    """Return what onnxruntime's own optimizer makes of a model at level 2."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def test_every_heavy_node_becomes_an_integer_kernel(tmp_path):
    _, qdq = quantized(convnet(), "onnxruntime-cpu")
    found = Counter(
        n.op_type for n in optimized(integer_model(qdq).to_proto(), tmp_path / "o.onnx").graph.node
    )

    assert found["QLinearConv"] == 4
    assert found["QGemm"] == 1
    assert found["QLinearAdd"] == 1
    assert found["QLinearAveragePool"] == 1
    assert found["QLinearGlobalAveragePool"] == 1
    assert found["QLinearConcat"] == 1
    assert not found.keys() & {"Conv", "Gemm", "Add", "AveragePool", "GlobalAveragePool", "Relu"}


@pytest.mark.parametrize("rule", ["onnxruntime-cpu", "sophgo-bm1684x"])
@pytest.mark.parametrize("overrides", [(), W4A4], ids=["w8a8", "w4a4"])
def test_integers_are_those_of_the_working_model(rule, overrides):
    network = convnet()
    _, qdq = quantized(network, rule, overrides)
    exported = integer_model(qdq).to_proto()
    onnx.checker.check_model(exported, full_check=True)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in exported.graph.initializer}
    params, plan = qdq.params, qdq.plan
    weights = {
        t.name: t.values for t in qdq.floats.graph.tensors().values() if hasattr(t, "values")
    }
    for point in (p for p in plan.points if p.role == "weight"):
        expected = quantize(weights[point.tensor], params[point.parameters], point.spec)

        np.testing.assert_array_equal(arrays[f"{point.tensor}/integers"], expected)
        assert point.tensor not in arrays
    bias, s_x, s_w = weights["b1"], params["input"].scale, params["w1"].scale

    np.testing.assert_array_equal(
        arrays["n_c1/bias/integers"], np.rint(bias / (s_x * s_w).astype(np.float64))
    )


def test_first_layer_is_within_one_level_of_the_working_model():
    """On the same input they differ by the rounding of the bias only."""
    network = convnet()
    _, qdq = quantized(network, "onnxruntime-cpu")
    scale = qdq.params["r1"].scale
    found = []
    for model in (qdq, integer_model(qdq)):
        proto = model.to_proto()
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info("r1/dequantized", 1, None))
        found.append(run_ort(proto, {"input": samples(network, 64, seed=4)})[0])
    levels = np.rint((found[0] - found[1]) / scale)

    assert np.abs(levels).max() <= 1
    assert np.count_nonzero(levels) <= 1e-3 * levels.size


def test_bias_beyond_int32_is_an_error():
    with pytest.raises(FormatError, match="beyond int32"):
        quantize_bias(np.float32([1.0, 2.0]), np.float32([1e-10, 1.0]), "b")


@pytest.mark.parametrize(
    ("node", "shapes"),
    [
        ("Conv(x, w, b)", {"w": (6, 4, 1, 1), "b": (6,)}),
        ("Conv<group = 2>(x, w, b)", {"w": (6, 2, 1, 1), "b": (6,)}),
        ("ConvTranspose(x, w, b)", {"w": (4, 6, 1, 1), "b": (6,)}),
        ("ConvTranspose<group = 2>(x, w, b)", {"w": (4, 3, 1, 1), "b": (6,)}),
    ],
)
@pytest.mark.parametrize("overrides", [(), ("weight.axis=none",)], ids=["per-axis", "per-tensor"])
def test_a_bias_lies_on_the_grid_of_its_channel(node, shapes, overrides):
    """With an input of zeros the output is the bias: no further off than half of s_x * s_w."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4,3,3] input) => (float[N,6,3,3] output) {{
        x = Identity(input) output = {node} }}"""
    )
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    axis = 1 if "Transpose" in node else 0
    sizes = np.float32(10.0) ** np.arange(arrays["w"].shape[axis])  # no two scales are alike
    arrays["w"] *= sizes.reshape([-1 if i == axis else 1 for i in range(4)])
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in arrays.items())
    _, qdq = quantized(proto, "qnn-htp", (*overrides, "tensor:output.quantize=false"))
    params = qdq.params
    scale = np.broadcast_to(params["input"].scale * params["w"].scale, sizes.shape)
    scale = np.tile(scale, 6 // scale.size)
    exported = integer_model(qdq).to_proto()
    arrays |= {t.name: onnx.numpy_helper.to_array(t) for t in exported.graph.initializer}
    (name,) = (n for n in arrays if n.endswith("/bias/integers"))
    found = run_ort(exported, {"input": np.zeros((1, 4, 3, 3), np.float32)})[0][0, :, 0, 0]

    np.testing.assert_array_equal(arrays[name], np.rint(arrays["b"].astype(np.float64) / scale))
    np.testing.assert_array_equal(found, (arrays[name] * scale).astype(np.float32))


def levels_apart(network, x, output, overrides=()):
    """Return by how many levels the default session differs from the file node by node."""
    floats, plan = planned(network, "onnxruntime-cpu", overrides)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    exported = integer_model(calibrate(empty, [{"input": x}], observer="minmax")).to_proto()
    session = ort.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    scale = next(t for t in exported.graph.initializer if t.name == f"{output}/scale")
    found, expected = session.run(None, {"input": x})[0], run_ort(exported, {"input": x})[0]
    return np.rint(np.abs(found - expected) / onnx.numpy_helper.to_array(scale)), plan


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("moved", ["", "MaxPool<kernel_shape = [2, 2]>", "Transpose"])
def test_default_session_resizes_as_the_file_says(mode, moved):
    """The scales before and behind are equal: the largest value is at a corner."""
    move = f"t = {moved}(a)" if moved else "t = Relu(a)"
    network = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[4,4,4,4] input) => (float[p,q,r,s] y)
        <float[4] s = {{1, 1, 2, 2}}> {{ a = Relu(input) {move}
        d = Resize<mode = "{mode}", coordinate_transformation_mode = "align_corners">(t, , s)
        y = Add(d, d) }}"""
    )
    x = np.random.default_rng(0).uniform(0, 1, (4, 4, 4, 4)).astype(np.float32)
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = 2
    levels, plan = levels_apart(network, x, "y")

    assert levels.max() <= 1
    assert np.mean(levels > 0) < 0.01
    assert ("Resize" in {s.op_type for s in plan.skips}) == (mode != "nearest")


@pytest.mark.parametrize(
    "node",
    [
        "Resize<axes = [2, 3]>(c, , two)",
        "Resize<axes = [2, 3]>(c, , , sizes)",
        'Resize<coordinate_transformation_mode = "tf_crop_and_resize">(c, roi, four)',
        "AveragePool<kernel_shape = [2, 2], dilations = [1, 1]>(c)",
        "AveragePool<kernel_shape = [2, 2], dilations = [2, 2]>(c)",
    ],
)
def test_default_session_runs_between_convolutions_what_the_plan_leaves_float(node):
    network = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 19]> g (float[4,4,6,6] input) => (float[p,q,r,s] y)
        <float[2] two = {{2, 2}}, float[4] four = {{1, 1, 2, 2}}, int64[2] sizes = {{12, 15}},
         float[8] roi = {{0, 0, -0.3, 0.1, 1, 1, 0.9, 1.4}}>
        {{ c = Conv(input, w) d = {node} e = Conv(d, w) y = LeakyRelu(e) }}"""
    )
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 4, 1, 1)).astype(np.float32)
    network.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    x = rng.normal(size=(4, 4, 6, 6)).astype(np.float32) + 1
    levels, plan = levels_apart(network, x, "y", ("weight.bits=7",))  # without saturation

    assert levels.max() <= 1
    assert np.mean(levels > 0) < 0.02
    assert [s.op_type for s in plan.skips] == [node.partition("<")[0]]
