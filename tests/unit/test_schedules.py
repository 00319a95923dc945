from __future__ import annotations

import math

import pytest

from onnxqat.train import Config
from onnxqat.train.optimization.schedules import rate_factor


def rates(steps=100, first=0, **settings):
    config = Config(**settings)
    return [rate_factor(config, step, steps, first=first) for step in range(steps)]


@pytest.mark.parametrize("warmup", [1, 5])
def test_the_default_warms_up_and_falls_to_zero(warmup):
    found = rates(warmup=warmup / 100)

    assert found[warmup - 1] == 1.0
    assert found == sorted(found[:warmup]) + sorted(found[warmup:], reverse=True)
    assert 0 < found[-1] < 1e-3
    assert rates() == rates(warmup=0.05, schedule="cosine")


def test_constant_stays():
    assert rates(schedule="constant", warmup=0.02) == [0.5, *[1.0] * 99]


def test_step_falls_twice_by_ten():
    found = rates(schedule="step", warmup=0.0)

    assert found[:50] == [1.0] * 50
    assert found[50:75] == pytest.approx([0.1] * 25)
    assert found[75:] == pytest.approx([0.01] * 25)


def test_one_cycle_rises_from_a_25th_for_30_percent_and_falls():
    found = rates(schedule="one-cycle")
    up = [0.04 + 0.96 * (1 - math.cos(math.pi * (i + 1) / 30)) / 2 for i in range(30)]
    down = [(1 + math.cos(math.pi * i / 70)) / 2 for i in range(70)]

    assert found == pytest.approx(up + down)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "one-cycle"])
def test_the_first_steps_change_nothing(name):
    found = rates(steps=100, first=20, schedule=name, warmup=0.1)

    assert found[:20] == [0.0] * 20
    assert 0 < found[20] < 1
    assert found[29] == 1.0
