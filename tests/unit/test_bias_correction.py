"""Bias correction: behind it, each layer has the means of the float model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.calibration import placeholder_params
from onnxqat.errors import DataError, PlanError
from onnxqat.quantized import insert_pairs, weights_hash
from onnxqat.repair import correct_biases
from tests.networks import _Graph, convnet, planned, quantized, samples
from tests.oracles import run_ort

W4 = ("weight.bits=4",)


def products():
    """MatMul with a bias behind it, Gemm, and one MatMul without a bias."""
    g = _Graph(4)
    g.node("MatMul", ["input", g.weight("w1", 8, 16)], "m1")
    g.node("Add", ["m1", g.weight("b1", 16)], "a1")
    g.node("Relu", ["a1"], "r1")
    g.node("MatMul", ["r1", g.weight("w2", 16, 8)], "m2")
    g.node("ReduceMean", ["m2"], "p", axes=[1], keepdims=0)
    g.node("Gemm", ["p", g.weight("w3", 8, 3), g.weight("b3", 3)], "output")
    return g.model(["N", 6, 8], ["N", 3])


def means(proto, names, batches):
    """Return the means of tensors whose channels are along axis 1, or the last one of three."""
    wanted = onnx.ModelProto()
    wanted.CopyFrom(proto)
    del wanted.graph.output[:]
    wanted.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runs = [run_ort(wanted, batch) for batch in batches] if names else []
    found = {}
    for i, name in enumerate(names):
        values = np.concatenate([run[i] for run in runs]).astype(np.float64)
        axis = 2 if values.ndim == 3 else 1
        found[name] = values.mean(axis=tuple(a for a in range(values.ndim) if a != axis))
    return found


@pytest.mark.parametrize(
    ("network", "rule", "corrected", "without", "tensors"),
    [
        (
            convnet,
            "onnxruntime-cpu",
            ["n_c1", "n_c2", "n_c4", "n_output"],
            ["n_c3"],
            ["c1", "c2", "c4"],
        ),
        (products, "tflite", ["n_a1", "n_output"], ["n_m2"], ["a1"]),
        (products, "onnxruntime-cpu", ["n_output"], ["n_m1", "n_m2"], []),
    ],
)
def test_each_layer_gets_the_means_of_the_float_model(network, rule, corrected, without, tensors):
    floats, model = quantized(network(), rule, W4)
    batches = [{"input": samples(network(), n, seed=n)} for n in (5, 16)]

    result = correct_biases(model, lambda: batches)

    assert list(result.layers) == corrected
    assert [skip.node for skip in result.skips] == without
    expected = means(floats.to_proto(), tensors, batches)
    before = means(model.to_proto(), tensors, batches)
    after = means(result.model.to_proto(), tensors, batches)
    for name in tensors:
        error = np.abs(before[name] - expected[name]).max()
        assert error > 1e-4
        assert np.abs(after[name] - expected[name]).max() < 1e-3 * error + 1e-6
    assert result.model.source == model.source != weights_hash(result.model.floats.graph)


def test_only_biases_change():
    _, model = quantized(convnet(), "onnxruntime-cpu", W4)
    before = model.floats.to_proto()

    result = correct_biases(model, lambda: [{"input": samples(convnet(), 4)}]).model

    assert model.floats.to_proto() == before
    old, new = (
        {n: t.values for n, t in m.floats.graph.tensors().items() if hasattr(t, "values")}
        for m in (model, result)
    )
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {"b1", "b2", "b4", "b5"}
    assert result.params == model.params


def test_what_cannot_be_corrected_is_refused():
    floats, plan = planned(convnet(), "onnxruntime-cpu")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    _, model = quantized(convnet(), "onnxruntime-cpu")

    with pytest.raises(PlanError, match="not calibrated"):
        correct_biases(empty, lambda: [{"input": samples(convnet(), 4)}])
    with pytest.raises(DataError, match="no data to correct biases with"):
        correct_biases(model, list)
    with pytest.raises(DataError, match="not finite"):
        correct_biases(model, lambda: [{"input": np.full((1, 3, 8, 8), np.inf, np.float32)}])
