"""Learning-rate schedules: the factor of the learning rate at each step, 0 to 1."""

from __future__ import annotations

import math

__all__ = ["cosine_rate"]


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate at ``step``, 0 to 1.

    Linear from 0 over ``warmup`` steps, then half a cosine to 0 (Loshchilov and Hutter 2017,
    https://arxiv.org/abs/1608.03983, equation 5 without restarts).

    Examples
    --------
    >>> [round(cosine_rate(step, 10, 2), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
