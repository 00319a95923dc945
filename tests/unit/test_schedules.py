from __future__ import annotations

import pytest

from onnxqat.train.schedules import cosine_rate


@pytest.mark.parametrize("warmup", [1, 5])
def test_rate_warms_up_and_falls_to_zero(warmup):
    rates = [cosine_rate(step, 100, warmup) for step in range(100)]

    assert rates[warmup - 1] == 1.0
    assert rates == sorted(rates[:warmup]) + sorted(rates[warmup:], reverse=True)
    assert 0 < rates[-1] < 1e-3
