"""Batches of samples in any order, the next one prepared while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxqat.data.arrays import Header, Source, names
from onnxqat.data.feeds import Feed, InputSpec
from onnxqat.data.preprocess import Preprocessing
from onnxqat.errors import DataError

__all__ = ["Batch", "DataSet", "split"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """Samples ready to feed.

    Attributes
    ----------
    inputs : dict of str to array
        By model input, in its dtype and layout, C-contiguous, first axis = samples.
    labels : int64 of shape (n,), or None
        Class indices, 0 or above.
    indices : int64 of shape (n,)
        Positions of the samples in the `DataSet` that gave the batch.
    arrays : dict of str to array
        Those that `DataSet.with_arrays` asked for.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class DataSet:
    """Samples of a model; `open_data` makes one. A context manager that removes temporary files.

    Parameters
    ----------
    source : Source
        Where rows come from.
    feeds : sequence of Feed
        One per model input.
    label_key : str or None
        The array of labels.
    indices : int64 of shape (n,)
        Samples of the source that belong to the set, in order.
    owner : bool
        Whether closing the set closes the source; a subset does not.
    arrays : sequence of Feed
        Other arrays, see `with_arrays`.
    """

    def __init__(
        self,
        source: Source,
        feeds: Sequence[Feed],
        label_key: str | None,
        indices: NDArray[np.int64],
        *,
        owner: bool,
        arrays: Sequence[Feed] = (),
    ) -> None:
        self._source, self._feeds, self._label_key = source, feeds, label_key
        self._indices, self._owner, self._arrays = indices, owner, arrays

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def has_labels(self) -> bool:
        """Whether batches have labels."""
        return self._label_key is not None

    @property
    def classes(self) -> Mapping[str, int] | None:
        """Class index by folder name; None where the data give the indices themselves."""
        return self._source.classes

    def __enter__(self) -> DataSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove temporary files; no batch can be read afterwards. Subsets close nothing."""
        if self._owner:
            self._source.close()

    def subset(self, indices: ArrayLike) -> DataSet:
        """Return a view of the samples at ``indices`` (integers of shape (n,)), in that order.

        It shares the files of this set and must not outlive its closing.
        """
        chosen = self._indices[_checked_indices(indices, len(self))]
        return self._view(chosen, self._arrays)

    @property
    def array_names(self) -> tuple[str, ...]:
        """The arrays of the data, those of inputs and labels included."""
        return self._source.keys

    def array(self, name: str) -> Header:
        """Return shape and dtype of one sample of an array.

        Raises
        ------
        DataError
            There is none, or it does not hold numbers, or not one of each sample.
        """
        if name not in self._source.keys:
            raise DataError(
                f"{self._source.name}: no array {name!r}. It has {names(self._source.keys)}."
            )
        self._source.count([self._feeds[0].key, name])
        return self._source.sample(name)

    def with_arrays(self, arrays: Mapping[str, tuple[str, str]]) -> DataSet:
        """Return a view whose batches have other arrays too, as they are stored.

        Parameters
        ----------
        arrays : mapping of str to (str, str)
            Array and dtype, by the name that it gets in `Batch.arrays`.
        """
        feeds = []
        for name, (key, dtype) in arrays.items():
            spec = InputSpec(name=name, shape=(None, *self.array(key).shape), dtype=dtype)
            plain = Feed(spec=spec, key=key, preprocessing=Preprocessing(), data_layout=None)
            feeds.append(plain)
        return self._view(self._indices, feeds)

    def _view(self, indices: NDArray[np.int64], arrays: Sequence[Feed]) -> DataSet:
        feeds, label_key = self._feeds, self._label_key
        return DataSet(self._source, feeds, label_key, indices, owner=False, arrays=arrays)

    def batches(
        self,
        batch_size: int,
        *,
        indices: NDArray[np.int64] | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Yield batches, the next one being prepared in a thread meanwhile.

        Parameters
        ----------
        batch_size : int
            Samples per batch; the last batch has what is left.
        indices : int64 of shape (n,), optional
            Samples to visit, in order; all of them by default.
        drop_last : bool
            Leave out a last batch that is not full.

        Raises
        ------
        DataError
            A batch size below 1; while iterating, a sample that cannot be read or holds values
            that the model cannot take.
        """
        if batch_size < 1:
            raise DataError(f"--batch-size: {batch_size} is not a size. Give 1 or more.")
        order = np.arange(len(self)) if indices is None else _checked_indices(indices, len(self))
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        return _prefetched(
            partial(self._read, order[start : start + batch_size])
            for start in range(0, stop, batch_size)
        )

    def _read(self, positions: NDArray[np.int64]) -> Batch:
        rows = self._indices[positions]
        inputs, arrays = (
            {
                feed.spec.name: feed.convert(
                    self._source.read(feed.key, rows), partial(self._origin, feed.key, rows)
                )
                for feed in feeds
            }
            for feeds in (self._feeds, self._arrays)
        )
        labels = self._read_labels(rows)
        return Batch(inputs=inputs, labels=labels, indices=positions, arrays=arrays)

    def _origin(self, key: str, rows: NDArray[np.int64], position: int) -> str:
        return self._source.origin(key, int(rows[position]))

    def _read_labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        if self._label_key is None:
            return None
        labels = self._source.read(self._label_key, rows).astype(np.int64)
        if (labels < 0).any():
            position = int(np.argmax(labels < 0))
            raise DataError(
                f"{self._origin(self._label_key, rows, position)} is {labels[position]}. "
                "Class indices start at 0."
            )
        return labels


def _checked_indices(indices: ArrayLike, count: int) -> NDArray[np.int64]:
    array = np.asarray(indices)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers of shape (n,), not {array.dtype} {array.shape}")
    if array.min() < 0 or array.max() >= count:
        raise IndexError(f"indices must lie in [0, {count})")
    return array.astype(np.int64)


def _prefetched(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what the jobs return, the next one running in a thread while a result is used."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnxqat-data")
    try:
        ahead: Future[T] | None = None
        for job in jobs:
            current, ahead = ahead, pool.submit(job)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()
    finally:  # also when the caller gives up, or a job failed
        pool.shutdown(wait=True, cancel_futures=True)


def split(count: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide samples at random.

    Parameters
    ----------
    count : int
        Number of samples.
    fraction : float
        Share to hold out, in [0, 1); the number is rounded to the nearest.
    seed : int
        The same seed gives the same division.

    Returns
    -------
    train, held_out : int64 of shape (n,)
        Sorted; together every index below ``count`` once.

    Raises
    ------
    DataError
        The fraction is out of range.

    Examples
    --------
    >>> train, held_out = split(10, 0.2, seed=0)
    >>> len(train), len(held_out)
    (8, 2)
    """
    if not 0 <= fraction < 1:
        raise DataError(f"held-out fraction: {fraction} is not in [0, 1). Give 0.1, for instance.")
    order = np.random.default_rng(seed).permutation(count)
    held_out = round(count * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
