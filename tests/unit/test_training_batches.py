"""Every step's samples: the same for one process and for several, from wherever a run goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxqat.data import InputSpec, open_data
from onnxqat.model import from_proto
from onnxqat.train import Config, Workers
from onnxqat.train.batches import TrainingBatches
from onnxqat.train.losses import LABELS

MODELS = Path(__file__).parents[2] / "models"
COUNT, PIXELS = 50, (1, 28, 28)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images that hold their own number; labels of their last digit."""
    path = tmp_path_factory.mktemp("data") / "numbers.npz"
    numbers = np.arange(COUNT)
    images = np.broadcast_to(numbers[:, None, None, None], (COUNT, *PIXELS))
    np.savez(path, input=images.astype(np.float32), label=numbers % 10)
    with open_data(path, [InputSpec(name="input", shape=("N", *PIXELS), dtype="float32")]) as it:
        yield it


@pytest.fixture(scope="module")
def model():
    return from_proto(onnx.load(MODELS / "lenet5.onnx"))


class Worker(Workers):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def supply(model, data, workers=Worker(0, 1), **settings):  # noqa: B008
    return TrainingBatches(model, data, None, Config(**settings), workers)


def seen(supply, epoch, done=0):
    """Return the numbers of the samples, by step and batch."""
    return [
        [f["input"][:, 0, 0, 0].tolist() for f in step] for step in supply.epoch(epoch, done=done)
    ]


def test_an_epoch_shows_every_sample_once_that_fills_a_step(model, data):
    steps = seen(supply(model, data, batch_size=4, accumulate=3), 1)
    flat = [n for step in steps for batch in step for n in batch]

    assert [[len(batch) for batch in step] for step in steps] == [[4, 4, 4]] * 4
    assert len(set(flat)) == 48


def test_epochs_differ_and_come_again(model, data):
    once, again = (supply(model, data, batch_size=10, seed=3) for _ in range(2))
    first, second, third = (seen(once, epoch) for epoch in (1, 2, 3))

    assert first != second != third
    assert seen(again, 3) == third
    assert seen(again, 1) == first
    assert seen(supply(model, data, batch_size=10, seed=4), 1) != first


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_an_epoch_goes_on_where_it_was_left(model, data, done):
    settings = {"batch_size": 4, "accumulate": 3, "augment": ("crop",)}
    whole = [list(step) for step in supply(model, data, **settings).epoch(2)]
    rest = [list(step) for step in supply(model, data, **settings).epoch(2, done=done)]

    assert len(rest) == len(whole) - done
    for ours, theirs in zip(rest, whole[done:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a["input"], b["input"])
            np.testing.assert_array_equal(a[LABELS], b[LABELS])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_share_what_one_would_accumulate(model, data, accumulate):
    """The same batches, with the same changes of their images, in order of rank."""
    settings = {"batch_size": 3, "augment": ("flip", "crop")}
    alone = supply(model, data, accumulate=3 * accumulate, **settings)
    shared = [
        supply(model, data, Worker(rank, 3), accumulate=accumulate, **settings) for rank in range(3)
    ]

    assert {s.steps for s in shared} == {alone.steps}
    expected = [list(step) for step in alone.epoch(2, done=1)]
    found = [[list(step) for step in s.epoch(2, done=1)] for s in shared]
    assert len(expected) == alone.steps - 1
    for number, step in enumerate(expected):
        theirs = [feeds for worker in found for feeds in worker[number]]
        for ours, other in zip(step, theirs, strict=True):
            np.testing.assert_array_equal(ours["input"], other["input"])
            np.testing.assert_array_equal(ours[LABELS], other[LABELS])
