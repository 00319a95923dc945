"""Divide samples at random into training samples and held-out samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import DataError

__all__ = ["split"]


def split(count: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide samples at random.

    Parameters
    ----------
    count : int
        Number of samples.
    fraction : float
        Fraction to hold out, in [0, 1); the number of samples is rounded to the nearest.
    seed : int
        The same seed gives the same division.

    Returns
    -------
    train, held_out : int64 of shape (n,)
        Sorted indices; together they contain every index below ``count`` once.

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
