from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxqat.errors import FormatError
from onnxqat.formats import EXPORTS, with_int4_weights
from onnxqat.quantized import load_model
from tests.networks import attention, convnet, quantized, samples
from tests.oracles import run_ort

W4 = ("weight.bits=4", "last.bits=8")


@pytest.mark.parametrize("network", [convnet, attention], ids=["convnet", "attention"])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_4_bit_weights_compute_what_8_bit_ones_do(network, name, tmp_path):
    net = network()
    _, qdq = quantized(net, "onnxruntime-cpu", W4)
    bytes_ = EXPORTS[name](qdq)
    nibbles = with_int4_weights(bytes_, qdq.plan)
    nibbles.save(tmp_path / "int4.onnx")
    proto = onnx.load(tmp_path / "int4.onnx")
    onnx.checker.check_model(proto, full_check=True)
    x = {"input": samples(net, 16, seed=3)}

    np.testing.assert_array_equal(run_ort(proto, x)[0], run_ort(bytes_.to_proto(), x)[0])
    assert load_model(tmp_path / "int4.onnx").graph.opset == 21


def test_values_are_stored_two_to_a_byte_and_wider_ones_stay():
    _, qdq = quantized(convnet(), "onnxruntime-cpu", W4)
    before = EXPORTS["onnxruntime"](qdq).to_proto()
    after = with_int4_weights(EXPORTS["onnxruntime"](qdq), qdq.plan).to_proto()
    old = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    packed = [t for t in after.graph.initializer if t.data_type == TensorProto.INT4]

    assert sum(t.name.endswith("/integers/int4") for t in packed) == 4  # the last has 8 bits
    for tensor in packed:
        values = numpy_helper.to_array(tensor).astype(np.int8)
        stored = tensor.raw_data or bytes(tensor.int32_data)
        np.testing.assert_array_equal(values, old[tensor.name.removesuffix("/int4")])
        assert len(stored) == -(-values.size // 2)


def test_without_a_narrow_weight_it_says_so():
    _, qdq = quantized(convnet(), "onnxruntime-cpu")
    with pytest.raises(FormatError, match=r"no weight has 4 bits or fewer\. Insert with --set"):
        with_int4_weights(EXPORTS["onnxruntime"](qdq), qdq.plan)
