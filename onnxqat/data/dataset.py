"""Batches of samples in any order; the next batch is prepared while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxqat.data.ahead import prefetched
from onnxqat.data.arrays import BrokenError, Header, Source, names
from onnxqat.data.batch import Batch
from onnxqat.data.batching import Batching, Value
from onnxqat.data.feeds import Feed, InputSpec
from onnxqat.data.preprocess import Preprocessing, Said
from onnxqat.errors import DataError

__all__ = ["DataSet", "Intake"]

DEFAULT_SIZE = 32  # of a batch, if neither the model nor the user sets it


@dataclass(frozen=True, kw_only=True)
class Intake:
    """How arrays become the inputs of a model.

    Attributes
    ----------
    feeds : tuple of Feed
        One for each input that takes samples.
    values : tuple of Value
        One for each input without a batch axis.
    batching : Batching
        The inputs that take samples, and the batch size.
    """

    feeds: tuple[Feed, ...]
    values: tuple[Value, ...]
    batching: Batching


class DataSet:
    """Samples for a model, opened by `open_data`. A context manager that removes temporary files.

    Parameters
    ----------
    source : Source
        The arrays.
    intake : Intake
        How the arrays become model inputs.
    label_key : str or None
        Name of the array of labels.
    indices : int64 of shape (n,)
        Indices of the source's samples that belong to the set, in order.
    owner : bool
        Whether closing the set closes the source; a subset does not.
    arrays : sequence of Feed
        Other arrays, see `with_arrays`.
    said : Said
        The user's settings.
    """

    def __init__(
        self,
        source: Source,
        intake: Intake,
        label_key: str | None,
        indices: NDArray[np.int64],
        *,
        owner: bool,
        arrays: Sequence[Feed] = (),
        said: Said = Said(),  # noqa: B008 (frozen)
    ) -> None:
        self._source, self._intake, self._label_key = source, intake, label_key
        self._indices, self._owner, self._arrays = indices, owner, arrays
        self.said = said

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        inputs = ", ".join(f"'{feed.spec.name}'" for feed in self._intake.feeds)
        labels = "with labels" if self.has_labels else "without labels"
        return f"DataSet('{self.name}', {len(self)} samples {labels}, for {inputs})"

    @property
    def name(self) -> str:
        """Name of the data, for messages."""
        return self._source.name

    @property
    def has_labels(self) -> bool:
        """Whether batches have labels."""
        return self._label_key is not None

    def label_count(self) -> int | None:
        """Return the number of different labels; None without labels."""
        labels = self._read_labels(self._indices)
        return None if labels is None else len(np.unique(labels))

    @property
    def classes(self) -> Mapping[str, int] | None:
        """Class index of each folder name; None if the data contain the indices themselves."""
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
        """Remove temporary files; no batch can be read afterwards. Has no effect on a subset."""
        if self._owner:
            self._source.close()

    def subset(self, indices: ArrayLike) -> DataSet:
        """Return a view of the samples at ``indices`` (integers of shape (n,)), in that order.

        It shares the files of this set, and cannot be used after this set is closed.
        """
        chosen = self._indices[_checked_indices(indices, len(self))]
        return self._view(chosen, self._arrays)

    @property
    def moved_arrays(self) -> Set[str]:
        """The arrays of positions in the images, which augmentation moves too."""
        return self._source.moved

    @property
    def pixels(self) -> dict[str, Preprocessing | None]:
        """By input: the preprocessing of its pixels from 0 to 255; None if it has no pixels."""
        return {
            feed.spec.name: feed.preprocessing if self._of_pixels(feed) else None
            for feed in self._intake.feeds
        }

    def _of_pixels(self, feed: Feed) -> bool:
        return feed.data_layout is not None and self.array(feed.key).dtype == np.uint8

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of all arrays of the data, including those of inputs and labels."""
        return self._source.keys

    @property
    def other_arrays(self) -> tuple[str, ...]:
        """Names of the arrays with one row per sample, except those of inputs and labels."""
        values = {value.name for value in self._intake.values}
        used = {feed.key for feed in self._intake.feeds} | {self._label_key} | values
        return tuple(
            name for name in self._source.keys if name not in used and self._is_whole(name)
        )

    def _is_whole(self, name: str) -> bool:
        try:
            self.array(name)
        except DataError:
            return False
        return True

    def array(self, name: str) -> Header:
        """Return shape and dtype of one sample of an array.

        Raises
        ------
        DataError
            There is no such array, it does not contain numbers, or not one row per sample.
        """
        if name not in self._source.keys:
            raise DataError(
                f"{self._source.name}: no array {name!r}. It has {names(self._source.keys)}."
            )
        self._source.count([self._intake.feeds[0].key, name])
        return self._source.sample(name)

    def with_arrays(self, arrays: Mapping[str, tuple[str, str]]) -> DataSet:
        """Return a view whose batches also have other arrays, as they are stored.

        Arrays that were requested before are kept, unless a new one has the same name.

        Parameters
        ----------
        arrays : mapping of str to (str, str)
            Name of the array and dtype, by the name to use in `Batch.arrays`.
        """
        feeds = []
        for name, (key, dtype) in arrays.items():
            spec = InputSpec(name=name, shape=(None, *self.array(key).shape), dtype=dtype)
            plain = Feed(spec=spec, key=key, preprocessing=Preprocessing(), data_layout=None)
            feeds.append(plain)
        kept = [feed for feed in self._arrays if feed.spec.name not in arrays]
        return self._view(self._indices, [*kept, *feeds])

    def in_batches_of(self, length: int, name: str) -> DataSet:
        """Return a view whose batches all have ``length`` samples, as model input ``name`` needs.

        Raises
        ------
        DataError
            The set was opened for a model with another fixed batch size.
        """
        if self.fixed_batch not in (None, length):
            raise DataError(
                f"Model input {name!r} takes batches of {length}, but the data were opened for "
                f"batches of {self.fixed_batch}. Open them for this model."
            )
        fixed = replace(self._intake.batching, length=length, fixed_by=name)
        intake = replace(self._intake, batching=fixed)
        return self._view(self._indices, self._arrays, intake)

    def _view(
        self, indices: NDArray[np.int64], arrays: Sequence[Feed], intake: Intake | None = None
    ) -> DataSet:
        intake, label_key = intake or self._intake, self._label_key
        return DataSet(
            self._source,
            intake,
            label_key,
            indices,
            owner=False,
            arrays=arrays,
            said=self.said,
        )

    @property
    def fixed_batch(self) -> int | None:
        """Fixed batch size of the model; None if it takes any."""
        return self._intake.batching.length

    @property
    def sample_inputs(self) -> tuple[str, ...]:
        """Names of the model inputs that take samples; the others take one value for all."""
        return self._intake.batching.samples

    def batch_size(self, wanted: int | None = None, *, default: int = DEFAULT_SIZE) -> int:
        """Return the number of samples per batch.

        Parameters
        ----------
        wanted : int, optional
            Batch size that the user asks for.
        default : int
            Batch size if neither the user nor the model sets it.

        Raises
        ------
        DataError
            ``wanted`` is below 1, or differs from the model's fixed batch size.
        """
        fixed = self._intake.batching
        if wanted is not None and wanted < 1:
            raise DataError(f"--batch-size: {wanted} is not a valid size. Give 1 or more.")
        if fixed.length is not None and wanted not in (None, fixed.length):
            raise DataError(
                f"--batch-size {wanted}: model input {fixed.fixed_by!r} takes batches of "
                f"{fixed.length} only. Leave --batch-size out, or export with a dynamic batch."
            )
        return fixed.length or wanted or default

    def batches(
        self,
        batch_size: int | None = None,
        *,
        indices: NDArray[np.int64] | None = None,
        drop_last: bool = False,
        full: bool = False,
        change: Callable[[int, Batch], Batch] | None = None,
    ) -> Iterator[Batch]:
        """Yield batches; a thread prepares the next batch while one is used.

        Parameters
        ----------
        batch_size : int, optional
            Samples per batch, see `batch_size`. The last batch may be smaller; if the model's batch
            size is fixed, it is padded, see `Batch`.
        indices : int64 of shape (n,), optional
            Indices of the samples to visit, in order (default: all).
        drop_last : bool
            Leave out a last batch that is not full.
        full : bool
            Replace skipped samples (those that cannot be read) by others of the same batch, so that
            a training gets full batches. Otherwise such a batch is smaller, or left out if empty.
        change : callable, optional
            Called with the number of a batch, from 0, and the batch; returns the batch to use. It
            runs ahead, in another thread.

        Raises
        ------
        DataError
            The model does not take this batch size. While iterating: a sample cannot be read, or
            contains values that the model cannot take.
        """
        size = self.batch_size(batch_size)
        order = np.arange(len(self)) if indices is None else _checked_indices(indices, len(self))
        stop = len(order) - len(order) % size if drop_last else len(order)
        return prefetched(
            partial(self._prepared, number, order[start : start + size], full=full, change=change)
            for number, start in enumerate(range(0, stop, size))
        )

    def _prepared(
        self,
        number: int,
        positions: NDArray[np.int64],
        *,
        full: bool,
        change: Callable[[int, Batch], Batch] | None,
    ) -> Batch | None:
        batch = self._read(positions, self.fixed_batch, full=full)
        return batch if batch is None or change is None else change(number, batch)

    def broken(self, indices: ArrayLike) -> int:
        """Return how many of the samples at ``indices`` could not be read so far."""
        rows = self._indices[_checked_indices(indices, len(self))]
        return sum(int(row) in self._source.broken for row in rows)

    def sample(self, index: int) -> Batch:
        """Return a batch with only the sample at ``index``, even if the batch size is fixed."""
        batch = self._read(_checked_indices([index], len(self)), None, full=True)
        assert batch is not None
        return batch

    def _read(self, positions: NDArray[np.int64], fixed: int | None, *, full: bool) -> Batch | None:
        """Return a batch of the readable samples; without any, return None or raise if ``full``."""
        broken = self._source.broken
        readable = positions
        if broken:
            good = np.array([int(row) not in broken for row in self._indices[positions]], bool)
            readable = positions[good]
        if not len(readable):
            if full:
                raise BrokenError(f"{self._source.name}: no sample of a batch can be read.")
            return None
        chosen = np.resize(readable, len(positions)) if full else readable
        try:
            return self._read_chosen(chosen, fixed)
        except BrokenError:  # the source has recorded the broken samples: read again without them
            return self._read(positions, fixed, full=full)

    def _read_chosen(self, positions: NDArray[np.int64], fixed: int | None) -> Batch:
        size = fixed or len(positions)
        rows = self._indices[np.resize(positions, size)]
        inputs, arrays = (
            {
                feed.spec.name: feed.convert(
                    self._source.read(feed.key, rows), partial(self._origin, feed.key, rows)
                )
                for feed in feeds
            }
            for feeds in (self._intake.feeds, self._arrays)
        )
        inputs |= {value.name: value.repeated(size) for value in self._intake.values}
        labels = self._read_labels(self._indices[positions])
        return Batch(inputs=inputs, labels=labels, indices=positions, size=size, arrays=arrays)

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
