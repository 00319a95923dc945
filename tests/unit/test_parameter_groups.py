from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import TrainingError
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.train.optimization.parameter_groups import parse_parameter_group
from tests.descent import Trained

MODELS = Path(__file__).parents[2] / "models"


def calibrated(*overrides):
    floats = prepare(from_proto(onnx.load(MODELS / "lenet5.onnx")))
    overrides = [parse_override(text) for text in overrides]
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"), overrides)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    images = np.random.default_rng(0).normal(size=(8, 1, 28, 28)).astype(np.float32)
    return calibrate(empty, [{"input": images}], threads=1)


@pytest.fixture(scope="module")
def model():
    return calibrated()


def names(model, role: str) -> set[str]:
    found = Trained(model)
    roles = {
        n: "scale" if n.endswith("/scale") else "bias" if v.ndim == 1 else "weight"
        for n, v in found.start.items()
    }
    return {n for n, r in roles.items() if r == role}


def test_the_model_has_every_role(model):
    assert names(model, "weight")
    assert names(model, "bias")
    assert len(names(model, "scale")) > len(names(model, "weight"))
    assert Trained(model).steps(1).moved == set(Trained(model).start)


@pytest.mark.parametrize("role", ["weight", "bias", "scale"])
@pytest.mark.parametrize("text", ["freeze=true", "freeze_from=0", "lr=0"])
def test_a_role_stays_and_the_others_move(model, role, text):
    found = Trained(model, groups=(f"{role}.{text}",)).steps(3)

    assert set(found.start) - found.moved == names(model, role)


def test_a_node_covers_its_weight_its_bias_and_both_scales(model):

    node = next(n for n in model.floats.graph.nodes if n.op == "Conv" and n.inputs[0].inputs)
    found = Trained(model, groups=(f"name:{node.name}.freeze=true",)).steps(3)
    x, weight, bias = (t.name for t in node.inputs)
    scales = {p.parameters for p in model.plan.grid_points() if p.tensor in (x, weight)}

    assert len(scales) == 2
    stayed = set(found.start) - found.moved
    assert stayed == {weight, bias, *(f"{s}/scale" for s in scales)} & set(found.start)


def test_a_tensor_is_named_whole(model):
    weight = min(names(model, "weight"))
    for pattern, expected in ((weight, {weight}), (f"{weight}/scale", {f"{weight}/scale"})):
        found = Trained(model, groups=(f"tensor:{pattern}.freeze=true",)).steps(2)

        assert set(found.start) - found.moved == expected


def test_parameters_freeze_from_a_step_on(model):
    five = Trained(model).steps(5)
    frozen = Trained(model, groups=("weight.freeze_from=5",)).steps(9)
    free = Trained(model).steps(9)

    for name in names(model, "weight"):
        np.testing.assert_array_equal(frozen.values.views[name], five.values.views[name])
    for name in names(model, "scale"):
        np.testing.assert_array_equal(frozen.values.views[name], free.values.views[name])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_group_has_its_own_rate(model, optimizer):
    group = ("weight.lr=1e-3", "bias.lr=2e-3", "scale.lr=3e-3")
    grouped = Trained(model, optimizer=optimizer, lr=9.0, scale_lr=9.0, groups=group).steps(3)
    for role, lr in (("weight", 1e-3), ("bias", 2e-3), ("scale", 3e-3)):
        alone = Trained(model, optimizer=optimizer, lr=lr, scale_lr=lr).steps(3)
        for name in names(model, role):
            np.testing.assert_array_equal(grouped.values.views[name], alone.values.views[name])


@pytest.mark.parametrize(
    ("overrides", "settings", "lr"),
    [
        ((), {}, 5e-4),
        ((), {"optimizer": "adam"}, 5e-4),
        ((), {"optimizer": "sgd"}, 2e-3),
        (("name:/conv1/Conv.bits=4",), {}, 2e-3),
    ],
)
def test_the_rate_follows_the_coarsest_grid(overrides, settings, lr):
    model = calibrated(*overrides)
    given = Trained(model, lr=lr, **settings).steps(3)
    found = Trained(model, **settings).steps(3)

    assert found.updater.lr == lr
    np.testing.assert_array_equal(found.values.buffer, given.values.buffer)


def test_a_given_rate_holds_whatever_the_bits(model):
    assert Trained(model, lr=0.5).updater.lr == 0.5


def test_a_scale_stays_above_the_floor_of_its_rule():
    """Whatever the gradient says; the floor of the rule is far below."""
    model = calibrated("activation.min_range=3.0")
    trained = Trained(model, scale_lr=0.5)
    for step in range(20):
        trained.step(lambda *_: 1, step)
    values = trained.values.views
    activations = [p for p in model.plan.grid_points() if p.role == "activation"]

    assert values["conv1.weight/scale"].max() < 1e-4
    for point in activations:
        levels = 127 if model.params[point.parameters].signed else 255
        assert values[f"{point.parameters}/scale"] == np.float32(3.0 / levels)


def test_later_groups_win(model):
    groups = ("weight.freeze=true", "weight.freeze=false", "bias.lr=1", "bias.freeze=true")
    found = Trained(model, groups=groups).steps(1)

    assert set(found.start) - found.moved == names(model, "bias")


@pytest.mark.parametrize("overrides", [(), ("weight.axis=none",)], ids=["per-axis", "per-tensor"])
def test_a_step_of_a_weight_is_relative_to_its_output_channel(overrides):
    """Adam's first direction is the gradient's sign, whatever scales the channels share."""
    found = Trained(calibrated(*overrides), lr=0.1).steps(1)
    weights = [n for n, v in found.start.items() if v.ndim > 1]
    assert weights
    for name in weights:
        moved = np.abs(found.values.views[name].astype(np.float64) - found.start[name])
        channels = found.start[name].reshape(len(moved), -1).astype(np.float64)
        size = np.sqrt((channels**2).mean(1)).reshape(-1, *[1] * (moved.ndim - 1))
        np.testing.assert_allclose(moved / size, 0.1, rtol=1e-3)


def test_decoupled_decay_shrinks_what_it_covers(model):
    """With no gradient AdamW leaves nothing but the decay: w *= 1 - lr * decay."""
    settings = {"lr": 0.1, "weight_decay": 0.5, "groups": ("bias.weight_decay=0.25",)}
    found = Trained(model, **settings)
    found.step(lambda *_: 0)
    for role, factor in (("weight", 0.95), ("bias", 0.975), ("scale", 1.0)):
        for name in names(model, role):
            expected = found.start[name] * np.float32(factor)
            np.testing.assert_array_equal(found.values.views[name], expected)


def test_coupled_decay_is_a_part_of_adams_gradient(model):
    """Without another gradient, Adam's first direction is the sign of the decay's: the weight's."""
    found = Trained(model, optimizer="adam", lr=0.1, weight_decay=0.5)
    found.step(lambda *_: 0)
    for name in names(model, "weight"):
        moved = found.values.views[name] - found.start[name]
        expected = -0.1 * found.updater.units[name] * np.sign(found.start[name])
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-7)
    assert found.moved == names(model, "weight")


def test_clipping_leaves_frozen_parameters_out(model):
    """Plain descent: the step of all parameters together has the length that was asked for."""
    settings = {"optimizer": "sgd", "lr": 1.0, "clip_norm": 1e-3, "method": "ste"}
    for groups in ((), ("bias.freeze=true",)):
        found = Trained(model, **settings, groups=groups).steps(1)
        moved = [found.values.views[n].astype(np.float64) - v for n, v in found.start.items()]
        length = np.sqrt(sum((m**2).sum() for m in moved))

        assert length == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight", "not of the form SELECTOR.KEY=VALUE"),
        ("weights.lr=1", "unknown selector 'weights'"),
        ("weight:a.lr=1", "unknown selector 'weight:a'"),
        ("name:.lr=1", "unknown selector 'name:'"),
        ("name:(.lr=1", r"'\(' is not a regular expression"),
        ("weight.rate=1", "unknown key 'rate'. Use one of lr, weight_decay"),
        ("weight.freeze=yes", "freeze takes true or false"),
        ("weight.lr=fast", "'fast' is not a number"),
        ("weight.lr=nan", "lr = nan. Give 0 or more"),
        ("weight.lr=-1", "lr = -1. Give 0 or more"),
        ("weight.freeze_from=1.5", "'1.5' is not a number"),
    ],
)
def test_wrong_groups_are_named(text, message):
    with pytest.raises(TrainingError, match=message):
        parse_parameter_group(text)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("name:nothing.lr=1", "lsq"),
        ("tensor:conv.lr=1", "lsq"),
        ("scale.lr=1", "ste"),
        ("zero_point.lr=1", "lsq"),
    ],
)
def test_a_group_that_covers_nothing_is_an_error(model, text, method):
    with pytest.raises(TrainingError, match="matches no trained parameter"):
        Trained(model, groups=(text,), method=method)
