"""Samples of a model, ready to feed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch"]

# Two samples of a batch count as equal if they differ by less than this, relative to the tensor's
# largest magnitude.
EQUAL = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """Samples ready to feed.

    Attributes
    ----------
    inputs : dict of str to array
        Array for each model input, in its dtype and layout, C-contiguous. The first axis of inputs
        that take samples has length ``size``.
    labels : int64 of shape (n,), or None
        Class indices, 0 or above.
    indices : int64 of shape (n,)
        Positions of the samples in the `DataSet` that gave the batch.
    size : int
        Number of samples that the model is fed: n, or more if its batch size is fixed. The samples
        from n on are padding: they repeat the first ones, and do not count.
    arrays : dict of str to array
        The arrays requested by `DataSet.with_arrays`, also with ``size`` samples.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64]
    size: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def counting(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor of the model without padding.

        The samples axis is the first axis whose last entries repeat the first ones, as the padding
        does. A tensor without such an axis is returned unchanged.

        Parameters
        ----------
        values : array
            A tensor that the model computed from `inputs`.
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
