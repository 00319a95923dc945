"""Samples of a model, ready to feed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch"]

# Of a tensor's largest magnitude: what two equal samples of one batch may differ by.
EQUAL = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """Samples ready to feed.

    Attributes
    ----------
    inputs : dict of str to array
        By model input, in its dtype and layout, C-contiguous. The first axis of inputs that take
        samples has length ``size``.
    labels : int64 of shape (n,), or None
        Class indices, 0 or above.
    indices : int64 of shape (n,)
        Positions of the samples in the `DataSet` that gave the batch.
    size : int
        How many samples the model is fed: n, or more where it takes a fixed number. The samples
        from n on repeat the first ones, and do not count.
    arrays : dict of str to array
        Those that `DataSet.with_arrays` asked for, ``size`` samples too.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64]
    size: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def counting(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return what a tensor of the model holds of the samples that count.

        The axis that the samples lie along is the first whose last entries repeat the first ones,
        as the samples do. A tensor that has none is returned whole.

        Parameters
        ----------
        values : array
            What the model computed for `inputs`.
        """
        count, size = len(self.indices), self.size
        if count == size:
            return values
        for axis, length in enumerate(values.shape):
            if length % size == 0:
                ordered = np.moveaxis(values, axis, 0)
                samples = ordered.reshape(size, length // size, *ordered.shape[1:])
                if _equal(samples[count:], samples[np.arange(size - count) % count]):
                    counted = ordered[: count * (length // size)]
                    return np.ascontiguousarray(np.moveaxis(counted, 0, axis))
        return values


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.dtype.kind != "f":
        return np.array_equal(a, b)
    return np.allclose(
        a, b, rtol=0, atol=EQUAL * float(np.max(np.abs(b), initial=0)), equal_nan=True
    )
