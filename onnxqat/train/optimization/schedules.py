"""Learning-rate schedules: the factor of the learning rate at each step, 0 to 1.

==========  =====================================================================================
constant    1
step        1; 0.1 from half of the steps; 0.01 from three quarters of the steps (He et al. 2016,
            https://arxiv.org/abs/1512.03385, section 4.2)
cosine      half a cosine from 1 to 0 (Loshchilov and Hutter 2017,
            https://arxiv.org/abs/1608.03983, equation 5 without restarts)
one-cycle   half a cosine from 1 to 0 after a long warm-up (Smith and Topin 2018,
            https://arxiv.org/abs/1708.07120; with cosines, as in PyTorch; constant momentum)
==========  =====================================================================================

All begin with a warm-up: linear from 0; for one-cycle, half a cosine from 1/25.
"""

from __future__ import annotations

import math

from onnxqat.train.config import Config

__all__ = ["rate_factor"]

WARMUP, CYCLE_WARMUP = 0.05, 0.3  # fractions of all steps
CYCLE_START = 1 / 25


def rate_factor(config: Config, step: int, steps: int, *, first: int = 0) -> float:
    """Return the factor of the learning rate.

    Parameters
    ----------
    config : Config
        The hyper-parameters with the schedule and the length of the warm-up.
    step, steps : int
        The index of the step, from 0, and the number of steps.
    first : int
        The number of first steps with factor 0; the schedule spans the other steps.

    Examples
    --------
    >>> def rates(name):
    ...     config = Config(schedule=name, warmup=0.2)
    ...     return [round(rate_factor(config, step, 10), 2) for step in range(10)]
    >>> rates("cosine")
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    >>> rates("step")
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01]
    >>> rates("one-cycle")
    [0.52, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """
    cycle = config.schedule == "one-cycle"
    share = config.warmup
    if share is None:
        share = CYCLE_WARMUP if cycle else WARMUP
    warmup = max(1, round(share * steps))
    step, steps = step - first, steps - first
    if step < 0:
        return 0.0
    if step < warmup:
        done = (step + 1) / warmup
        return 1 - (1 - CYCLE_START) * _half_cosine(done) if cycle else done
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return 0.1 ** ((step >= 0.5 * steps) + (step >= 0.75 * steps))
    return _half_cosine((step - warmup) / max(steps - warmup, 1))


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
