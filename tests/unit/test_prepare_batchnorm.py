from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.preparation.batchnorm import fold_batchnorms
from tests.oracles import max_ulp, run_ort

Array = NDArray[Any]
BN_INPUTS = ["c", "scale", "shift", "mean", "var"]


def positive(*shape: int, seed: int = 0) -> Array:
    """No cancellation in sums of these, so that ulp measure rounding."""
    return np.random.default_rng([seed, *shape]).uniform(0.5, 1.5, shape).astype(np.float32)


def batchnorm(channels: int) -> dict[str, Array]:
    return {
        "scale": positive(channels, seed=1),
        "shift": positive(channels, seed=2),
        "mean": -positive(channels, seed=3),
        "var": positive(channels, seed=4),
    }


def build(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, Array],
    x: tuple[int | str, ...] = ("N", 4, 6, 6),
    outputs: tuple[str, ...] = ("y",),
    elem_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", elem_type, x)],
        [helper.make_tensor_value_info(name, elem_type, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


def layer(op: str, *inputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, ["x", *inputs], ["c"], name="layer", **attributes)


def normalize(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", BN_INPUTS, ["y"], name="bn", **attributes)


def folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    result = prepare(from_proto(proto)).to_proto()
    onnx.checker.check_model(result, full_check=True)
    return result


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def arrays_of(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def factors(arrays: dict[str, Array], epsilon: float = 1e-5) -> Array:
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    return wide["scale"] / np.sqrt(wide["var"] + np.float64(np.float32(epsilon)))


def expected_bias(arrays: dict[str, Array], bias: Array | float) -> Array:
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    result = (np.float64(bias) - wide["mean"]) * factors(arrays) + wide["shift"]
    return result.astype(np.float32)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("group", [1, 2, 4], ids=lambda group: f"group{group}")
def test_conv(group: int, with_bias: bool) -> None:
    weight = positive(8, 4 // group, 3, 3)
    bias = {"conv.bias": positive(8, seed=5)} if with_bias else {}
    parameters = batchnorm(8)
    arrays = {"conv.weight": weight, **bias, **parameters}
    node = layer("Conv", "conv.weight", *bias, group=group)
    proto = build([node, normalize()], arrays)

    result = folded(proto)

    assert ops(result) == ["Conv"]
    assert list(result.graph.node[0].output) == ["y"]
    assert result.graph.node[0].name == "layer"
    found = arrays_of(result)
    assert set(found) == {"conv.weight", "conv.bias"}
    factor = factors(parameters)
    for channel in range(8):
        expected = (weight[channel].astype(np.float64) * factor[channel]).astype(np.float32)
        assert max_ulp(found["conv.weight"][channel], expected) == 0
    assert max_ulp(found["conv.bias"], expected_bias(parameters, bias.get("conv.bias", 0.0))) == 0
    x = positive(2, 4, 6, 6)
    assert max_ulp(run_ort(result, {"x": x})[0], run_ort(proto, {"x": x})[0]) <= 16


@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("group", "per_group"), [(1, 6), (2, 3), (4, 1), (4, 2)])
def test_conv_transpose(group: int, per_group: int, with_bias: bool) -> None:
    weight = positive(4, per_group, 3, 3)
    channels = group * per_group
    bias = {"up.bias": positive(channels, seed=5)} if with_bias else {}
    parameters = batchnorm(channels)
    arrays = {"up.weight": weight, **bias, **parameters}
    node = layer("ConvTranspose", "up.weight", *bias, group=group, strides=[2, 2])
    proto = build([node, normalize()], arrays)

    result = folded(proto)

    assert ops(result) == ["ConvTranspose"]
    found = arrays_of(result)
    factor = factors(parameters)
    rows = 4 // group
    for row in range(4):
        for column in range(per_group):
            channel = (row // rows) * per_group + column
            expected = (weight[row, column].astype(np.float64) * factor[channel]).astype(np.float32)
            assert max_ulp(found["up.weight"][row, column], expected) == 0
    assert max_ulp(found["up.bias"], expected_bias(parameters, bias.get("up.bias", 0.0))) == 0
    x = positive(2, 4, 6, 6)
    assert max_ulp(run_ort(result, {"x": x})[0], run_ort(proto, {"x": x})[0]) <= 16


@pytest.mark.parametrize("bias_shape", [None, (), (1,), (8,), (1, 8)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int, beta: float, bias_shape: tuple[int, ...] | None) -> None:
    weight = positive(*((8, 5) if transposed else (5, 8)))
    bias = {} if bias_shape is None else {"b": positive(*bias_shape, seed=5)}
    parameters = batchnorm(8)
    arrays = {"fc.weight": weight, **bias, **parameters}
    node = layer("Gemm", "fc.weight", *bias, transB=transposed, alpha=0.25, beta=beta)
    proto = build([node, normalize()], arrays, ("N", 5))

    result = folded(proto)

    assert ops(result) == ["Gemm"]
    found = arrays_of(result)
    assert set(found) == {"fc.weight", "b" if bias else "fc.bias"}
    kept = {a.name: helper.get_attribute_value(a) for a in result.graph.node[0].attribute}
    assert kept == {"alpha": 0.25, "transB": transposed}
    factor = factors(parameters)
    factor = factor[:, None] if transposed else factor[None, :]
    assert max_ulp(found["fc.weight"], (weight * factor).astype(np.float32)) == 0
    x = positive(3, 5)
    assert max_ulp(run_ort(result, {"x": x})[0], run_ort(proto, {"x": x})[0]) <= 8


def test_negative_scales_and_the_epsilon_of_the_file() -> None:
    parameters = batchnorm(8)
    parameters["scale"] = np.linspace(-2, 2, 8, dtype=np.float32)
    parameters["var"][:] = 1e-4
    weight = positive(8, 4, 1, 1) - np.float32(1)
    nodes = [layer("Conv", "w"), normalize(epsilon=1e-3)]

    found = arrays_of(folded(build(nodes, {"w": weight, **parameters})))

    expected = weight * factors(parameters, 1e-3)[:, None, None, None]
    assert max_ulp(found["w"], expected.astype(np.float32)) == 0


def test_double_is_folded_in_double() -> None:
    arrays = {"w": positive(8, 4, 1, 1), **batchnorm(8)}
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    proto = build([layer("Conv", "w"), normalize()], wide, elem_type=TensorProto.DOUBLE)

    found = arrays_of(folded(proto))

    expected = wide["w"] * factors(arrays)[:, None, None, None]
    assert max_ulp(found["w"], expected) == 0


def test_two_normalizations_in_a_row_both_fold() -> None:
    second = helper.make_node(
        "BatchNormalization", ["d", *BN_INPUTS[1:]], ["y"], name="bn2", epsilon=1e-3
    )
    first = normalize()
    first.output[0] = "d"
    proto = build([layer("Conv", "w"), first, second], {"w": positive(8, 4, 1, 1), **batchnorm(8)})

    result = folded(proto)

    assert ops(result) == ["Conv"]
    x = positive(2, 4, 6, 6)
    assert max_ulp(run_ort(result, {"x": x})[0], run_ort(proto, {"x": x})[0]) <= 16


def test_a_shared_weight_and_bias_are_not_changed_for_the_other_reader() -> None:
    other = helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["z"], name="other")
    arrays = {"conv.weight": positive(8, 4, 1, 1), "conv.bias": positive(8), **batchnorm(8)}
    nodes = [layer("Conv", "conv.weight", "conv.bias"), normalize(), other]
    proto = build(nodes, arrays, outputs=("y", "z"))

    result = folded(proto)

    assert ops(result) == ["Conv", "Conv"]
    assert list(result.graph.node[0].input) == ["x", "layer.weight", "layer.bias"]
    assert list(result.graph.node[1].input) == ["x", "conv.weight", "conv.bias"]
    assert np.array_equal(arrays_of(result)["conv.weight"], arrays["conv.weight"])
    x = positive(2, 4, 6, 6)
    y, z = run_ort(result, {"x": x})
    expected_y, expected_z = run_ort(proto, {"x": x})
    assert max_ulp(y, expected_y) <= 16
    assert np.array_equal(z, expected_z)


def test_a_weight_that_a_subgraph_reads_is_not_changed() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1,1,2,2] x, bool t) => (float[1,1,2,2] y, float[1,1,2,2] z)
        <float[1,1,1,1] w = {3}, float[1] one = {1}, float[1] four = {4}, float[1] zero = {0}> {
            c = Conv(x, w)
            y = BatchNormalization <epsilon = 0.0> (c, four, one, zero, four)
            z = If (t) <
                then_branch = a () => (float[1,1,2,2] u) { u = Conv(x, w) },
                else_branch = b () => (float[1,1,2,2] v) { v = Relu(x) }>
        }"""
    )

    result = folded(proto)

    assert ops(result) == ["Conv", "If"]
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    y, z = run_ort(result, {"x": x, "t": np.array(True)})
    assert np.array_equal(y, 6 * x + 1)
    assert np.array_equal(z, 3 * x)


def test_a_new_bias_does_not_take_a_name_that_is_taken() -> None:
    arrays = {"conv.weight": positive(8, 4, 1, 1), "conv.bias": positive(8, 1, 1), **batchnorm(8)}
    last = helper.make_node("Add", ["y", "conv.bias"], ["z"])
    nodes = [layer("Conv", "conv.weight"), normalize(), last]

    result = folded(build(nodes, arrays, outputs=("z",)))

    assert list(result.graph.node[0].input) == ["x", "conv.weight", "conv.bias_1"]


def refused(nodes: list[onnx.NodeProto], outputs: tuple[str, ...], **changed: Array) -> bool:
    arrays = {"w": positive(8, 4, 1, 1), **batchnorm(8), **changed}
    model = from_proto(build(nodes, arrays, outputs=outputs)).copy()
    return fold_batchnorms(model.graph) == 0


relu = helper.make_node("Relu", ["c"], ["z"])
training = helper.make_node(
    "BatchNormalization", BN_INPUTS, ["y", "m", "v"], name="bn", training_mode=1
)
after_relu = helper.make_node("BatchNormalization", ["z", *BN_INPUTS[1:]], ["y"], name="bn")
computed = helper.make_node("Exp", ["log_w"], ["w"])


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        pytest.param([layer("Conv", "w"), normalize(), relu], ("y", "z"), id="other-consumer"),
        pytest.param([layer("Conv", "w"), normalize()], ("y", "c"), id="graph-output"),
        pytest.param([layer("Conv", "w"), training], ("y",), id="training-mode"),
        pytest.param([layer("Conv", "w"), relu, after_relu], ("y",), id="not-behind-a-layer"),
    ],
)
def test_refused(nodes: list[onnx.NodeProto], outputs: tuple[str, ...]) -> None:
    assert refused(nodes, outputs)


def test_a_result_that_overflows_is_refused() -> None:
    nodes = [layer("Conv", "w"), normalize()]

    assert not refused(nodes, ("y",))
    assert refused(nodes, ("y",), scale=np.full(8, 3e38, np.float32))
    assert refused(nodes, ("y",), var=np.full(8, -1, np.float32))


def test_a_computed_weight_is_refused() -> None:
    arrays = {"log_w": positive(8, 4, 1, 1), **batchnorm(8)}
    model = from_proto(build([computed, layer("Conv", "w"), normalize()], arrays))

    assert fold_batchnorms(model.copy().graph) == 0


def test_a_gemm_whose_bias_differs_between_rows_is_refused() -> None:
    arrays = {"w": positive(5, 8), "b": positive(3, 8), **batchnorm(8)}
    model = from_proto(build([layer("Gemm", "w", "b"), normalize()], arrays, (3, 5)))

    assert fold_batchnorms(model.copy().graph) == 0
