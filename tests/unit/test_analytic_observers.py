"""ACIQ, against its published multiples, brute force over its densities and all of the data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from onnxqat.calibration.observers.analytic import GaussObserver, LaplaceObserver
from onnxqat.calibration.observers.base import Observer
from onnxqat.qparams import FloatArray, QuantSpec
from tests.unit.test_observers import gelu, heavy, normal, relu, seen, squared_error

KINDS = pytest.mark.parametrize("kind", [GaussObserver, LaplaceObserver])
# Banner et al. 2019, section 3: of b, and of sigma
PUBLISHED = {
    LaplaceObserver: {2: 2.83, 3: 3.89, 4: 5.03},
    GaussObserver: {2: 1.71, 3: 2.15, 4: 2.55},
}


def laplace(n: int) -> FloatArray:
    return np.random.default_rng(5).laplace(size=n).astype(np.float32)


def deviation(kind: type[Observer], x: FloatArray, centre: float) -> float:
    off = x.astype(np.float64) - centre
    return float(np.abs(off).mean() if kind is LaplaceObserver else np.sqrt((off**2).mean()))


def cost(kind: type[Observer], t: float, levels: int) -> float:
    """Return the error of clipping at t deviations, in squares of the deviation."""
    rounding = t * t / (12 * levels**2)
    if kind is LaplaceObserver:
        return 2 * math.exp(-t) + rounding
    tail = math.sqrt(2 / math.pi) * t * math.exp(-t * t / 2)
    return (t * t + 1) * math.erfc(t / math.sqrt(2)) - tail + rounding


def best_multiple(kind: type[Observer], levels: int) -> float:
    """Return the cheapest t, from a grid that is refined three times."""
    low, high = 0.0, 40.0
    for _ in range(4):
        grid = np.linspace(low, high, 401)
        at = int(np.argmin([cost(kind, t, levels) for t in grid.tolist()]))
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, 400)]
    return float((low + high) / 2)


@KINDS
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_published_multiples(kind: type[Observer], bits: int) -> None:
    x = (laplace if kind is LaplaceObserver else normal)(200_000)
    high = seen(kind(QuantSpec(bits=bits)), x)[1]
    assert abs(high / deviation(kind, x, 0.0) - PUBLISHED[kind][bits]) < 0.01


@KINDS
@pytest.mark.parametrize("make", [normal, heavy, gelu, laplace])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_follows_from_the_moments_of_all_data(
    kind: type[Observer], make: Callable[[int], FloatArray], bits: int, symmetric: bool
) -> None:
    """The moments are off by one bin at most, the multiple by the grid's last step."""
    x = make(50_000)
    low, high = seen(kind(QuantSpec(bits=bits, symmetric=symmetric)), *np.split(x, 5))
    centre = 0.0 if symmetric else float(x.mean(dtype=np.float64))
    multiple = best_multiple(kind, 2 ** (bits - 1))
    reach = multiple * deviation(kind, x, centre)
    width = 2.0 ** (np.frexp(np.abs(x).max())[1] - 13)
    bound = (multiple + 1) * width + 1e-4 * reach

    assert abs(low - max(float(x.min()), centre - reach)) <= bound
    assert abs(high - min(float(x.max()), centre + reach)) <= bound


@KINDS
@pytest.mark.parametrize(("signedness", "levels"), [("unsigned", 16), ("signed", 8)])
def test_a_relu_is_half_of_a_density_about_zero(
    kind: type[Observer], signedness: str, levels: int
) -> None:
    """Its zeros are left out of the moments; all levels lie above zero where the spec has them."""
    x = relu(100_000)
    spec = QuantSpec(bits=4, signedness=signedness)  # type: ignore[arg-type]
    low, high = seen(kind(spec), x, np.zeros(1_000_000, np.float32))
    expected = best_multiple(kind, levels) * deviation(kind, x[x > 0], 0.0)

    assert low == 0.0
    assert abs(high - min(expected, float(x.max()))) < 2e-3 * expected


@KINDS
def test_the_range_of_its_own_density_is_close_to_the_best(kind: type[Observer]) -> None:
    """Of 4 bits, narrow: no threshold on the data themselves is more than 1 % better."""
    x = (laplace if kind is LaplaceObserver else normal)(50_000)
    spec = QuantSpec(bits=4, narrow_range=True)
    got = squared_error(x, *seen(kind(spec), x), spec)
    thresholds = np.abs(x).max() * np.arange(1, 101) / 100
    assert got <= 1.01 * min(squared_error(x, -t, t, spec) for t in thresholds)
