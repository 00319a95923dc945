"""Which initializers are trained: what was learned, not what belongs to the structure."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.model import Model, from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import HardwareRule, OpRule, RuleSpec
from onnxqat.train.config import Config
from onnxqat.train.form import training_form
from onnxqat.train.optimization.parameter_groups import asked_for
from onnxqat.train.trained import is_structure

OPS = ("Add", "Sub", "Mul", "Div", "MatMul", "Relu")
LEARNED = {"w", "scales", "ones", "positions", "slope"}
CONSTANTS = {
    "half": np.float32(0.5),
    "root": np.float32([[[8**-0.5]]]),
    "one": np.float32([1]),
    "epsilon": np.float32(1e-5),
    "grid": np.float32([[0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]]),
    "scales": np.float32([1, 1, 0.9, 1, 1, 1.2, 1, 1]),
    "ones": np.ones(8, np.float32),
    "positions": np.random.default_rng(1).normal(size=(1, 4, 8)).astype(np.float32),
    "slope": np.float32([0.25]),
    "w": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32),
}


def quantized() -> Model:
    """Return a chain with constants of every kind, each op of it quantized."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N,4,8] x) => (float[N,4,8] y) {
        a = Add(x, positions) b = MatMul(a, w) c = Mul(b, root) d = Add(c, epsilon)
        e = Mul(d, scales) f = Mul(e, ones) h = Sub(one, f) i = Div(h, half) k = Add(i, grid)
        y = PRelu(k, slope) }"""
    )
    tensors = (onnx.numpy_helper.from_array(v, n) for n, v in CONSTANTS.items())
    model.graph.initializer.extend(tensors)
    op = OpRule(inputs="a", outputs="a", weight="a")
    rule = HardwareRule(
        name="test", vendor="v", summary="s", sources=("s",), weight_bits=(8,),
        activation_bits=(8,), specs={"a": RuleSpec()}, ops=dict.fromkeys(OPS, op),
    )  # fmt: skip
    floats = prepare(from_proto(model))
    plan = make_plan(floats.graph, rule)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    x = np.random.default_rng(2).normal(size=(8, 4, 8)).astype(np.float32)
    return calibrate(empty, [{"x": x}])


def test_constants_of_the_structure_are_not_trained():
    model = quantized()
    form = training_form(model)
    points = {n.removesuffix("/scale") for n in form.parameters if n.endswith("/scale")}

    assert CONSTANTS.keys() - {"slope"} <= points  # all of them are quantized
    assert set(form.weights) == LEARNED
    assert form.learned & {f"{n}/scale" for n in CONSTANTS} == {
        f"{n}/scale" for n in LEARNED - {"slope"}
    }


@pytest.mark.parametrize(
    ("groups", "asked"),
    [
        (("tensor:root.freeze=false",), {"root"}),
        (("tensor:root.lr=0.001", "tensor:grid.weight_decay=0.1"), {"root", "grid"}),
        (("tensor:root.freeze=true", "tensor:.*.lr=0.1", "weight.lr=1"), set()),
    ],
)
def test_constant_is_trained_where_a_group_has_its_name(groups, asked):
    names = asked_for(Config(groups=groups))

    assert set(training_form(quantized(), asked=names).weights) == LEARNED | asked


@pytest.mark.parametrize(
    ("values", "structure"),
    [
        (np.float32(0.044715), True),
        (np.ones((1, 1, 1), np.float32), True),
        (np.ones(4, np.float32), False),
        (np.full(4, 1e-5, np.float32), False),
        (np.float32([8, 16, 32]), True),
        (np.float32([8, 16, 32.01]), False),
        (np.zeros(0, np.float32), True),
    ],
)
def test_structure_is_a_single_number_or_a_grid(values, structure):
    assert is_structure(values) == structure
