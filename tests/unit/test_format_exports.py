from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxqat.errors import FormatError
from onnxqat.formats import EXPORTS
from onnxqat.qparams import quantize
from tests.networks import attention, convnet, quantized, samples
from tests.oracles import run_ort

NETWORKS = pytest.mark.parametrize("network", [convnet, attention], ids=["convnet", "attention"])


def exported(model, name):
    proto = EXPORTS[name](model).to_proto()
    onnx.checker.check_model(proto, full_check=True)
    return proto, {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def producer(proto, tensor):
    return next(n for n in proto.graph.node if tensor in n.output)


@NETWORKS
@pytest.mark.parametrize("rule", ["openvino", "onnxruntime-cpu", "tflite"])
def test_openvino_keeps_biases_float_and_computes_the_same(network, rule):
    net = network()
    _, qdq = quantized(net, rule)
    proto, arrays = exported(qdq, "openvino")
    x = {"input": samples(net, 16, seed=3)}

    assert not any(a.dtype == np.int32 for a in arrays.values())
    np.testing.assert_array_equal(run_ort(proto, x)[0], run_ort(qdq.to_proto(), x)[0])


def test_openvino_says_the_axis_of_every_per_axis_pair():
    proto, arrays = exported(quantized(convnet(), "openvino")[1], "openvino")
    per_axis = [
        n for n in proto.graph.node if "Linear" in n.op_type and arrays[n.input[1]].ndim == 1
    ]

    assert len(per_axis) == 5
    assert all([a.name for a in n.attribute] == ["axis"] for n in per_axis)


@NETWORKS
def test_tensorrt_has_int8_weights_float_biases_and_zero_points_of_zero(network):
    net = network()
    _, qdq = quantized(net, "tensorrt")
    proto, arrays = exported(qdq, "tensorrt")
    linear = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    weights = [p for p in qdq.plan.points if p.role == "weight"]
    x = {"input": samples(net, 16, seed=3)}

    assert all(not arrays[n.input[2]].any() for n in linear)
    assert all(arrays[n.input[2]].dtype == np.int8 for n in linear)
    assert len(weights) == len([n for n in linear if n.input[0] in arrays])
    values = {t.name: t.values for t in qdq.floats.graph.tensors().values() if hasattr(t, "values")}
    for point in weights:
        expected = quantize(values[point.tensor], qdq.params[point.parameters], point.spec)
        np.testing.assert_array_equal(arrays[f"{point.tensor}/integers"], expected)
    np.testing.assert_array_equal(run_ort(proto, x)[0], run_ort(qdq.to_proto(), x)[0])


@pytest.mark.parametrize(
    ("rule", "overrides", "export", "message"),
    [
        ("onnxruntime-cpu", (), "tensorrt", "'input' has a zero_point other than 0"),
        ("sophgo-bm1684x", (), "tensorrt", "'r1' has unsigned integers"),
        ("tensorrt", ("activation.bits=4",), "tensorrt", "'input' has 4 bits"),
        ("ncnn", (), "tensorrt", "'input' needs a Clip between Q and DQ"),
        ("openvino", ("activation.bits=4",), "openvino", "'input' needs a Clip between Q and DQ"),
    ],
)
def test_what_a_runtime_cannot_read_is_refused(rule, overrides, export, message):
    _, qdq = quantized(convnet(), rule, overrides)
    with pytest.raises(FormatError, match=message):
        EXPORTS[export](qdq)


def test_qoperator_has_integer_operators():
    net = convnet()
    # without VNNI, products of 8-bit weights can saturate
    _, qdq = quantized(net, "onnxruntime-cpu", ("weight.bits=7",))
    proto = EXPORTS["qoperator"](qdq).to_proto()
    found = Counter(n.op_type for n in proto.graph.node)
    x = {"input": samples(net, 64, seed=3)}
    actual, expected = run_ort(proto, x)[0], run_ort(EXPORTS["onnxruntime"](qdq).to_proto(), x)[0]
    levels = np.abs(actual - expected) / qdq.params["output"].scale

    assert (found["QLinearConv"], found["QGemm"], found["QLinearAdd"]) == (4, 1, 1)
    assert not found.keys() & {"Conv", "Gemm", "Add", "Relu"}
    assert proto.graph.input[0].name == "input"
    assert proto.graph.output[0].name == "output"
    assert (levels > 1.5).mean() <= 0.02  # rounding inside of the kernels, over six layers


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_hold_each_weight_once_as_int8(name):
    rule = "tensorrt" if name == "tensorrt" else "onnxruntime-cpu"
    proto = EXPORTS[name](quantized(convnet(), rule)[1]).to_proto()
    sizes = [
        numpy_helper.to_array(t).size
        for t in proto.graph.initializer
        if t.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(t.dims) > 1
    ]

    assert sorted(sizes) == sorted((6 * 3 * 9, 6 * 9, 36, 4 * 6 * 9, 50))
    assert not any(
        t.data_type == TensorProto.FLOAT and len(t.dims) > 1 for t in proto.graph.initializer
    )
