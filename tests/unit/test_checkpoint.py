"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.train import Checkpoints, Config, StoppedError, finetune
from onnxqat.train.monitoring.divergence import LossHistory
from tests.contents import as_bytes
from tests.digits import calibrated_lenet, training_digits

FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "lr": 5e-4}  # 12 steps an epoch
RISING = {"lr": 1.0, "scale_lr": 0.5, "loss": "kl", "epochs": 6}  # 72 steps, guarded by 7


@pytest.fixture(scope="module")
def data():
    with training_digits(220) as opened:
        yield opened


@pytest.fixture(scope="module")
def models(data):
    return {bits: calibrated_lenet(data, f"weight.bits={bits}") for bits in (2, 8)}


def stop_at(count: int):
    """Return a question that is answered by yes from the ``count``-th time on."""
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) >= count


def stopped(model, data, path, count, config, **options):
    with pytest.raises(StoppedError, match="Continue with the same command and --resume"):
        finetune(
            model,
            data,
            config=config,
            checkpoints=Checkpoints(path, **options),
            stop=stop_at(count),
        )


PLAIN, SGD = {}, {"optimizer": "sgd", "lr": 1e-4}
AUGMENTED = {"method": "ste", "augment": ("crop", "flip", "resized-crop"), "seed": 5}
AVERAGED = {
    "ema": 0.8,
    "accumulate": 2,
    "groups": ("weight.freeze_from=7",),
    "augment": ("crop",),
}


@pytest.fixture(scope="module")
def uninterrupted(models, data):
    """Return a function: settings -> the result of a run with them that nobody stops."""
    found = {}

    def result(config):
        if config not in found:
            found[config] = finetune(models[2], data, config=config)
        return found[config]

    return result


# Asked after each batch of the first evaluation (2, and 1 full one for the loss), after each of 11
# steps, and each batch later.
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        *((PLAIN, count) for count in (4, 10, 15, 17, 18)),
        *((SGD, count) for count in (10, 17)),
        *((AUGMENTED, count) for count in (10, 15, 18)),
        *((AVERAGED, count) for count in (4, 10, 17)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(models, data, tmp_path, uninterrupted, settings, count):
    config = Config(**(FAST | settings))
    whole = uninterrupted(config)
    stopped(models[2], data, tmp_path / "c", count, config)
    resumed = finetune(
        models[2], data, config=config, checkpoints=Checkpoints(tmp_path / "c", resume=True)
    )

    assert whole.best_epoch > 0
    assert as_bytes(resumed.model) == as_bytes(whole.model)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert (resumed.best_epoch, resumed.notes) == (whole.best_epoch, whole.notes)


def test_the_guard_and_the_smaller_rates_go_on_too(models, data, tmp_path):
    """Stopped again and again, while the loss rises and training starts again."""
    config = Config(**(FAST | RISING))
    reports = []
    whole = finetune(models[8], data, config=config, report=reports.append)
    stopped(models[8], data, tmp_path / "c", 20, config)
    told = []
    for _ in range(100):
        options = {"report": told.append, "config": config, "stop": stop_at(22)}
        try:
            resumed = finetune(
                models[8], data, checkpoints=Checkpoints(tmp_path / "c", resume=True), **options
            )
            break
        except StoppedError:
            continue

    assert len(whole.notes) >= 2
    assert (resumed.notes, resumed.epochs) == (whole.notes, whole.epochs)
    assert as_bytes(resumed.model) == as_bytes(whole.model)
    assert [(r.step, r.loss) for r in told if not r.validation][-20:] == [
        (r.step, r.loss) for r in reports if not r.validation
    ][-20:]


def test_a_checkpoint_is_written_at_its_interval(models, data, tmp_path):
    path, config = tmp_path / "c", Config(**FAST)
    steps = []

    def note(progress):
        steps.append(record(path)["step"] if path.exists() else 0)

    finetune(models[2], data, config=config, report=note, checkpoints=Checkpoints(path, steps=5))

    # told after each of 24 steps, before the checkpoint is written, and after each epoch
    assert steps == [0] * 5 + [5] * 5 + [10] * 2 + [10] + [10] * 3 + [15] * 5 + [20] * 4 + [20]


def record(path) -> dict:
    with np.load(path, allow_pickle=False) as stored:
        return json.loads(stored["record"].tobytes())["record"]


def test_stopping_before_the_first_step_keeps_nothing(models, data, tmp_path):
    with pytest.raises(StoppedError, match="before the first step"):
        finetune(
            models[2],
            data,
            config=Config(**FAST),
            checkpoints=Checkpoints(tmp_path / "c"),
            stop=lambda: True,
        )

    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def kept(models, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "c"
    stopped(models[2], data, path, 9, Config(**FAST))
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 1e-3}, "--lr was 0.0005, but is 0.001 now"),
        ({"loss": "kl"}, "--loss was not given, but is kl now"),
        ({"augment": ("flip",)}, r"--augment was \[\], but is \['flip'\] now"),
        ({"batch_size": 8}, "--batch-size was 16, but is 8 now"),
    ],
)
def test_other_settings_are_named(models, data, kept, changed, message):
    with pytest.raises(TrainingError, match=message):
        finetune(
            models[2],
            data,
            config=Config(**(FAST | changed)),
            checkpoints=Checkpoints(kept, resume=True),
        )


def test_other_model_data_or_teacher_is_named(models, data, kept):
    config, checkpoints = Config(**FAST), Checkpoints(kept, resume=True)
    with pytest.raises(TrainingError, match="the model was"):
        finetune(models[8], data, config=config, checkpoints=checkpoints)
    with pytest.raises(TrainingError, match=r"the training data was 198 samples.*180 samples"):
        finetune(models[2], data.subset(np.arange(200)), config=config, checkpoints=checkpoints)
    with pytest.raises(TrainingError, match=r"the training data was 198 samples, .* 198 samples, "):
        finetune(
            models[2], data.subset(np.arange(220)[::-1]), config=config, checkpoints=checkpoints
        )


def test_other_held_out_data_are_named(models, data, tmp_path):
    config, held_out = Config(**FAST), [data.subset(np.arange(n)) for n in (40, 30)]
    with pytest.raises(StoppedError):
        finetune(
            models[2],
            data,
            validation=held_out[0],
            config=config,
            checkpoints=Checkpoints(tmp_path / "c"),
            stop=stop_at(9),
        )
    with pytest.raises(TrainingError, match=r"the held-out data was 40 samples.*is 30 samples"):
        finetune(
            models[2],
            data,
            validation=held_out[1],
            config=config,
            checkpoints=Checkpoints(tmp_path / "c", resume=True),
        )


def spoil(source: Path, target: Path, kind: str) -> None:
    with np.load(source, allow_pickle=False) as stored:
        members = dict(stored)
    text = members["record"].tobytes()
    if kind == "shape":
        members["values"] = members["values"][:-1]
    elif kind == "object":
        members["values"] = np.array([{}], object)
    elif kind == "schema":
        text = text.replace(b"checkpoint/1", b"checkpoint/9")
    elif kind == "deep":
        text = b"[" * 100_000
    elif kind == "type":
        text = text.replace(b'"step": ', b'"step": "x')
    elif kind == "absent":
        del members["best"]
    members["record"] = np.frombuffer(text, np.uint8)
    save = np.savez_compressed if kind == "compressed" else np.savez
    with target.open("wb") as file:
        save(file, **members)
    if kind == "cut":
        target.write_bytes(target.read_bytes()[:-400])
    elif kind == "text":
        target.write_text("text\n")


@pytest.mark.parametrize(
    "kind",
    ["shape", "object", "schema", "deep", "type", "absent", "compressed", "cut", "text"],
)
def test_what_is_no_checkpoint_is_refused(models, data, kept, tmp_path, kind):
    spoil(kept, tmp_path / "c", kind)
    with pytest.raises(TrainingError, match="c: is not a checkpoint of this version"):
        finetune(
            models[2],
            data,
            config=Config(**FAST),
            checkpoints=Checkpoints(tmp_path / "c", resume=True),
        )


def test_nothing_to_resume_is_said(models, data, tmp_path):
    with pytest.raises(TrainingError, match=r"c: no such file. Leave out --resume to start"):
        finetune(
            models[2],
            data,
            config=Config(**FAST),
            checkpoints=Checkpoints(tmp_path / "c", resume=True),
        )


def test_a_checkpoint_is_a_plain_archive(kept):
    with zipfile.ZipFile(kept) as archive:
        names = sorted(member.filename for member in archive.infolist())

    assert names == [
        "best.npy",
        "optimizer/mean.npy",
        "optimizer/square.npy",
        "record.npy",
        "values.npy",
    ]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to make a file larger than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_once_and_the_last_checkpoint_stays(kept, tmp_path, caplog):
    (tmp_path / "c").write_bytes(kept.read_bytes())
    checkpoints = Checkpoints(tmp_path / "c")
    values = {"values": np.zeros(10_000, np.float32)}
    with largest_file(8000):
        assert not checkpoints.save({}, LossHistory(window=0), values)
        assert not checkpoints.save({}, LossHistory(window=0), values)

    (message,) = caplog.messages
    assert "c: cannot be written (File too large)." in message
    assert message.endswith("Training continues without this checkpoint.")
    assert (tmp_path / "c").read_bytes() == kept.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert not checkpoints.written
    assert checkpoints.save({}, LossHistory(window=0), values)
    assert checkpoints.written


def test_training_goes_on_without_checkpoints(models, data, tmp_path, uninterrupted):
    config, checkpoints = Config(**FAST), Checkpoints(tmp_path / "c", steps=5)
    whole = uninterrupted(config)
    with largest_file(8000):
        result = finetune(models[2], data, config=config, checkpoints=checkpoints)
        with pytest.raises(StoppedError, match=r"Interrupted at step \d of 24\. Nothing was kept"):
            finetune(models[2], data, config=config, checkpoints=checkpoints, stop=stop_at(9))

    assert as_bytes(result.model) == as_bytes(whole.model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{}, {"patience": 1, "lr": 1e-9, "epochs": 9}])
def test_a_finished_run_is_kept_and_not_trained_again(models, data, tmp_path, settings):
    config = Config(**(FAST | settings))
    whole = finetune(
        models[2], data, config=config, checkpoints=Checkpoints(tmp_path / "c", steps=5)
    )
    told = []
    checkpoints = Checkpoints(tmp_path / "c", resume=True)
    again = finetune(models[2], data, config=config, checkpoints=checkpoints, report=told.append)

    assert told == []
    assert checkpoints.finished
    assert as_bytes(again.model) == as_bytes(whole.model)
    assert (again.before, again.after, again.notes) == (whole.before, whole.after, whole.notes)
    assert (again.epochs, again.best_epoch) == (whole.epochs, whole.best_epoch)
