"""The observer that takes whichever range leaves the least error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxqat.calibration.observers import OBSERVERS
from onnxqat.calibration.observers.auto import CANDIDATES, AutoObserver
from onnxqat.qparams import FloatArray, QuantSpec
from tests.unit.test_observers import gelu, heavy, normal, relu, seen, squared_error


def test_it_has_every_other_observer() -> None:
    assert {*CANDIDATES, AutoObserver} == set(OBSERVERS.values())


@pytest.mark.parametrize("make", [normal, relu, heavy, gelu])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_picks_the_range_of_least_error_on_the_data(
    make: Callable[[int], FloatArray], bits: int
) -> None:
    """Each observer measured on the values themselves, which a histogram knows to 1 %."""
    spec = QuantSpec(bits=bits)
    batches = np.split(make(20_000), 4)
    x = np.concatenate(batches)
    ranges = {kind: seen(kind(spec), *batches) for kind in CANDIDATES}
    errors = {kind: squared_error(x, *ends, spec) for kind, ends in ranges.items()}
    picked = seen(AutoObserver(spec), *batches)

    assert picked in ranges.values()
    assert squared_error(x, *picked, spec) <= 1.01 * min(errors.values())


def test_of_equal_ranges_it_takes_the_simplest() -> None:
    """Values on the grid of their own extremes: nothing is better than these."""
    x = np.arange(-7, 8).astype(np.float32)
    spec = QuantSpec(bits=4, narrow_range=True)
    assert seen(AutoObserver(spec), x) == (-7.0, 7.0)
