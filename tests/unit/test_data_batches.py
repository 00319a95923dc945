"""Order of batches, prefetching, splitting and augmentation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxqat.data import DataSet, InputSpec, augment, open_data, split
from onnxqat.data.arrays import ArraySource
from onnxqat.errors import DataError

SPEC = InputSpec(name="x", shape=("n", 2), dtype="float32")
X = np.arange(40, dtype=np.float32).reshape(20, 2)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataSet]:
    np.savez(tmp_path / "a.npz", x=X, y=np.arange(20))
    with open_data(tmp_path / "a.npz", [SPEC]) as opened:
        yield opened


@pytest.fixture
def workers() -> Callable[[], int]:
    """Counts the threads that a test has started; of earlier tests some may not be collected."""
    others = set(threading.enumerate())

    def count() -> int:
        new = set(threading.enumerate()) - others
        return sum(thread.name.startswith("onnxqat") for thread in new)

    return count


def test_a_last_batch_is_left_out_on_request(data: DataSet) -> None:
    assert [len(b.indices) for b in data.batches(8)] == [8, 8, 4]
    assert [len(b.indices) for b in data.batches(8, drop_last=True)] == [8, 8]
    assert [len(b.indices) for b in data.batches(30)] == [20]
    assert list(data.batches(30, drop_last=True)) == []
    assert list(data.batches(3, indices=np.empty(0, np.int64))) == []


def test_batches_follow_the_indices(data: DataSet) -> None:
    order = np.array([5, 5, 19, 0, 3])
    batches = list(data.batches(2, indices=order))
    np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in batches]), X[order])
    np.testing.assert_array_equal(np.concatenate([b.indices for b in batches]), order)


def test_a_subset_counts_from_zero(data: DataSet) -> None:
    view = data.subset([4, 9, 2]).subset(np.array([2, 0]))
    (batch,) = view.batches(5)
    assert len(view) == 2
    assert view.has_labels
    np.testing.assert_array_equal(batch.inputs["x"], X[[2, 4]])
    np.testing.assert_array_equal(batch.labels, [2, 4])
    np.testing.assert_array_equal(batch.indices, [0, 1])


@pytest.mark.parametrize("indices", [[20], [-1]])
def test_indices_out_of_range(data: DataSet, indices: list[int]) -> None:
    with pytest.raises(IndexError, match=r"must lie in \[0, 20\)"):
        data.subset(indices)


@pytest.mark.parametrize("indices", [[True, False], [0.5], [[1]]])
def test_indices_that_are_none(data: DataSet, indices: Any) -> None:
    with pytest.raises(TypeError, match="indices must be integers"):
        data.batches(2, indices=np.array(indices))


def test_the_batch_size_is_checked_at_once(data: DataSet) -> None:
    with pytest.raises(DataError, match="--batch-size: 0 is not a valid size"):
        data.batches(0)


def test_changing_a_batch_changes_no_data(data: DataSet) -> None:
    for batch in data.batches(7):
        batch.inputs["x"][...] = -1
    np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in data.batches(7)]), X)


def test_the_next_batch_is_read_meanwhile(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    read = ArraySource.read

    def watched(self: ArraySource, key: str, indices: NDArray[np.int64]) -> NDArray[Any]:
        if key == "x":
            seen.append(int(indices[0]))
        return read(self, key, indices)

    monkeypatch.setattr(ArraySource, "read", watched)
    batches = data.batches(4)
    assert seen == []
    next(batches)
    deadline = time.monotonic() + 10
    while len(seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert seen == [0, 4]  # one ahead, not more
    batches.close()  # type: ignore[attr-defined]


def test_an_error_arrives_after_the_batches_before_it(
    tmp_path: Path, workers: Callable[[], int]
) -> None:
    x = X.copy()
    x[9] = np.nan
    np.savez(tmp_path / "a.npz", x=x)
    with open_data(tmp_path / "a.npz", [SPEC]) as data:
        batches = data.batches(4)
        assert [int(next(batches).indices[0]) for _ in range(2)] == [0, 4]
        with pytest.raises(DataError, match="sample 9"):
            next(batches)
    assert workers() == 0


def test_no_thread_outlives_its_iterator(data: DataSet, workers: Callable[[], int]) -> None:
    assert workers() == 0
    for _ in data.batches(4):
        break
    assert workers() == 0
    batches = data.batches(4)
    next(batches)
    assert workers() == 1
    batches.close()  # type: ignore[attr-defined]
    assert workers() == 0
    list(data.batches(4))
    assert workers() == 0


def test_split_is_seeded_and_complete() -> None:
    train, held_out = split(101, 0.1, seed=3)
    assert len(held_out) == 10
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(101))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    np.testing.assert_array_equal(split(101, 0.1, seed=3)[1], held_out)
    assert not np.array_equal(split(101, 0.1, seed=4)[1], held_out)
    assert len(split(5, 0.0, seed=0)[1]) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="is not in"):
        split(10, fraction, seed=0)


@pytest.mark.parametrize("last", [False, True])
def test_augmentation_against_loops(last: bool) -> None:
    images = np.random.default_rng(5).standard_normal((6, 3, 9, 7)).astype(np.float32)
    given = images.transpose(0, 2, 3, 1).copy() if last else images.copy()
    kept = given.copy()
    found = augment(given, ("crop", "flip"), np.random.default_rng(8))
    np.testing.assert_array_equal(given, kept)
    rng = np.random.default_rng(8)
    mirrored, shifts = rng.random(6) < 0.5, rng.integers(0, 9, (6, 2))
    for image, flip, (top, left), result in zip(images, mirrored, shifts, found, strict=True):
        expected = np.empty_like(image)
        source = image[:, :, ::-1] if flip else image
        for row, column in np.ndindex(9, 7):
            expected[:, row, column] = source[
                :, reflected(row + top - 4, 9), reflected(column + left - 4, 7)
            ]
        np.testing.assert_array_equal(result.transpose(2, 0, 1) if last else result, expected)
    assert 0 < mirrored.sum() < 6
    assert found.flags.c_contiguous
    assert found.dtype == np.float32


def reflected(position: int, size: int) -> int:
    if position < 0:
        return -1 - position
    return 2 * size - 1 - position if position >= size else position


def test_no_augmentation_is_a_copy() -> None:
    images = np.zeros((2, 3, 4, 4), np.float32)
    found = augment(images, (), np.random.default_rng(0))
    np.testing.assert_array_equal(found, images)
    assert not np.shares_memory(found, images)


def test_augmentation_that_cannot_be() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="unknown kind 'rotate'"):
        augment(np.zeros((2, 3, 4, 4), np.float32), ("rotate",), rng)
    with pytest.raises(DataError, match="needs images"):
        augment(np.zeros((2, 3), np.float32), ("flip",), rng)
