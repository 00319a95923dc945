"""Find which model inputs take samples, which take one value for all samples, and the batch size.

The first dimension of an input that takes samples is the batch. An input without a batch axis (a
sampling rate, the size of an image, the empty cache of a decoder) takes one value for all samples.
The model's shapes decide which is which. Where they leave it open, the arrays decide: an array with
the whole shape of its input is one value, unless it has one row for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import Header, names
from onnxqat.data.feeds import Feed, InputSpec, check_dtype, fits
from onnxqat.data.preprocess import Preprocessing
from onnxqat.errors import DataError

__all__ = ["Batching", "Value", "batching", "make_value"]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How a model takes samples.

    Attributes
    ----------
    samples : tuple of str
        Names of the inputs that take one row per sample.
    length : int or None
        Fixed batch size of the model; None if it takes any.
    fixed_by : str
        Name of the first input that fixes the batch size; empty if none does.
    symbols : frozenset of str
        Names of dimensions in the model that stand for the batch size.
    """

    samples: tuple[str, ...]
    length: int | None = None
    fixed_by: str = ""
    symbols: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Value:
    """The value that an input without a batch axis gets in every batch.

    Attributes
    ----------
    name : str
        Name of the input.
    array : array
        The value from the data, in the model's dtype.
    axes : tuple of int
        Axes of length 1 that must be as long as the batch; the value is repeated along them.
    """

    name: str
    array: NDArray[Any]
    axes: tuple[int, ...]

    def repeated(self, size: int) -> NDArray[Any]:
        """Return the value for a batch of ``size`` samples."""
        array = self.array
        for axis in self.axes:
            array = np.repeat(array, size, axis)
        return np.ascontiguousarray(array).reshape(array.shape)  # a scalar stays a scalar


def batching(
    where: str, specs: Sequence[InputSpec], arrays: Mapping[str, Header], labels: int | None
) -> Batching:
    """Find which inputs take samples.

    Parameters
    ----------
    where : str
        Name of the data, for messages.
    specs : sequence of InputSpec
        The model's inputs.
    arrays : mapping of str to Header
        Shape and dtype of each input's whole array in the first file.
    labels : int or None
        Number of labels in this file.

    Raises
    ------
    DataError
        No input takes samples, two inputs are fixed to different batch sizes, or the shapes leave
        open which inputs take samples.
    """
    ranked = [spec for spec in specs if spec.shape]
    several = [spec for spec in ranked if not _is_one_sample(spec, arrays[spec.name].shape)]
    free = [spec.name for spec in several if not isinstance(spec.shape[0], int)]
    fixed = [spec for spec in several if spec.name not in free]
    either = [spec for spec in fixed if fits(arrays[spec.name].shape, spec.shape)]
    sure = [s.name for s in fixed if s not in either and _same_rank(s, arrays[s.name])]
    if not free:
        count = arrays[sure[0]].shape[0] if sure else labels
        sure += _rows(where, either, count)
    samples = tuple(spec.name for spec in several if spec.name in {*sure, *free})
    if not samples:  # their shapes are wrong, which is reported later
        samples = tuple(spec.name for spec in ranked)
    if not samples:
        raise DataError(
            f"{where}: none of the model's inputs {names([spec.name for spec in specs])} has a "
            "batch axis. Export the model with the batch as the first axis of its inputs."
        )
    firsts = {spec.name: spec.shape[0] for spec in ranked if spec.name in samples}
    by, length = _fixed_length(where, firsts)
    symbols = frozenset(first for first in firsts.values() if isinstance(first, str) and first)
    return Batching(samples=samples, length=length, fixed_by=by, symbols=symbols)


def _is_one_sample(spec: InputSpec, shape: tuple[int, ...]) -> bool:
    """Return whether an array holds one sample for all: no samples axis, or an empty value."""
    empty = 0 in shape[1:] and shape[0] == 1 and fits(shape[1:], spec.shape[1:])
    return fits(shape, spec.shape[1:]) or empty


def _same_rank(spec: InputSpec, array: Header) -> bool:
    return len(array.shape) == len(spec.shape)


def _fixed_length(where: str, firsts: Mapping[str, int | str | None]) -> tuple[str, int | None]:
    """Return the input that fixes the batch size, and this size, from the first dimensions."""
    fixed = {name: first for name, first in firsts.items() if isinstance(first, int)}
    if len(set(fixed.values())) > 1:
        text = ", ".join(f"{name!r} of {length}" for name, length in fixed.items())
        raise DataError(
            f"{where}: the model's inputs take batches of different sizes: {text}. Export it with "
            "one batch size for all inputs. For an input without a batch axis, store one array of "
            "its whole shape."
        )
    by, length = next(iter(fixed.items()), ("", None))
    if length is not None and length < 1:
        raise DataError(
            f"{where}: model input {by!r} takes batches of {length}. Export it for batches of 1 or "
            "more."
        )
    return by, length


def _rows(where: str, either: Sequence[InputSpec], count: int | None) -> list[str]:
    """Return which of these inputs have one row per sample, not one value for all samples."""
    lengths = {spec.name: spec.shape[0] for spec in either}
    if count is None and len(set(lengths.values())) > 1:
        raise DataError(
            f"{where}: it is not clear which of the arrays for {names(list(lengths))} holds the "
            "samples. Give more samples than one batch, or labels."
        )
    return [name for name, length in lengths.items() if count in (None, length)]


def make_value(
    where: str,
    spec: InputSpec,
    key: str,
    parts: Sequence[NDArray[Any]],
    taken: Batching,
) -> Value:
    """Return the value for an input without a batch axis.

    Parameters
    ----------
    where : str
        Name of the data, for messages.
    spec : InputSpec
        The model's input.
    key : str
        Name of the array.
    parts : sequence of array
        The array in each file: the value itself, or one equal row per sample.
    taken : Batching
        How the model takes samples.

    Raises
    ------
    DataError
        Shape or dtype do not fit, or there are different values.
    """
    where = f"{where}: array {key!r}"
    check_dtype(spec, Header(parts[0].shape, parts[0].dtype), where)
    first, *others = [value for part in parts for value in _values(where, spec, part, taken)]
    if not all(np.array_equal(first, other) for other in others):
        raise DataError(
            f"{where} has different values; model input {spec.name!r} of shape {spec.shape} has no "
            "batch axis, and takes one value for all samples. Store one value, or export the model "
            "with a batch axis for this input."
        )
    plain = Feed(spec=spec, key=key, preprocessing=Preprocessing(), data_layout=None)
    array = plain.convert(first[None], lambda _: where)[0]
    ones = [axis for axis, length in enumerate(array.shape) if length == 1]
    axes = tuple(axis for axis in ones if _is_batch(spec.shape[axis], axis, taken))
    return Value(name=spec.name, array=array, axes=axes)


def _is_batch(length: int | str | None, axis: int, taken: Batching) -> bool:
    """Return whether a dimension of the model is as long as the batch."""
    if isinstance(length, int):
        return axis == 0 and length == taken.length
    return axis == 0 or length in taken.symbols


def _values(where: str, spec: InputSpec, part: NDArray[Any], taken: Batching) -> list[NDArray[Any]]:
    """Return the value in one file; a second one only if there are different values."""
    if spec.shape and _is_batch(spec.shape[0], 0, taken) and _is_one_sample(spec, part.shape):
        return [part.reshape(1, *part.shape[part.ndim - len(spec.shape) + 1 :])]
    if fits(part.shape, spec.shape):
        return [part]
    if part.size == 1 and spec.shape in ((), (1,)):  # both shapes hold one number
        return [part.reshape(spec.shape)]
    if len(part.shape) and len(part) and fits(part.shape[1:], spec.shape):
        return [part[0]] if (part == part[0]).all() else [part[0], part[1:]]
    raise DataError(
        f"{where} has shape {part.shape}, but model input {spec.name!r} has {spec.shape}. Store "
        "one value of that shape for all samples, or one row per sample along the first axis."
    )
