"""The arithmetic of MindSpore Lite against loops written after its int8 kernels.

mindspore-ai/mindspore, nnacl/int8: fixed_point.c, quantize.c, matmul_int8.c, add_int8.c,
sub_int8.c, mul_int8.c, reduce_int8.c, quant_dtype_cast_int8.c, and the callers in
mindspore/lite/src/runtime/kernel/arm/int8 that choose the multipliers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxqat.evaluation.integer.kernels import add, mean, multiply
from onnxqat.evaluation.integer.requantize import ratio, requantizer
from onnxqat.rules import load_rule
from tests.unit.test_integer_arithmetic import divide_by_power, high_mul
from tests.unit.test_integer_kernels import grid, levels

RULE = load_rule("mindspore").arithmetic


def quantize_multiplier(value):
    """QuantizeMultiplier: 31 bits of the fraction, and the exponent."""
    fraction, exponent = math.frexp(value)
    rounded = (int(fraction * 2**53) >> 21) + 1 >> 1
    return (rounded >> 1, exponent + 1) if rounded == 2**31 else (rounded, exponent)


def rescaled(value, multiplier, exponent):
    """MultiplyByQuantizedMultiplier."""
    left, right = max(exponent, 0), max(-exponent, 0)
    return divide_by_power(high_mul(int(value) << left, multiplier), right)


def stored(g):
    """The zero point of the int8 integers; levels of uint8 are stored minus 128."""
    return int(g.params.zero_point) - (128 if g.params.zero_point.dtype == np.uint8 else 0)


A = grid(0.021, 7, np.uint8)
B = grid(0.0437, 130, np.uint8)
OUT = grid(0.0511, 61, np.uint8)


def test_product_is_requantized_as_matmul_int8():
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**22), 2**22, 3000)
    scales = np.float32(0.021), np.float32(0.00173), np.float32(0.0511)
    factor = float(np.float32(scales[0] * scales[1])) / float(scales[2])
    expected = [rescaled(s, *quantize_multiplier(factor)) for s in sums]
    found = requantizer(RULE, ratio(RULE, *scales[:2], divisor=scales[2]), 32)

    assert found(sums).tolist() == expected


@pytest.mark.parametrize("subtract", [False, True])
def test_sum_is_that_of_add_int8(subtract):
    x, y = levels(A, 2000, 1), levels(B, 2000, 2)
    scales = [float(g.scale) for g in (A, B, OUT)]
    twice = 2 * max(scales[:2])
    first, second = (quantize_multiplier(s / twice) for s in scales[:2])
    last = quantize_multiplier(twice / (2**20 * scales[2]))
    expected = []
    for one, other in zip(x.tolist(), y.tolist(), strict=True):
        p = rescaled((one - 7) << 20, *first)
        q = rescaled((other - 130) << 20, *second)
        expected.append(rescaled(p - q if subtract else p + q, *last))

    assert add((A, B), OUT, RULE, subtract=subtract)(x, y).tolist() == expected


def test_product_of_two_activations_is_that_of_mul_int8():
    x, y = levels(A, 2000, 1), levels(B, 2000, 2)
    factor = float(A.scale * B.scale / OUT.scale)  # in float32, then widened
    expected = [
        rescaled((one - 7) * (other - 130), *quantize_multiplier(factor))
        for one, other in zip(x.tolist(), y.tolist(), strict=True)
    ]

    assert multiply((A, B), OUT, RULE)(x, y).tolist() == expected


def test_mean_is_that_of_reduce_mean_hw():
    """Sums of the stored integers; the share of the zero points is truncated."""
    count = 49
    x = levels(A, 40 * count, 3).reshape(40, count)
    ratio_of_scales = float(A.scale) / float(OUT.scale)
    multiplier = quantize_multiplier(float(A.scale) / (float(OUT.scale) * count))
    share = int(stored(OUT) - stored(A) * ratio_of_scales)
    expected = [
        min(max(rescaled(sum(v - 128 for v in row), *multiplier) + share, -128), 127)
        for row in x.tolist()
    ]
    sums = A.centered(x).sum(axis=1).astype(np.int64)
    found = OUT.saturate(mean(A, OUT, RULE, count)(sums)).astype(int) - 128

    assert found.tolist() == expected


@pytest.mark.parametrize("g", [A, grid(0.021, -9), grid(0.021)])
def test_floats_become_integers_after_the_zero_point_is_added(g):
    """DoQuantizeFp32ToInt8: round(x * (1 / s) + z), half away from zero."""
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.normal(scale=3, size=500), (np.arange(-40, 40) + 0.5) * 0.021])
    x = x.astype(np.float32)
    inverse = np.float32(1) / g.scale
    zero_point = stored(g)
    expected = []
    for value in x:
        exact = float(np.float32(value * inverse) + np.float32(zero_point))
        away = math.floor(abs(exact) + 0.5) * (1 if exact >= 0 else -1)
        expected.append(min(max(away, -128), 127))
    found = g.quantize_as(x, RULE)

    assert (found.astype(int) - (128 if found.dtype == np.uint8 else 0)).tolist() == expected
