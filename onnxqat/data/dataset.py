"""Batches of samples in any order, the next one prepared while the current one is used."""

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

DEFAULT_SIZE = 32  # of a batch, where neither the model nor the user says


@dataclass(frozen=True, kw_only=True)
class Intake:
    """How samples become what a model takes.

    Attributes
    ----------
    feeds : tuple of Feed
        One per input that takes samples.
    values : tuple of Value
        One per input that has no batch axis.
    batching : Batching
        Which are which, and how long a batch is.
    """

    feeds: tuple[Feed, ...]
    values: tuple[Value, ...]
    batching: Batching


class DataSet:
    """Samples of a model; `open_data` makes one. A context manager that removes temporary files.

    Parameters
    ----------
    source : Source
        Where rows come from.
    intake : Intake
        How they become model inputs.
    label_key : str or None
        The array of labels.
    indices : int64 of shape (n,)
        Samples of the source that belong to the set, in order.
    owner : bool
        Whether closing the set closes the source; a subset does not.
    arrays : sequence of Feed
        Other arrays, see `with_arrays`.
    said : Said
        How it was opened.
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
        """What the user called the data, for messages."""
        return self._source.name

    @property
    def has_labels(self) -> bool:
        """Whether batches have labels."""
        return self._label_key is not None

    def label_count(self) -> int | None:
        """Return how many different labels there are; None without any."""
        labels = self._read_labels(self._indices)
        return None if labels is None else len(np.unique(labels))

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
    def moved_arrays(self) -> Set[str]:
        """The arrays of places in the images, which augmentation moves along."""
        return self._source.moved

    @property
    def pixels(self) -> dict[str, Preprocessing | None]:
        """By input, what makes its values of pixels from 0 to 255; None where they are none."""
        return {
            feed.spec.name: feed.preprocessing if self._of_pixels(feed) else None
            for feed in self._intake.feeds
        }

    def _of_pixels(self, feed: Feed) -> bool:
        return feed.data_layout is not None and self.array(feed.key).dtype == np.uint8

    @property
    def array_names(self) -> tuple[str, ...]:
        """The arrays of the data, those of inputs and labels included."""
        return self._source.keys

    @property
    def other_arrays(self) -> tuple[str, ...]:
        """The arrays of the data that hold one value of each sample, but for inputs and labels."""
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
            There is none, or it does not hold numbers, or not one of each sample.
        """
        if name not in self._source.keys:
            raise DataError(
                f"{self._source.name}: no array {name!r}. It has {names(self._source.keys)}."
            )
        self._source.count([self._intake.feeds[0].key, name])
        return self._source.sample(name)

    def with_arrays(self, arrays: Mapping[str, tuple[str, str]]) -> DataSet:
        """Return a view whose batches have other arrays too, as they are stored.

        Those that were asked for before stay, unless one of the same name comes.

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
        kept = [feed for feed in self._arrays if feed.spec.name not in arrays]
        return self._view(self._indices, [*kept, *feeds])

    def in_batches_of(self, length: int, name: str) -> DataSet:
        """Return a view whose batches all have ``length`` samples, as model input ``name`` takes.

        Raises
        ------
        DataError
            The set was opened for a model that is fixed to another length.
        """
        if self.fixed_batch not in (None, length):
            raise DataError(
                f"Model input {name!r} takes batches of {length}, and the data were opened for "
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
        """How many samples the model takes at a time; None where it takes any number."""
        return self._intake.batching.length

    @property
    def sample_inputs(self) -> tuple[str, ...]:
        """The model inputs that take samples; the others take one value for all of them."""
        return self._intake.batching.samples

    def batch_size(self, wanted: int | None = None, *, default: int = DEFAULT_SIZE) -> int:
        """Return how many samples a batch has.

        Parameters
        ----------
        wanted : int, optional
            What the user asks for.
        default : int
            Where neither the user nor the model says.

        Raises
        ------
        DataError
            ``wanted`` is below 1, or not what the model is fixed to.
        """
        fixed = self._intake.batching
        if wanted is not None and wanted < 1:
            raise DataError(f"--batch-size: {wanted} is not a size. Give 1 or more.")
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
        """Yield batches, the next one being prepared in a thread meanwhile.

        Parameters
        ----------
        batch_size : int, optional
            Samples per batch, see `batch_size`. The last batch has what is left; where the model
            takes a fixed number, repeated samples fill it, see `Batch`.
        indices : int64 of shape (n,), optional
            Samples to visit, in order; all of them by default.
        drop_last : bool
            Leave out a last batch that is not full.
        full : bool
            What is done about samples that cannot be read, where that is no error: others of the
            batch take their place, for a training that needs so many; by default the batch has
            fewer, or is left out.
        change : callable, optional
            Takes the number of a batch, from 0, and the batch; what it returns takes its place. It
            runs ahead, in other threads.

        Raises
        ------
        DataError
            The model does not take that batch size; while iterating, a sample that cannot be read
            or holds values that the model cannot take.
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
        """Return how many of the samples at ``indices`` turned out to be unreadable."""
        rows = self._indices[_checked_indices(indices, len(self))]
        return sum(int(row) in self._source.broken for row in rows)

    def sample(self, index: int) -> Batch:
        """Return the sample at ``index`` by itself, whatever batch the model takes."""
        batch = self._read(_checked_indices([index], len(self)), None, full=True)
        assert batch is not None
        return batch

    def _read(self, positions: NDArray[np.int64], fixed: int | None, *, full: bool) -> Batch | None:
        """Return a batch of the samples that can be read; None, or an error, without any."""
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
        except BrokenError:  # the source remembers which
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
