"""Block reconstruction: what is learned, remembered, and kept in memory."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.nodes import weight_index
from onnxqat.parallel import Workers
from onnxqat.qparams import quantized_range
from onnxqat.repair import original
from onnxqat.repair.originals import note_originals
from onnxqat.train import Checkpoints, Config, StoppedError, finetune
from onnxqat.train.blocks.activations import Activations
from onnxqat.train.blocks.block import BlockTraining, block_loss
from onnxqat.train.blocks.cut import Block
from onnxqat.train.blocks.parts import block_model
from onnxqat.train.blocks.samples import Samples
from onnxqat.train.form import training_form
from onnxqat.train.lowering import sample_shapes
from tests.contents import as_bytes
from tests.digits import calibrated_lenet, training_digits
from tests.oracles import run_ort

FAST = {
    "scope": ("blocks",),
    "block_epochs": 2,
    "block_layers": 1,
    "batch_size": 16,
    "threads": 1,
}
BOTH = FAST | {"scope": ("blocks", "network"), "epochs": 1}
ROUNDED = FAST | {"rounding": "adaround", "block_epochs": 1}


@pytest.fixture(scope="module")
def data():
    with training_digits(220) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(data):
    return calibrated_lenet(data, "weight.bits=2")


@pytest.fixture(scope="module")
def tuned(coarse, data):
    return finetune(coarse, data, config=Config(**FAST))


def stop_at(count: int):
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) >= count


def test_blocks_regain_what_was_lost(coarse, data):
    tuned = finetune(coarse, data, config=Config(**FAST | {"block_epochs": 10}))
    unseen = next(iter(data.batches(200))).inputs
    wanted = run_ort(coarse.floats.to_proto(), unseen)[0]
    before, after = (
        float(np.square(run_ort(model.to_proto(), unseen)[0] - wanted).mean())
        for model in (coarse, tuned.model)
    )

    assert after < 0.3 * before
    assert (tuned.kept, tuned.epochs, tuned.model.state) == ("blocks", 0, "finetuned")
    assert len(tuned.blocks) == sum(
        weight_index(node) is not None for node in coarse.floats.graph.nodes
    )
    assert all(block.after < block.before for block in tuned.blocks if block.kept)
    assert tuned.after.loss < tuned.before.loss


def test_the_start_is_not_changed_and_a_seed_repeats_the_run(coarse, data, tuned):
    before = as_bytes(coarse)
    again = finetune(coarse, data, config=Config(**FAST))
    other = finetune(coarse, data, config=Config(**FAST, seed=1))

    assert as_bytes(coarse) == before
    assert as_bytes(again.model) == as_bytes(tuned.model)
    assert as_bytes(other.model) != as_bytes(tuned.model)


@pytest.mark.parametrize("memory", [0, 1])
def test_tensors_on_disk_give_the_same_bytes(coarse, data, tuned, memory):
    """With one megabyte some lie in memory and some on disk."""
    found = finetune(coarse, data, config=Config(**FAST, block_memory=memory))

    assert as_bytes(found.model) == as_bytes(tuned.model)


def test_blocks_that_do_not_help_are_not_kept(coarse, data):
    wild = Config(**FAST, lr=30.0, scale_lr=3.0, schedule="constant")
    found = finetune(coarse, data, config=wild)

    assert as_bytes(found.model) == as_bytes(coarse)
    assert found.kept == "start"
    assert not any(block.kept for block in found.blocks)
    assert "the blocks were not kept: loss" in found.notes[-1]


@pytest.mark.parametrize("settings", [BOTH, ROUNDED], ids=["both", "adaround"])
def test_a_stopped_run_goes_on_bit_for_bit(coarse, data, tmp_path, settings):
    """Stopped again and again, within blocks, between them and behind them."""
    config, path, stops = Config(**settings), tmp_path / "c", 0
    whole = finetune(coarse, data, config=config)
    resumed = None
    while resumed is None:
        kept = Checkpoints(path, resume=path.exists())
        with suppress(StoppedError):
            resumed = finetune(
                coarse, data, config=config, checkpoints=kept, stop=stop_at(95 + 7 * stops)
            )
        assert path.exists()
        stops += resumed is None

    assert stops > 1
    assert as_bytes(resumed.model) == as_bytes(whole.model)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert (resumed.blocks, resumed.kept) == (whole.blocks, whole.kept)


def test_a_finished_run_is_taken_from_its_checkpoint(coarse, data, tuned, tmp_path):
    config = Config(**FAST)
    finetune(coarse, data, config=config, checkpoints=Checkpoints(tmp_path / "c"))
    kept = Checkpoints(tmp_path / "c", resume=True)
    again = finetune(coarse, data, config=config, checkpoints=kept, stop=lambda: True)

    assert kept.finished
    assert as_bytes(again.model) == as_bytes(tuned.model)
    with pytest.raises(TrainingError, match="--block-layers was 1, but is 2 now"):
        finetune(
            coarse,
            data,
            config=Config(**FAST | {"block_layers": 2}),
            checkpoints=Checkpoints(tmp_path / "c", resume=True),
        )


def test_epochs_behind_blocks_begin_with_them(coarse, data, tuned):
    found = finetune(coarse, data, config=Config(**BOTH))

    assert found.blocks == tuned.blocks
    assert found.before == tuned.before
    assert found.after.loss <= tuned.after.loss
    assert found.epochs == 1


def test_groups_hold_in_every_block(coarse, data):
    frozen = ("weight.freeze=true", "bias.freeze=true")
    found = finetune(coarse, data, config=Config(**FAST, groups=frozen))
    before, after = (m.floats.graph.tensors() for m in (coarse, found.model))

    for point in coarse.plan.points:
        if point.role == "weight":
            np.testing.assert_array_equal(before[point.tensor].values, after[point.tensor].values)
    assert any(not coarse.params[n].same_as(p) for n, p in found.model.params.items())
    with pytest.raises(TrainingError, match="matches no trained parameter"):
        finetune(coarse, data, config=Config(**FAST, groups=("name:nothing.lr=1",)))


def test_what_blocks_cannot_do_is_said(coarse, data):
    two = Workers()
    two.size = 2
    with pytest.raises(TrainingError, match="--scope blocks runs in one process"):
        finetune(coarse, data, config=Config(**FAST), workers=two)
    with pytest.raises(TrainingError, match="--quant-delay applies to training from end to end"):
        finetune(coarse, data, config=Config(**FAST, quant_delay=3))


def test_a_teacher_with_other_tensors_within_is_refused(coarse, data):
    """Twice the values behind the first layer, half of them behind the next: the same outputs."""
    teacher = coarse.floats.copy()
    weights = [
        node.inputs[weight_index(node)]
        for node in teacher.graph.nodes
        if weight_index(node) is not None
    ]
    first = next(n for n in teacher.graph.nodes if weight_index(n) is not None)
    weights[0].values = weights[0].values * np.float32(4)
    first.inputs[2].values = first.inputs[2].values * np.float32(4)
    weights[1].values = weights[1].values / np.float32(4)

    with pytest.raises(TrainingError, match="at which a block ends, has other values"):
        finetune(coarse, data, teacher=teacher, config=Config(**FAST))


def test_the_biases_that_a_repair_changed_do_not_make_the_teacher_another_network(coarse, data):
    floats = coarse.floats.copy()
    layer = next(node for node in floats.graph.nodes if weight_index(node) is not None)
    layer.inputs[2].values = layer.inputs[2].values + np.float32(100)
    note_originals(coarse.floats, floats)
    repaired = coarse.with_params(coarse.params, state="calibrated", floats=floats)

    config = Config(**FAST | {"block_epochs": 1})
    assert finetune(repaired, data, teacher=original(floats), config=config).blocks


# --- one step, by numpy -------------------------------------------------------------------------


class Given:
    """Samples of a block that need no network before it."""

    def __init__(self, store, count, tensors):
        self.samples = Samples.__new__(Samples)
        self.samples.store, self.samples.fixed = store, False
        self.samples.constants, self.samples.batch = {}, count
        self.samples.count = count
        self.samples.quantized, self.samples.floats = {}, {}
        for kind, name, values in tensors:
            rows = store.rows(count, values[0])
            rows.append(values)
            getattr(self.samples, kind)[name] = rows


def test_one_step_of_a_block_is_what_numpy_says(coarse):
    """The last Gemm of LeNet-5 by itself: SGD on its weight by the straight-through gradient."""
    rng = np.random.default_rng(5)
    node = coarse.floats.graph.nodes[-1]
    block = last_layer(coarse, node)
    x_name, w_name, b_name = (tensor.name for tensor in node.inputs)
    x_point = next((p for p in block.plan.points if p.tensor == x_name), None)
    w_point = next(p for p in block.plan.points if p.tensor == w_name)
    weight, bias = (block.floats.graph.tensors()[n].values for n in (w_name, b_name))
    x = rng.normal(size=(8, weight.shape[1])).astype(np.float32)
    target = rng.normal(size=(8, weight.shape[0])).astype(np.float32)
    config = Config(
        scope=("blocks",), batch_size=8, method="ste", optimizer="sgd", momentum=0.0, lr=0.25
    )

    with Activations(1 << 20) as store:
        y_name = node.outputs[0].name
        tensors = [("quantized", x_name, x), ("floats", x_name, x), ("floats", y_name, target)]
        found = Given(store, 8, tensors).samples
        loss = block_loss(found, [y_name])
        training = BlockTraining(
            block, training_form(block, method="ste"), loss, config, still=(), steps=1
        )
        feeds = training.feeds(found, np.arange(8), {x_name: x})
        value = training.step(iter([feeds]), 1.0, 0)

    def grid(values, point):
        params = block.params[point.parameters]
        low, high = quantized_range(point.spec, signed=params.signed)
        scale = params.scale.astype(np.float64)
        if scale.ndim:
            scale = scale.reshape([-1 if i == point.spec.axis else 1 for i in range(values.ndim)])
        zero = np.asarray(params.zero_point, np.float64).reshape(scale.shape)
        levels = np.rint(values / scale) + zero
        return (np.clip(levels, low, high) - zero) * scale, (levels >= low) & (levels <= high)

    xq = x if x_point is None else grid(x, x_point)[0]
    wq, inside = grid(weight.astype(np.float64), w_point)
    y = xq @ wq.T + bias
    y_point = next((p for p in block.plan.points if p.tensor == y_name), None)
    passes = np.ones_like(y)
    if y_point is not None:
        y, passes = grid(y, y_point)
    variance = target.astype(np.float64).var()
    dy = 2 * (y - target) / y.size / variance * passes
    moved = weight - 0.25 * (dy.T @ xq) * inside

    assert value == pytest.approx(np.square(y - target).mean() / variance, rel=1e-5)
    np.testing.assert_allclose(training.values[w_name], moved, rtol=0, atol=1e-6)
    np.testing.assert_allclose(training.values[b_name], bias - 0.25 * dy.sum(0), rtol=0, atol=1e-6)


def last_layer(model, node):
    block = Block(
        inputs=(node.inputs[0].name,),
        outputs=(node.outputs[0].name,),
        nodes=(node.name,),
        layers=(node.name,),
    )
    crossings = frozenset({node.outputs[0].name} & {p.tensor for p in model.plan.points})
    return block_model(model, block, crossings, sample_shapes(model.floats))


def test_parameters_of_an_earlier_block_stay(coarse):
    node = coarse.floats.graph.nodes[-1]
    block = last_layer(coarse, node)
    x_name, w_name, b_name = (tensor.name for tensor in node.inputs)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(8, node.inputs[1].shape[1])).astype(np.float32)
    target = rng.normal(size=(8, node.inputs[1].shape[0])).astype(np.float32)
    config = Config(scope=("blocks",), batch_size=8)
    with Activations(1 << 20) as store:
        y_name = node.outputs[0].name
        tensors = [("quantized", x_name, x), ("floats", x_name, x), ("floats", y_name, target)]
        found = Given(store, 8, tensors).samples
        loss = block_loss(found, [y_name])
        training = BlockTraining(block, training_form(block), loss, config, still={w_name}, steps=5)
        before = {name: value.copy() for name, value in training.values.items()}
        list(training.run(found, (0, 0), error=1.0))

    np.testing.assert_array_equal(training.values[w_name], before[w_name])
    assert not np.array_equal(training.values[b_name], before[b_name])
    assert w_name not in training.tuned
    assert b_name in training.tuned


def test_the_first_step_of_a_weight_is_a_share_of_its_level(coarse):
    """Adam's first direction is 1; two levels by 40 steps are a twentieth of a level."""
    node = coarse.floats.graph.nodes[-1]
    block = last_layer(coarse, node)
    x_name, w_name, _ = (tensor.name for tensor in node.inputs)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(8, node.inputs[1].shape[1])).astype(np.float32)
    y_name = node.outputs[0].name
    target = rng.normal(size=(8, node.inputs[1].shape[0])).astype(np.float32)
    with Activations(1 << 20) as store:
        tensors = [("quantized", x_name, x), ("floats", x_name, x), ("floats", y_name, target)]
        found = Given(store, 8, tensors).samples
        loss, form = block_loss(found, [y_name]), training_form(block)
        moved = {}
        for by_level, groups in ((True, ()), (False, ()), (True, ("weight.lr=0.25",))):
            config = Config(scope=("blocks",), batch_size=8, lr=0.5, groups=groups)
            training = BlockTraining(
                block, form, loss, config, still=(), steps=40, by_level=by_level
            )
            before = training.values[w_name].copy()
            training.step(iter([training.feeds(found, np.arange(8), {x_name: x})]), 1.0, 0)
            moved[by_level, groups] = np.abs(training.values[w_name] - before)

    level = float(block.params[w_name].scale.max())
    own, plain, grouped = moved.values()
    assert own.max() == pytest.approx(2 * level / 40, rel=1e-3)
    np.testing.assert_allclose(grouped, plain / 2, rtol=1e-3, atol=1e-6)
    assert not np.allclose(own, plain)


# --- memory -------------------------------------------------------------------------------------


def test_tensors_beyond_the_limit_lie_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(10, 3, 2)).astype(np.float32) for _ in range(4)]
    with Activations(500) as store:
        made = [store.rows(10, v[0]) for v in values]  # 240 bytes each
        for rows, array in zip(made, values, strict=True):
            rows.append(array[:4])
            rows.append(array[4:])
        chosen = np.array([7, 0, 3])

        assert [rows.in_memory for rows in made] == [240, 240, 0, 0]
        assert store.used == 480
        for rows, array in zip(made, values, strict=True):
            np.testing.assert_array_equal(rows.take(chosen), array[chosen])
        assert len(list(tmp_path.rglob("*.npy"))) == 2
        store.remove(made[0])
        store.remove(made[2])
        assert store.used == 240
        assert len(list(tmp_path.rglob("*.npy"))) == 1
        assert store.rows(10, values[0][0]).in_memory == 240
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(monkeypatch):
    with Activations(0) as store:
        rows = store.rows(2, np.zeros(3, np.float32))
        rows._file.close()
        rows._file = Full()
        with pytest.raises(TrainingError, match=r"No space left.*fewer --block-samples"):
            rows.append(np.zeros((2, 3), np.float32))


class Full:
    def write(self, _data):
        raise OSError(28, "No space left on device")

    def close(self):
        pass


def test_mixed_inputs_hold_values_of_both_networks():
    rng = np.random.default_rng(0)
    with Activations(1 << 20) as store:
        zeros, ones = np.zeros((16, 50), np.float32), np.ones((16, 50), np.float32)
        given = Given(store, 16, [("quantized", "x", zeros), ("floats", "x", ones)]).samples
        rows = np.arange(16)
        share = given.mixed(["x"], rows, 0.25, rng)["x"].mean()

        assert abs(share - 0.25) < 0.05
        assert not given.mixed(["x"], rows, 0.0, rng)["x"].any()
        assert given.mixed(["x"], rows, 1.0, rng)["x"].all()
