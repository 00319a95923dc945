"""LSTM, GRU and RNN step by step: onnxruntime's values to a few ulp, and right gradients."""

from __future__ import annotations

import re

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxqat.train.lowering import Refusal
from onnxqat.train.lowering.recurrent import MAX_STEPS
from tests import derivatives, recurrences
from tests.derivatives import gradients, lowered
from tests.oracles import run_ort

GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
ULP = 16  # of the largest value of an output
STEPS, SAMPLES, INPUTS, UNITS = 5, 3, 4, 6
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}


def layer(op, given=("b",), *, outputs=None, lengths=None, shape=(STEPS, SAMPLES), **attributes):
    """Return a model of one layer, and its inputs: x, w and r, and those of b, h, c, p in given."""
    rng = np.random.default_rng(len(op))
    units, gates = UNITS, GATES[op]
    count = 1 + (attributes.get("direction") == "bidirectional")
    first = (shape[1], count) if attributes.get("layout") else (count, shape[1])
    steps = shape[::-1] if attributes.get("layout") else shape
    shapes = {
        "x": (*steps, INPUTS), "w": (count, gates * units, INPUTS),
        "r": (count, gates * units, units), "b": (count, 2 * gates * units), "lengths": None,
        "h": (*first, units), "c": (*first, units), "p": (count, 3 * units),
    }  # fmt: skip
    names = list(shapes)[: 8 if op == "LSTM" else 6]
    there = {"x", "w", "r", *given}
    inputs = {
        name: rng.normal(scale=2 if name == "x" else 0.6, size=shapes[name]).astype(np.float32)
        for name in names
        if name in there
    }
    if lengths is not None:
        inputs["lengths"] = np.array(lengths, np.int32)
    kinds = outputs or (("y", "h_end", "c_end") if op == "LSTM" else ("y", "h_end"))
    listed = [name if name in inputs else "" for name in names]
    node = helper.make_node(op, listed, list(kinds), name="node", hidden_size=units, **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [value(name, TYPES[array.dtype], array.shape) for name, array in inputs.items()],
        [value(name, TensorProto.FLOAT, None) for name in kinds if name],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), inputs


def check_values(actual, expected, ulp=ULP):
    """Compare in units in the last place of the largest value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert np.abs(a.astype(np.float64) - e).max() <= ulp * np.spacing(np.abs(e).max())


EVERYWHERE = [
    {},
    {"direction": "reverse"},
    {"direction": "bidirectional", "given": "bh"},
    {"given": ""},
    {"clip": 0.5},
    {"lengths": [5, 2, 3], "given": "bh", "direction": "bidirectional"},
    {"shape": (12, 1)},
    {"activations": ["Softsign", "Softplus", "Relu"]},
    {"activations": ["HardSigmoid", "Affine", "ScaledTanh"], "activation_alpha": [0.3, 0.9, 0.7],
     "activation_beta": [0.4, 0.1, 0.8]},
    {"activations": ["HardSigmoid", "ThresholdedRelu", "Elu"], "activation_beta": [0.5],
     "activation_alpha": [0.1, 0.3, 0.7]},
    {"activations": ["Affine", "Affine", "Tanh"], "activation_alpha": [0.5, 0.6],
     "activation_beta": [0.1, 0.2]},
]  # fmt: skip
OF_ONE = [
    ("LSTM", {"given": "bhc"}),
    ("LSTM", {"given": "bhcp", "direction": "bidirectional"}),
    ("LSTM", {"given": "p", "clip": 0.4}),
    ("LSTM", {"given": "bp", "input_forget": 1}),
    ("LSTM", {"given": "bhc", "lengths": [0, 5, 4]}),
    ("GRU", {"given": "bh", "lengths": [2, 5, 0], "direction": "reverse"}),
    ("LSTM", {"activations": ["HardSigmoid", "Elu", "LeakyRelu"]}),
    ("LSTM", {"outputs": ("", "", "c_end")}),
    ("LSTM", {"outputs": ("y",)}),
    ("GRU", {"outputs": ("", "h_end")}),
    ("GRU", {"linear_before_reset": 1, "given": "bh"}),
    ("GRU", {"linear_before_reset": 1, "given": "", "clip": 0.4}),
    ("GRU", {"activations": ["HardSigmoid", "LeakyRelu"]}),
    *(("RNN", {"activations": [name], "activation_alpha": [0.3]}) for name in ("Elu", "LeakyRelu")),
    ("RNN", {"activations": ["Relu"]}),
]
CASES = [(op, dict(case)) for op in GATES for case in EVERYWHERE] + OF_ONE


def for_layer(op, case):
    """Return a case with as many activations as the layer has."""
    case = dict(case)
    if "activations" in case:
        count = {"LSTM": 3, "GRU": 2, "RNN": 1}[op]
        for name in ("activations", "activation_alpha", "activation_beta"):
            if name in case:
                case[name] = case[name][:count]
    return case


@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda v: re.sub(r"[^\w=.,]+", "-", str(v)))
def test_values_are_those_of_onnxruntime_to_a_few_ulp(op, case):
    model, inputs = layer(op, **for_layer(op, case))
    learned = [name for name in inputs if name != "lengths"]
    ulp = 0 if op == "LSTM" and "p" not in inputs and "activations" not in case else ULP

    check_values(run_ort(lowered(model, learned), inputs), run_ort(model, inputs), ulp)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_batch_first_is_as_onnx_defines_it(op):
    model, inputs = layer(op, "bh", layout=1)  # which onnxruntime's CPU kernels lack
    expected = ReferenceEvaluator(model).run(None, inputs)

    check_values(run_ort(lowered(model, ["w"]), inputs), expected)


OF_GRADIENTS = [
    *((op, {"given": "bhc"[: 3 if op == "LSTM" else 2]}) for op in GATES),
    *((op, {"direction": "bidirectional", "lengths": [3, 1, 2]}) for op in GATES),
    *((op, {"direction": "reverse", "given": "", "clip": 3.0}) for op in GATES),
    ("LSTM", {"given": "bhcp"}),
    ("LSTM", {"given": "bhcp", "outputs": ("", "", "c_end")}),
    ("LSTM", {"given": "bc", "outputs": ("", "h_end")}),
    ("GRU", {"linear_before_reset": 1, "given": "bh"}),
    ("GRU", {"activations": ["HardSigmoid", "ScaledTanh"], "activation_alpha": [0.1, 0.7],
             "activation_beta": [0.5, 0.8]}),
    ("RNN", {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "case"), OF_GRADIENTS, ids=lambda v: re.sub(r"[^\w=.,]+", "-", str(v))
)
def test_gradients_are_finite_differences(op, case, monkeypatch):
    if "c_end" in case.get("outputs", ()) or "linear_before_reset" in case:
        # onnxruntime's own builder cannot leave a part of a Split unread
        monkeypatch.delitem(derivatives.BUILDERS, "onnxruntime", raising=False)
    model, inputs = layer(op, shape=(3, 3), **case)
    learned = [name for name in inputs if name != "lengths"]
    names = [output.name for output in model.graph.output]
    expected = run_ort(model, inputs)
    rng = np.random.default_rng(7)
    upstream = [rng.normal(size=e.shape) for e in expected]
    found = gradients(model, inputs, learned, [u.astype(np.float32) for u in upstream])
    doubles = {n: a if n == "lengths" else a.astype(np.float64) for n, a in inputs.items()}
    attributes = {k: v for k, v in case.items() if k not in ("given", "outputs", "lengths")}

    def outputs(**changed):
        every = recurrences.layer(op, doubles | changed, attributes)
        return [dict(zip(("y", "h_end", "c_end"), every, strict=False))[name] for name in names]

    for ours, theirs in zip(outputs(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for name in learned:
        for _ in range(3):
            line = rng.normal(size=inputs[name].shape)
            ends = []
            for sign in (1e-6, -1e-6):
                values = outputs(**{name: doubles[name] + sign * line})
                ends.append(
                    sum(float((u * v).sum()) for u, v in zip(upstream, values, strict=True))
                )
            slope, along = (ends[0] - ends[1]) / 2e-6, float((found[name] * line).sum())
            assert abs(along - slope) <= 2e-4 * (np.abs(found[name] * line).sum() + 1e-3), name


REFUSED = [
    ({"activations": ["Sin", "Tanh", "Tanh"]}, "its activation 'Sin' is not one of Affine, Elu"),
    ({"activations": ["Affine", "Tanh", "Tanh"]}, "'Affine' has no activation_alpha"),
    ({"op": "RNN", "activations": ["Elu"]}, "'Elu' has no activation_alpha"),
    ({"activations": ["Sigmoid", "Tanh"]}, r"it has 2 activations for 1 direction\(s\) of 3"),
    ({"shape": (MAX_STEPS + 1, 1)}, "have 1001 steps, and 1 to 1000 can be unrolled"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda v: str(v)[:20])
def test_what_cannot_be_unrolled_is_refused_with_the_reason(case, reason):
    model, _ = layer(**{"op": "LSTM"} | case)
    with pytest.raises(Refusal, match=reason):
        lowered(model, ["w"])


def test_steps_of_one_layer_share_its_weights():
    model, _ = layer("LSTM", "bhc")
    lengths = {}
    for steps in (5, 50):
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = steps
        nodes = lowered(model, ["w"]).graph.node
        read = [name for node in nodes for name in node.input if name in "wrb"]
        lengths[steps] = (len(nodes), sorted(read))

    assert lengths[50][0] - lengths[5][0] == 45 * 13
    assert lengths[50][1] == lengths[5][1] == ["b", "r", "w"]
