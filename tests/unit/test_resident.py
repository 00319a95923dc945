"""Training whose arrays stay on a device: on the CPU's memory here, against numpy's training."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.device import Device
from onnxqat.errors import TrainingError
from onnxqat.train import Checkpoints, Config, DivergedError, StoppedError, finetune
from onnxqat.train.adaround import regularizer_gradient
from onnxqat.train.monitoring.pace import Pace
from onnxqat.train.resident.arrays import DeviceVector, Layout
from onnxqat.train.resident.feeds import ahead
from onnxqat.train.resident.rounding import pressure_graph
from onnxqat.train.resident.step import DeviceStep
from onnxqat.train.resident.updater import DeviceUpdater, layout_of
from tests.descent import Trained
from tests.digits import calibrated_lenet, training_digits
from tests.oracles import run_ort
from tests.unit.test_updater import network

RESIDENT = Device(resident=True)
ULP = 4  # of the larger of a value before and after
POWERS = ("activation.symmetric=true", "activation.power_of_two=true")
FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "lr": 5e-4}  # 12 steps an epoch


class OnDevice:
    """The parameters of a `Trained` on a device, moved by a graph."""

    def __init__(self, trained: Trained) -> None:
        shapes = {name: value.shape for name, value in trained.values.views.items()}
        plan = trained.updater
        self.layout = layout_of(plan, shapes)
        self.values, self.gradients = (DeviceVector(RESIDENT, self.layout.size) for _ in range(2))
        self.updater = DeviceUpdater(plan, self.layout, self.values, self.gradients, RESIDENT)

    def step(self, trained: Trained, factor: float, step: int) -> dict[str, np.ndarray]:
        """Move what a `Trained` holds, before that moves itself; return the outcome."""
        plan, views = trained.updater, trained.gradients.views
        self.values.set(self.layout.joined(trained.values.views))
        self.gradients.set(self.layout.joined(views))
        for name, buffer in plan.optimizer.buffers.items():
            ends = np.cumsum([view.size for view in views.values()])[:-1]
            parts = zip(views, np.split(buffer, ends), strict=True)
            state = {n: part.reshape(views[n].shape) for n, part in parts}
            self.updater.state[name].set(self.layout.joined(state))
        if plan.latents:
            self.updater.state["latent"].set(self.layout.joined(plan.latents))
        self.updater.step(factor, step)
        return self.layout.views(self.values.get())


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "lr": 0.01},
        {"optimizer": "sgd", "momentum": 0.5, "nesterov": True, "weight_decay": 0.2, "lr": 0.01},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.3, "groups": ("scale.weight_decay=0.5",)},
        {"optimizer": "adam", "weight_decay": 0.3},
        {"clip_norm": 0.5},
        {"clip_norm": 1e9, "clip_value": 0.02},
        {"groups": ("bias.lr=0.1", "tensor:w3.freeze=true", "scale.freeze_from=2")},
        {"optimizer": "sgd", "lr": 0.01, "groups": ("weight.freeze_from=1", "scale.freeze=true")},
    ],
    ids=str,
)
@pytest.mark.parametrize("overrides", [(), POWERS], ids=["plain", "powers"])
def test_the_optimizers_graph_is_numpys_optimizer(settings, overrides):
    """To 4 ulp a parameter and step, from the same state; values are moved by percents."""
    rates = {"lr": 0.03, "scale_lr": 0.05} | settings
    method = "lsq" if overrides else "lsq+"
    trained, rng = (
        Trained(network("N", *overrides), method=method, **rates),
        np.random.default_rng(5),
    )
    twin = OnDevice(trained)
    for step in range(4):
        before = {name: view.copy() for name, view in trained.values.views.items()}
        for name, view in trained.gradients.views.items():
            size = 1e4 if name.endswith("scale") else 1.0
            view[...] = size * rng.normal(size=view.shape)
        factor = 0.3 + 0.2 * step
        found = twin.step(trained, factor, step)
        trained.updater.step(factor, step)

        for name, expected in trained.values.views.items():
            unit = np.spacing(np.maximum(abs(before[name]), abs(expected)))
            assert (abs(found[name] - expected) <= ULP * unit).all(), (name, step)
        state = {n: trained.updater.optimizer.buffers.get(n) for n in twin.updater.state}
        if "latent" in state:
            latents = twin.layout.views(twin.updater.state["latent"].get())
            for name, expected in trained.updater.latents.items():
                np.testing.assert_allclose(latents[name], expected, rtol=ULP * 2**-23)
    assert trained.moved


def test_a_layout_gives_back_what_it_joined():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (), "c": (64,), "d": (65,)}
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    layout = Layout(shapes)
    vector = layout.joined(arrays)

    assert layout.starts == {"a": 0, "b": 64, "c": 128, "d": 192}
    assert layout.size == 320
    assert layout.span(["b", "c"]) == (64, 128)
    for name, view in layout.views(vector).items():
        np.testing.assert_array_equal(view, arrays[name])
    assert np.count_nonzero(vector) == sum(a.size for a in arrays.values())


def test_a_thread_takes_items_ahead_and_hands_on_what_goes_wrong():
    taken = []

    def items():
        for number in range(5):
            taken.append(number)
            yield number
        raise ValueError("the end")

    found = ahead(items(), 2)
    assert next(found) == 0
    found.close()
    assert len(taken) < 5
    with pytest.raises(ValueError, match="the end"):
        list(ahead(items(), 3))
    assert list(ahead(iter("abc"), 7)) == ["a", "b", "c"]


@pytest.fixture(scope="module")
def data():
    with training_digits(220) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(data):
    return calibrated_lenet(data, "weight.bits=2")


def as_bytes(model) -> bytes:
    return model.to_proto().SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "lr": 1e-4, "clip_norm": 1.0},
        {"ema": 0.8, "accumulate": 2, "quant_delay": 3, "augment": ("crop",)},
        {"method": "moving-average", "averaging_constant": 0.2},
        {"method": "lsq+", "groups": ("weight.freeze_from=7",)},
    ],
    ids=str,
)
def test_a_run_on_a_device_is_that_of_numpy(coarse, data, settings):
    """The optimizers' few ulp grow over 24 steps through rounding to levels, but not far."""
    config = Config(**FAST | settings)
    expected = finetune(coarse, data, config=config)
    found = finetune(coarse, data, config=config, device=RESIDENT)
    tensors, others = (m.model.floats.graph.tensors() for m in (found, expected))

    assert found.best_epoch == expected.best_epoch
    for (_, one), (_, other) in zip(found.tried, expected.tried, strict=True):
        assert one.max_abs_diff == pytest.approx(other.max_abs_diff, rel=0.01)
    if not expected.best_epoch:  # the start is kept, of which nothing moved
        return
    for name in ("conv1.weight", "fc2.weight", "fc3.bias"):
        moved = abs(others[name].values - coarse.floats.graph.tensors()[name].values).max()
        assert moved > 0
        assert abs(tensors[name].values - others[name].values).max() < 1e-3 * moved
    for name, params in expected.model.params.items():
        np.testing.assert_allclose(found.model.params[name].scale, params.scale, rtol=1e-4)
    assert found.after.agreement == pytest.approx(expected.after.agreement, abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": 0.8, "accumulate": 2, "groups": ("weight.freeze_from=7",)},
        {"method": "moving-average"},
    ],
    ids=str,
)
def test_a_stopped_run_on_a_device_goes_on_bit_for_bit(coarse, data, tmp_path, settings):
    config, path = Config(**FAST | settings), tmp_path / "c"
    whole = finetune(coarse, data, config=config, device=RESIDENT)
    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        finetune(coarse, data, config=config, device=RESIDENT, checkpoints=Checkpoints(path),
                 stop=lambda: next(asked) >= 9)  # fmt: skip
    again = Checkpoints(path, resume=True)
    resumed = finetune(coarse, data, config=config, device=RESIDENT, checkpoints=again)

    assert as_bytes(resumed.model) == as_bytes(whole.model)


def test_a_run_goes_on_elsewhere_only_if_that_is_forced(coarse, data, tmp_path):
    config, path, asked = Config(**FAST), tmp_path / "c", iter(range(1000))
    with pytest.raises(StoppedError):
        finetune(coarse, data, config=config, checkpoints=Checkpoints(path),
                 stop=lambda: next(asked) >= 9)  # fmt: skip
    with pytest.raises(TrainingError, match=r"--device was cpu, but is .*also pass --force"):
        finetune(coarse, data, config=config, device=RESIDENT,
                 checkpoints=Checkpoints(path, resume=True))  # fmt: skip
    forced = Checkpoints(path, resume=True, elsewhere=True)
    resumed = finetune(coarse, data, config=config, device=RESIDENT, checkpoints=forced)
    whole = finetune(coarse, data, config=config)
    tensors, others = (m.model.floats.graph.tensors() for m in (resumed, whole))

    for name in ("conv1.weight", "fc2.weight"):
        np.testing.assert_allclose(tensors[name].values, others[name].values, rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_named_on_a_device(coarse, data, monkeypatch):
    run = DeviceStep.run

    def spoiled(self, feeds):
        loss, _ = run(self, feeds)
        vector = self.written.get()
        self.layout.views(vector)["fc3.weight"][...] = np.inf
        self.written.set(vector)
        return loss, self.check()[1]

    monkeypatch.setattr(DeviceStep, "run", spoiled)
    with pytest.raises(
        DivergedError, match=r"the gradient of 'fc3.weight' is not finite"
    ) as caught:
        finetune(coarse, data, config=Config(**FAST), device=RESIDENT)

    assert as_bytes(caught.value.outcome.model) == as_bytes(coarse)
    frozen = Config(**FAST, groups=("tensor:fc3.weight.freeze=true",))
    assert finetune(coarse, data, config=frozen, device=RESIDENT).epochs == 2


def test_minutes_choose_the_epochs_by_the_time_of_the_first_steps(coarse, data, monkeypatch):
    """12 steps of a second and an evaluation of less: an epoch of 12 to 13 seconds."""
    monkeypatch.setattr(Pace, "step", 1.0)
    said = []
    config = Config(**FAST | {"epochs": None}, minutes=1)
    result = finetune(coarse, data, config=config, say=said.append)

    assert result.epochs == len(result.tried) == 5
    assert any(line.startswith("5 epochs take about 1 min: 1 s a step") for line in said)
    assert 0 < result.waiting < 1 < result.samples_per_second
    with pytest.raises(TrainingError, match="epochs and minutes are both given"):
        Config(epochs=2, minutes=1)


# --- blocks -------------------------------------------------------------------------------------

BLOCKS = {
    "scope": ("blocks",),
    "block_epochs": 1,
    "block_layers": 2,
    "batch_size": 16,
    "threads": 1,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"rounding": "adaround", "accumulate": 2, "groups": ("tensor:fc3.weight.freeze=true",)},
        {"method": "moving-average", "averaging_constant": 0.2},
    ],
    ids=str,
)
def test_blocks_on_a_device_are_those_of_numpy(coarse, data, settings):
    config = Config(**BLOCKS | settings)
    expected = finetune(coarse, data, config=config)
    found = finetune(coarse, data, config=config, device=RESIDENT)
    tensors, others, starts = (
        m.floats.graph.tensors() for m in (found.model, expected.model, coarse)
    )

    assert expected.kept == found.kept
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        assert one.kept == other.kept
        assert one.before == pytest.approx(other.before, rel=0.01)
        assert one.after == pytest.approx(other.after, rel=0.01)
        assert one.after != one.before
    if settings.get("method") == "moving-average":  # coarse weights lose by ranges of extremes
        return
    for name in ("conv1.weight", "fc2.weight", "fc3.bias"):
        moved = abs(others[name].values - starts[name].values)
        apart = abs(tensors[name].values - others[name].values)
        assert moved.max() > 0
        assert apart.mean() < 0.01 * moved.mean()


def test_the_regularizers_graph_is_numpys():
    rng = np.random.default_rng(3)
    values = {"a": rng.normal(size=(4, 3)), "b": 4 * rng.normal(size=(50,))}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    graph = pressure_graph({name: value.size for name, value in values.items()})
    beta, weight = 3.5, 2.0
    feeds = {"factor": np.float32(-2 * beta * weight), "exponent": np.float32(beta - 1)}
    feeds = {name: np.asarray(value) for name, value in feeds.items()}
    for name, value in values.items():
        feeds |= {name: value.reshape(-1), f"{name}/gradient": np.ones(value.size, np.float32)}
    found = dict(zip(["a/sum", "b/sum"], run_ort(graph, feeds), strict=True))

    for name, value in values.items():
        expected = 1 + weight * regularizer_gradient(value.astype(np.float64), beta).reshape(-1)
        np.testing.assert_allclose(found[f"{name}/sum"], expected, rtol=0, atol=1e-6)
        assert np.ptp(expected) > 0.01
