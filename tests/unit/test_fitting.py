"""Activations are divided so that their best scale is a power of two."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.qparams import QuantParams, QuantSpec, fake_quantize, power_of_two
from onnxqat.repair import equalize, original

SPEC = QuantSpec(power_of_two=True)
SPECS = dict.fromkeys(("r1", "r2", "j"), SPEC)
READ = {None: "r2", "Add": "j", "Concat": "j"}  # by the third convolution


def network(joined=None):
    """Three convolutions; an Add or a Concat can join the outputs of the first two."""
    rng = np.random.default_rng(9)
    weights = []
    for name, inputs, outputs in (
        ("1", 3, 6),
        ("2", 6, 6),
        ("3", 12 if joined == "Concat" else 6, 5),
    ):
        weight = rng.normal(size=(outputs, inputs, 1, 1))
        bias = rng.normal(5, 5, size=outputs)  # some high ones are absorbed
        weights += [
            numpy_helper.from_array(values.astype(np.float32), f"{kind}{name}")
            for kind, values in (("w", weight), ("b", bias))
        ]
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c1"], name="n1"),
        helper.make_node("LeakyRelu", ["c1"], ["r1"], name="l1", alpha=0.1),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="n2"),
        helper.make_node("Relu", ["c2"], ["r2"], name="l2"),
        helper.make_node("Conv", [READ[joined], "w3", "b3"], ["output"], name="n3"),
    ]
    if joined:
        axis = {"axis": 1} if joined == "Concat" else {}
        nodes.insert(4, helper.make_node(joined, ["r2", "r1"], ["j"], name="join", **axis))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", count, 4, 4])
            for name, count in (("input", 3), ("output", 5))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    return prepare(from_proto(helper.make_model(graph, opset_imports=opset, ir_version=8)))


BATCHES = [
    {"input": np.random.default_rng(s).normal(size=(8, 3, 4, 4)).astype(np.float32)} for s in (1, 2)
]


def tensors(model, *names):
    """Return the values of tensors on the batches."""
    proto = model.to_proto()
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString())
    return [
        np.concatenate(values)
        for values in zip(*(session.run(None, b) for b in BATCHES), strict=True)
    ]


def least_error(values):
    """Return the least relative squared error with a power of two for the scale."""
    widest = power_of_two(np.float32(np.abs(values).max() / 127))
    exact, errors = values.astype(np.float64), []
    for halvings in range(6):
        scale = np.float32(widest / 2**halvings)
        params = QuantParams(scale=scale, zero_point=np.int8(0))
        errors.append(np.square(fake_quantize(values, params, SPEC) - exact).sum())
    return min(errors) / np.square(exact).sum()


@pytest.mark.parametrize("joined", READ)
def test_no_other_factor_gives_less_error(joined):
    model = network(joined)

    before, after = (equalize(model, BATCHES, activations=a).model for a in ({}, SPECS))

    names = ("r1", READ[joined])
    old, new = tensors(before, *names), tensors(after, *names)
    factors = [float(np.abs(a).sum() / np.abs(b).sum()) for a, b in zip(old, new, strict=True)]
    tried = 2.0 ** (np.arange(-8, 8) / 16)
    groups = [(0, 1)] if joined else [(0,), (1,)]
    for group in groups:
        errors = [sum(least_error(old[i] / np.float32(f)) for i in group) for f in tried]
        mine = sum(least_error(new[i]) for i in group)
        assert mine <= 1.005 * min(errors)  # a histogram spreads values evenly over its bins
        assert mine < 0.9 * errors[8]  # 8: the factor 1
        assert all(factors[i] == pytest.approx(factors[group[0]], rel=1e-4) for i in group)


def test_the_outputs_and_the_teacher_stay():
    model = network()

    result = equalize(model, BATCHES, activations=SPECS)

    assert set(result.fitted) == {"r1", "r2"}
    assert result.absorbed
    (expected,), (found,), (taught,) = (
        tensors(one, "output") for one in (model, result.model, original(result.model))
    )
    for values in (found, taught):
        np.testing.assert_allclose(values, expected, atol=2e-5 * np.abs(expected).max())
    teacher, student = (one.graph.tensors() for one in (original(result.model), result.model))
    for name in ("w1", "w2", "w3"):  # only biases differ
        np.testing.assert_array_equal(teacher[name].values, student[name].values)


def test_other_scales_change_nothing():
    model = network()

    one, other = equalize(model, BATCHES), equalize(model, BATCHES, activations={"r1": QuantSpec()})

    assert other.fitted == ()
    assert one.model.to_proto() == other.model.to_proto()
