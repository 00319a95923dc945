"""What a step takes of memory, and the batch that fits into a budget."""

from __future__ import annotations

import onnx
import pytest

from onnxqat.errors import TrainingError
from onnxqat.train import Config, finetune
from onnxqat.train.memory import held_bytes
from tests.digits import calibrated_lenet, training_digits

TEXT = """<ir_version: 8, opset_import: ["": 17]>
    g (float[4,8] x) => (float[4,8] y) {
        a = Relu(x) b = Reshape(a, s) c = Neg(b) d = Exp(c) e = Reshape(d, t) y = Add(e, a) }"""


def model():
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in (("s", [32]), ("t", [4, 8])):
        values = onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(shape)], shape)
        proto.graph.initializer.append(values)
    return proto


def test_tensors_are_counted_from_their_node_to_their_last_reader():
    """Of 128 bytes each: a until the end, c and d one behind the other; views take none."""
    assert held_bytes(model()) == 3 * 128


def test_a_budget_divides_the_batch_and_the_step_stays():
    with training_digits(220) as data:
        network, said = calibrated_lenet(data, "weight.bits=2"), []
        usual = Config(epochs=1, batch_size=16, threads=1)
        whole = finetune(network, data, config=usual)
        tight = Config(epochs=1, batch_size=16, threads=1, memory_budget=3)
        result = finetune(network, data, config=tight, say=said.append)
        with pytest.raises(TrainingError, match="--memory-budget 1: a step of one sample takes"):
            finetune(network, data, config=Config(epochs=1, memory_budget=1))
    batches, _, _, size, *_ = said[0].split()

    assert said[0].endswith(" MB")
    assert int(batches) * int(size) == 16
    assert int(batches) > 1
    tensors, others = (m.model.floats.graph.tensors() for m in (result, whole))
    for name in ("conv1.weight", "fc2.weight"):
        difference = abs(tensors[name].values - others[name].values).max()
        assert difference < 1e-2 * abs(others[name].values).max()
