from __future__ import annotations

import math

import numpy as np
import pytest

from onnxqat.train.monitoring.divergence import LossHistory


def rises(losses: list[float], window: int) -> bool:
    """The rule as the documentation has it, on all losses."""
    if not window or len(losses) < 2 * window or len(losses) % window:
        return False
    first, last = np.array(losses[:window]), np.array(losses[-window:])
    error = math.sqrt((first.var() + last.var()) / window)
    return last.mean() > 1.5 * first.mean() and last.mean() - first.mean() > 4 * error


@pytest.mark.parametrize("window", [0, 1, 7, 20])
@pytest.mark.parametrize("slope", [-0.001, 0.0, 0.02, 0.3])
def test_a_few_losses_tell_what_all_would(window, slope):
    rng = np.random.default_rng(0)
    history, losses, answers = LossHistory(window=window), [], []
    for step in range(100):
        losses.append(float(1 + slope * step + 0.1 * rng.normal()))
        history.add(losses[-1])
        answers.append(history.rising())

        assert answers[-1] == rises(losses, window)
        assert history.mean == np.mean(losses[-20:])
    if window > 1:
        assert any(answers) == (slope > 0.01)
    assert len(history.first) == window
    assert len(history.recent) == 20
