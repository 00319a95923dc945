from __future__ import annotations

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.insert import with_params
from onnxqat.model import from_proto, load_model, save_model, to_proto
from onnxqat.runtime import open_session
from onnxqat.train.engine import forward_session
from onnxqat.train.form import training_form
from tests.networks import RULES, W4A4, attention, convnet, quantized, samples


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overrides", [(), W4A4], ids=["w8a8", "w4a4"])
@pytest.mark.parametrize(
    "network",
    [convnet, attention, lambda: convnet(activation="LeakyRelu")],
    ids=["convnet", "attention", "leaky"],
)
def test_training_forward_equals_the_saved_file_bit_for_bit(network, rule, overrides, tmp_path):
    network = network()
    _, qdq = quantized(network, rule, overrides)
    save_model(qdq, tmp_path / "model.onnx")
    x = samples(network, 32, seed=7) * 2  # some values are clipped
    saved = to_proto(load_model(tmp_path / "model.onnx"))
    expected = open_session(saved, optimization="none", threads=1).run(None, {"input": x})
    form = training_form(qdq, learn_scales=True)
    actual = forward_session(form, threads=1).run(None, {"input": x, **form.parameters})

    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_redundant_pairs_are_left_out_and_nothing_else():
    _, qdq = quantized(convnet())
    form = training_form(qdq, learn_scales=True)
    pairs = {n.name.split("/")[0] for n in form.proto.graph.node if n.domain == "onnxqat"}

    # behind MaxPool, Concat and Flatten the values lie on the grid already
    assert not pairs & {"p1", "k1", "f1"}
    assert {"input", "r1", "r2", "r3", "c3", "c4", "v1", "v2", "output"} <= pairs


def test_weights_biases_and_scales_are_parameters():
    form = training_form(quantized(convnet())[1], learn_scales=True)

    assert {"w1", "b1", "w5", "b5"} <= form.weights.keys()
    assert {"input/scale", "w1/scale", "r3/scale"} <= form.parameters.keys()


def test_op_without_gradient_is_named():
    import onnx

    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,4] y)
    <float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 3,0,0,1}> {
        a = MatMul(x, w)
        [bend] y = Softplus(a)
    }"""
    _, qdq = quantized_text(onnx.parser.parse_model(text))
    with pytest.raises(TrainingError, match="Node 'bend': Softplus has no gradient here"):
        training_form(qdq, learn_scales=True)


def quantized_text(network):
    from onnxqat.calibrate import placeholder_params
    from onnxqat.insert import insert
    from onnxqat.plan import make_plan
    from onnxqat.prepare import prepare
    from onnxqat.rules import load_rule

    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    empty = insert(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return floats, with_params(empty, placeholder_params(floats, plan), state="calibrated")
