"""Rounding, multipliers and requantization against Python's own integers and fractions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.requantize import (
    fixed_point,
    nearest_multiplier,
    ratio,
    requantizer,
)
from onnxqat.evaluation.integer.rounding import divide, round_levels, shift_right
from onnxqat.rules import Arithmetic

ROUNDINGS = ("half-even", "half-away", "half-up")
HALF = Fraction(1, 2)


def rounded(value: Fraction, rounding: str) -> int:
    """Round an exact fraction."""
    if rounding == "half-even":
        return round(value)
    if rounding == "half-up":
        return floor(value + HALF)
    return floor(value + HALF) if value >= 0 else -floor(-value + HALF)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shift", [-3, 0, 1, 2, 7, 31, 56])
def test_shift_is_division_by_a_power_of_two(rounding, shift):
    rng = np.random.default_rng(shift + 10)
    values = np.concatenate([np.arange(-20, 21), rng.integers(-(2**55), 2**55, 500)])
    ties = (np.arange(-9, 10) * 2 + 1) << max(shift - 1, 0)  # odd multiples of a half
    values = np.concatenate([values, ties]).astype(np.int64)
    expected = [rounded(Fraction(int(v)) / Fraction(2) ** shift, rounding) for v in values]

    assert shift_right(values, shift, rounding).tolist() == expected


def test_shift_may_differ_by_channel():
    values = np.int64([[5, -5], [6, -6]])

    assert shift_right(values, np.int64([[1], [-1]]), "half-up").tolist() == [[3, -2], [12, -12]]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_floats_are_rounded_with_their_ties(rounding):
    values = np.concatenate([np.arange(-20, 21) / 4, np.random.default_rng(0).normal(size=99) * 50])
    expected = [rounded(Fraction(float(v)), rounding) for v in values]

    assert round_levels(values, rounding).tolist() == expected


def test_division_rounds_half_away_from_zero():
    values = np.arange(-50, 51)
    for divisor in (1, 2, 3, 4, 9):
        expected = [rounded(Fraction(int(v), divisor), "half-away") for v in values]

        assert divide(values, divisor).tolist() == expected


# --- multipliers --------------------------------------------------------------------------------


def slow_search(scale: float, bits: int, lowest: int) -> tuple[int, int]:
    """Return the first of the nearest multipliers, one by one, as tpu-mlir's loop does."""
    exact, best = Fraction(float(np.float32(scale))), None
    for shift in range(lowest, 31):
        multiplier = rounded(exact * Fraction(2) ** shift, "half-away")
        error = float(np.float32(abs(multiplier / 2.0**shift - float(exact))))
        if multiplier < 2 ** (bits - 1) - 1 and (best is None or error < best[0]):
            best = error, multiplier, shift
    assert best is not None
    return best[1:]


SCALES = np.exp(np.random.default_rng(3).uniform(np.log(1e-6), np.log(40), 300))


@pytest.mark.parametrize(("bits", "lowest"), [(32, -32), (8, -32), (8, 0)])
def test_nearest_multiplier_is_the_first_of_the_nearest(bits, lowest):
    multiplier, shift = nearest_multiplier(SCALES, bits, lowest_shift=lowest)
    expected = [slow_search(float(s), bits, lowest) for s in SCALES]

    assert list(zip(multiplier.tolist(), shift.tolist(), strict=True)) == expected


@pytest.mark.parametrize("bits", [32, 8])
def test_nearest_multiplier_is_within_its_bound(bits):
    multiplier, shift = nearest_multiplier(SCALES, bits)
    error = np.abs(multiplier / 2.0**shift - SCALES.astype(np.float32).astype(np.float64))
    # 126 is the largest multiplier of 8 bits: between 63 and 126 the half step is 1 / 126
    bound = np.maximum(2.0**-31, SCALES / 126 if bits == 8 else 0)

    assert np.all(error <= bound * 1.0001)


def test_multipliers_of_the_compiler():
    """Read from the int8 file that tpu-mlir 1.30.2 made of a ResNet-20."""
    pool = 0.049063004553318024 / 0.021686922758817673 / 64
    adds = np.array([0.014609913341701031, 0.0093840621411800384]) / 0.011340748518705368

    assert [int(v) for v in nearest_multiplier(np.asarray(pool), 8)] == [9, 8]
    assert [v.tolist() for v in nearest_multiplier(adds, 8, lowest_shift=0)] == [[41, 53], [5, 6]]


def test_fixed_point_is_within_its_bound():
    multiplier, exponent = fixed_point(SCALES)

    assert np.all((multiplier >= 2**30) & (multiplier < 2**31))
    np.testing.assert_allclose(multiplier * 2.0 ** (exponent - 31), SCALES, rtol=2.0**-31)
    assert [int(v) for v in fixed_point(np.asarray(1.0))] == [2**30, 1]
    assert [int(v) for v in fixed_point(np.asarray(1 - 2.0**-40))] == [2**30, 1]
    assert [int(v) for v in fixed_point(np.asarray(2.0**-40))] == [0, 0]


# --- requantization -----------------------------------------------------------------------------


def high_mul(a: int, b: int) -> int:
    """gemmlowp's SaturatingRoundingDoublingHighMul, with C's division that truncates."""
    product = a * b
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    return abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)


def divide_by_power(x: int, exponent: int) -> int:
    """gemmlowp's RoundingDivideByPOT."""
    mask = 2**exponent - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + ((x & mask) > threshold)


SUMS = np.concatenate(
    [np.arange(-300, 300), np.random.default_rng(4).integers(-(2**24), 2**24, 400)]
).astype(np.int64)


@pytest.mark.parametrize("scale", [1e-4, 0.0031, 0.5, 1.0, 1.7])
def test_gemmlowp_is_the_reference_kernel(scale):
    rule = Arithmetic(requantize="gemmlowp", rounding="half-away")
    multiplier, exponent = (int(v) for v in fixed_point(np.asarray(scale)))
    expected = [
        divide_by_power(high_mul(int(s) << max(exponent, 0), multiplier), max(-exponent, 0))
        for s in SUMS
    ]

    assert requantizer(rule, np.asarray(scale), 32)(SUMS).tolist() == expected


@pytest.mark.parametrize("bits", [8, 32])
def test_multiplier_rounds_once(bits):
    rule = Arithmetic(requantize="multiplier", rounding="half-up")
    scale = np.float64([[0.0031], [0.5]])
    multiplier, shift = nearest_multiplier(scale, bits)
    found = requantizer(rule, scale, bits)(np.stack([SUMS, SUMS]))
    for row in range(2):
        factor = Fraction(int(multiplier[row, 0])) / Fraction(2) ** int(shift[row, 0])

        assert found[row].tolist() == [rounded(int(s) * factor, "half-up") for s in SUMS]


def test_float_is_one_product_in_float32():
    rule = Arithmetic(requantize="float")
    scale = ratio(rule, np.float32(0.021), np.float32(0.0034), divisor=np.float32(0.013))
    expected = [int(np.rint(np.float32(s) * np.float32(scale))) for s in SUMS]

    assert scale.dtype == np.float32
    assert scale == np.float32(np.float32(0.021) * np.float32(0.0034)) / np.float32(0.013)
    assert requantizer(rule, scale, 32)(SUMS).tolist() == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_shift_is_exact(rounding):
    rule = Arithmetic(requantize="shift", rounding=rounding)
    for scale in (2.0**-7, 0.5, 1.0, 4.0):
        expected = [rounded(int(s) * Fraction(scale), rounding) for s in SUMS]

        assert requantizer(rule, np.asarray(scale), 32)(SUMS).tolist() == expected


def test_shift_of_another_ratio_is_an_error():
    with pytest.raises(RuleError, match="is not a power of two"):
        requantizer(Arithmetic(requantize="shift"), np.asarray(0.3), 32)
