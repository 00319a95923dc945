"""Kernels against loops over Python's integers and numpy's int64."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from onnx import helper

from onnxqat.errors import ModelError, RuleError
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.kernels import (
    Window,
    add,
    add_constant,
    leaky_relu,
    mean,
    multiply,
    multiply_constant,
    pool,
    window_sums,
)
from onnxqat.evaluation.integer.products import ExactConvolution, exact_matmul
from onnxqat.evaluation.integer.requantize import fixed_point, in_float64, nearest_multiplier
from onnxqat.qparams import QuantParams, QuantSpec
from onnxqat.rules import Arithmetic
from tests.unit.test_integer_arithmetic import divide_by_power, high_mul, rounded

FLOAT = Arithmetic(requantize="float")
SOPHGO = Arithmetic(
    requantize="multiplier", rounding="half-up", operand_bits=8, rescaled_operands=True
)
TFLITE = Arithmetic(requantize="gemmlowp", rounding="half-away")
SHIFT = Arithmetic(requantize="shift", rounding="half-even")


def grid(scale, zero_point=0, dtype=np.int8, bits=8):
    params = QuantParams(scale=np.float32(scale), zero_point=np.asarray(zero_point, dtype))
    signedness = "signed" if np.issubdtype(dtype, np.signedinteger) else "unsigned"
    return Grid(params, QuantSpec(bits=bits, signedness=signedness, symmetric=zero_point == 0))


def levels(g, count, seed=0):
    low, high = g.limits
    values = np.random.default_rng(seed).integers(low, high + 1, count)
    values[:2] = low, high
    return values.astype(g.params.zero_point.dtype)


def direct_convolution(x, w, strides, pads, dilations, group):
    """Return the int64 sums of a 2-D convolution, tap by tap."""
    count, _, height, width = x.shape
    outputs, inputs, *kernel = w.shape
    padded = np.pad(x.astype(np.int64), [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    sizes = [
        (n + pads[i] + pads[i + 2] - d * (k - 1) - 1) // s + 1
        for i, (n, k, s, d) in enumerate(
            zip((height, width), kernel, strides, dilations, strict=True)
        )
    ]
    result = np.zeros((count, outputs, *sizes), np.int64)
    for o, i, a, b in product(range(outputs), range(inputs), *map(range, kernel)):
        channel = o // (outputs // group) * inputs + i
        rows = slice(a * dilations[0], a * dilations[0] + strides[0] * sizes[0], strides[0])
        columns = slice(b * dilations[1], b * dilations[1] + strides[1] * sizes[1], strides[1])
        result[:, o] += padded[:, channel, rows, columns] * int(w[o, i, a, b])
    return result


@pytest.mark.parametrize(
    ("group", "strides", "pads", "dilations"),
    [
        (1, (1, 1), (1, 1, 1, 1), (1, 1)),
        (2, (2, 1), (0, 1, 2, 0), (1, 2)),
        (4, (1, 2), (1, 1, 1, 1), (2, 1)),
    ],
)
def test_convolution_is_exact(group, strides, pads, dilations):
    rng = np.random.default_rng(group)
    x = rng.integers(-255, 256, (2, 8, 9, 10)).astype(np.int32)
    w = rng.integers(-128, 128, (4, 8 // group, 3, 3)).astype(np.int32)
    attributes = {"group": group, "strides": strides, "pads": pads, "dilations": dilations}
    node = helper.make_node("Conv", ["a", "b", "bias"], ["y"], **attributes)
    found = ExactConvolution(node, w, 255, 17, 1)(x)

    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, direct_convolution(x, w, **attributes))


def test_large_sums_are_split_and_stay_exact():
    """255 * 127 * 3 * 3 * 200 is far beyond the 24 bits of float32."""
    x = np.full((1, 200, 3, 3), 255, np.int32)
    x[0, ::3] = 254
    w = np.full((2, 200, 3, 3), 127, np.int32)
    w[1] = np.random.default_rng(0).integers(-128, 128, w.shape[1:])
    exact = ExactConvolution(helper.make_node("Conv", ["a", "b"], ["y"]), w, 255, 17, 1)

    assert len(exact.session.get_outputs()) > 1
    expected = np.einsum("oikl,nikl->no", w.astype(np.int64), x.astype(np.int64))
    assert np.abs(expected).max() > 2**24
    np.testing.assert_array_equal(exact(x)[:, :, 0, 0], expected)


def test_transposed_convolution_is_exact():
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (1, 4, 5, 5)).astype(np.int32)
    w = rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int32)
    node = helper.make_node("ConvTranspose", ["a", "b"], ["y"], strides=[2, 2], group=2)
    expected = np.zeros((1, 6, 11, 11), np.int64)
    for i, o, a, b, row, column in product(*map(range, (4, 3, 3, 3, 5, 5))):
        value = int(x[0, i, row, column]) * int(w[i, o, a, b])
        expected[0, i // 2 * 3 + o, 2 * row + a, 2 * column + b] += value

    np.testing.assert_array_equal(ExactConvolution(node, w, 128, 17, 1)(x), expected)


def test_a_kernel_beyond_exact_sums_is_an_error():
    w = np.full((1, 1, 30, 30), 127, np.int32)
    node = helper.make_node("Conv", ["a", "b"], ["y"], name="n")
    with pytest.raises(ModelError, match="Node 'n': its kernel is too large"):
        ExactConvolution(node, w, 255, 17, 1)


def test_matrix_product_is_exact():
    rng = np.random.default_rng(0)
    a = rng.integers(-255, 256, (3, 4, 5000)).astype(np.int32)
    b = rng.integers(-255, 256, (5000, 6)).astype(np.int32)

    np.testing.assert_array_equal(exact_matmul(a, b), a.astype(np.int64) @ b.astype(np.int64))


# --- elementwise --------------------------------------------------------------------------------


def test_float_add_is_within_rounding_of_the_exact_sum():
    a, b, y = grid(0.02, 3, np.uint8), grid(0.013, 120, np.uint8), grid(0.031, 64, np.uint8)
    x, z = levels(a, 500), levels(b, 500, seed=1)
    found = add([a, b], y, FLOAT)(x, z)
    exact = (a.dequantize(x).astype(np.float64) + b.dequantize(z)) / float(y.scale)

    np.testing.assert_allclose(found, exact, atol=0.5 + 1e-4)


def test_rescaled_operands_are_rounded_one_by_one():
    a, b, y = grid(0.0146), grid(0.0094, dtype=np.uint8), grid(0.0113, dtype=np.uint8)
    x, z = levels(a, 300), levels(b, 300, seed=1)
    terms = []
    for g, values in ((a, x), (b, z)):
        scale = np.asarray(np.float64(g.scale) / np.float64(y.scale))
        m, n = (int(v) for v in nearest_multiplier(scale, 8, lowest_shift=0))
        terms.append([rounded(Fraction(int(v) * m, 2**n), "half-up") for v in values])
    p, q = np.array(terms)

    assert add([a, b], y, SOPHGO)(x, z).tolist() == (p + q).tolist()
    assert add([a, b], y, SOPHGO, subtract=True)(x, z).tolist() == (p - q).tolist()


def test_gemmlowp_add_is_the_reference_kernel():
    a, b, y = grid(0.02, -7), grid(0.013, 20), grid(0.031, -64)
    x, z = levels(a, 300), levels(b, 300, seed=1)
    scales = [float(g.scale) for g in (a, b, y)]
    twice = 2 * max(scales[:2])
    parts = [scales[0] / twice, scales[1] / twice, twice / (2**20 * scales[2])]
    fixed = [[int(v) for v in fixed_point(np.asarray(p))] for p in parts]

    def scaled(value, multiplier, exponent):
        return divide_by_power(high_mul(value, multiplier), -exponent)

    expected = [
        scaled(
            scaled((int(p) + 7) * 2**20, *fixed[0]) + scaled((int(q) - 20) * 2**20, *fixed[1]),
            *fixed[2],
        )
        for p, q in zip(x, z, strict=True)
    ]

    assert add([a, b], y, TFLITE)(x, z).tolist() == expected


def test_shifted_add_needs_one_scale():
    a, y = grid(2.0**-5), grid(2.0**-4)
    x, z = levels(a, 99), levels(a, 99, seed=1)
    total = x.astype(int) + z

    expected = [rounded(Fraction(int(t), 2), "half-even") for t in total]
    assert add([a, a], y, SHIFT)(x, z).tolist() == expected
    with pytest.raises(RuleError, match="operands of equal scale"):
        add([a, y], y, SHIFT)


@pytest.mark.parametrize(("values", "top"), [([-0.5, 0.3, 2.0], 127), ([0.1, 0.3, 2.0], 255)])
def test_constant_of_an_add_has_the_compilers_scale(values, top):
    a, y = grid(0.02), grid(0.011)
    constant, x = np.float32(values), levels(a, 3)
    scale = 2.0 / top
    integers = [rounded(Fraction(float(c)) / Fraction(scale), "half-away") for c in constant]
    m, n = nearest_multiplier(np.asarray(scale / np.float64(y.scale)), 8, lowest_shift=0)
    merged = [rounded(Fraction(c * int(m), 2 ** int(n)), "half-up") for c in integers]
    alone = add_constant(a, y, SOPHGO, np.zeros(3, np.float32))(x)

    found = add_constant(a, y, SOPHGO, constant)(x)
    assert (found - alone).tolist() == merged
    at_output = np.clip(np.rint(constant / np.float64(y.scale)), -128 if top == 127 else 0, top)
    assert (add_constant(a, y, SOPHGO, constant, signs=(-1, 1))(x) + alone == at_output).all()
    assert (alone - add_constant(a, y, SOPHGO, constant, signs=(1, -1))(x) == at_output).all()


def test_products_are_exact_before_they_are_requantized():
    a, b, y = grid(2.0**-4, -3), grid(2.0**-5, 9), grid(2.0**-3)
    x, z = levels(a, 200), levels(b, 200, seed=1)
    exact = [Fraction((int(p) + 3) * (int(q) - 9)) / 2**6 for p, q in zip(x, z, strict=True)]

    assert multiply([a, b], y, SHIFT)(x, z).tolist() == [rounded(e, "half-even") for e in exact]


def test_constant_of_a_product():
    a, y = grid(0.02), grid(0.011)
    x = levels(a, 50)
    number = np.float32(0.35)
    m, n = nearest_multiplier(np.asarray(0.35 * np.float64(a.scale) / np.float64(y.scale)), 8)
    expected = [rounded(Fraction(int(v) * int(m)) / Fraction(2) ** int(n), "half-up") for v in x]

    assert multiply_constant(a, y, SOPHGO, number)(x).tolist() == expected
    vector = np.float32([0.5, 2.0])
    found = multiply_constant(a, y, SOPHGO, vector)(x[:, None])
    exact = x[:, None] * vector * (np.float64(a.scale) / y.scale)
    np.testing.assert_allclose(found, exact, rtol=1 / 126 + 1 / 510, atol=1)


def test_leaky_relu_scales_the_negative_side():
    g = grid(0.02)
    x = np.arange(-128, 128).astype(np.int8)
    m, n = (int(v) for v in nearest_multiplier(np.asarray(0.1), 8))
    expected = [int(v) if v >= 0 else rounded(Fraction(int(v) * m, 2**n), "half-up") for v in x]

    assert leaky_relu(g, g, SOPHGO, 0.1)(x).tolist() == expected


def by_multiplier(value, factor, count=1):
    """Return ``value * factor / count`` as LiteRT's reference kernels compute it."""
    multiplier, exponent = (int(v) for v in fixed_point(np.asarray(float(factor))))
    if count > 1:
        places = min(count.bit_length() - 1, 32, 31 + exponent)
        multiplier, exponent = (multiplier << places) // count, exponent - places
    return divide_by_power(high_mul(value << max(exponent, 0), multiplier), max(-exponent, 0))


def test_gemmlowp_leaky_relu_goes_from_one_grid_to_another():
    g, y = grid(0.031, 5), grid(0.0173, -20)
    x = np.arange(-128, 128).astype(np.int8)
    factors = np.float32(0.1) * g.scale / y.scale, g.scale / y.scale  # in float32
    expected = [by_multiplier(int(v) - 5, factors[int(v) >= 5]) for v in x]

    assert leaky_relu(g, y, TFLITE, 0.1)(x).tolist() == expected


def test_factor_of_a_gemmlowp_product_is_float32():
    differ = 0
    for seed in range(20):
        scales = np.random.default_rng(seed).uniform(0.01, 0.1, 3).astype(np.float32)
        a, b, y = (grid(s, z) for s, z in zip(scales, (-7, 20, 3), strict=True))
        x, z = levels(a, 2000, seed), levels(b, 2000, seed + 50)
        single, double = scales[0] * scales[1] / scales[2], np.prod(scales[:2].astype(float))
        terms = [(int(p) + 7) * (int(q) - 20) for p, q in zip(x, z, strict=True)]
        expected = [by_multiplier(t, single) for t in terms]

        assert multiply([a, b], y, TFLITE)(x, z).tolist() == expected
        differ += fixed_point(np.asarray(float(single))) != fixed_point(double / scales[2])
    assert differ  # the factor in float64 is another one


def test_products_in_float64_are_rounded_once():
    sums = np.random.default_rng(0).integers(-(2**22), 2**22, 5000)
    scale = np.float64(np.float32(0.0213)) * np.float32(0.0031) / np.float32(0.047)
    expected = [rounded(Fraction(float(s) * float(scale)), "half-away") for s in sums]

    assert in_float64(np.asarray(scale))(sums).tolist() == expected
    assert in_float64(np.asarray(0.5))(np.int64([-3, -1, 1, 3])).tolist() == [-2, -1, 1, 2]


# --- averages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(2, 1), (1, 2)])
@pytest.mark.parametrize("dilations", [(1, 1), (2, 1), (3, 2)])
def test_window_sums_are_a_convolution_with_ones(dilations, strides):
    x = np.random.default_rng(0).integers(-128, 128, (2, 3, 7, 8)).astype(np.int32)
    window = Window(kernel=(2, 3), strides=strides, dilations=dilations, pads=(1, 0, 0, 2))
    ones = np.zeros((3, 1, 2, 3), int) + 1
    expected = direct_convolution(x, ones, strides, (1, 0, 0, 2), dilations, 3)

    np.testing.assert_array_equal(window_sums(x, window), expected)


def test_mean_multiplies():
    a, y = grid(0.05, dtype=np.uint8), grid(0.022, dtype=np.uint8)
    sums = np.arange(0, 255 * 64, 37)
    count = Fraction(float(a.scale)) / Fraction(float(y.scale))
    m, n = nearest_multiplier(np.asarray(float(count / 64)), 8)
    by_eight_bits = [rounded(Fraction(int(s) * int(m), 2 ** int(n)), "half-up") for s in sums]

    assert mean(a, y, SOPHGO, 64)(sums).tolist() == by_eight_bits
    np.testing.assert_allclose(mean(a, y, FLOAT, 64)(sums), sums * float(count / 64), atol=0.501)


@pytest.mark.parametrize("count", [1, 2, 49, 64, 100])
def test_gemmlowp_mean_has_the_count_in_its_multiplier(count):
    a, y = grid(0.05, -128), grid(0.022, -128)
    sums = np.arange(0, 255 * count, max(count // 2, 1))
    expected = [by_multiplier(int(s), float(a.scale) / float(y.scale), count) for s in sums]

    assert mean(a, y, TFLITE, count)(sums).tolist() == expected


def test_gemmlowp_pool_rounds_the_integers_themselves():
    g, counts = grid(0.05, -7), np.int64([4, 6])
    raw = np.random.default_rng(0).integers(-128, 128, (500, 2, 6))
    raw[:, 0, 4:] = 0
    averages = [[rounded(Fraction(int(r.sum()), int(n)), "half-away") + 7
                 for r, n in zip(pair, counts, strict=True)] for pair in raw]  # fmt: skip

    assert pool(g, counts)(raw.sum(-1) + 7 * counts).tolist() == averages
    # -2.5 is a tie: it becomes -3, where the centered 4.5 would become 5, which is -2
    assert pool(g, 4)(np.int64([-10 + 28])).tolist() == [-3 + 7]


# --- grids --------------------------------------------------------------------------------------


def test_grid_saturates_and_rounds_as_asked():
    g = grid(0.5, 10, bits=8)
    x = np.float32([-1e30, -1.25, -0.75, 0.25, 0.75, 1.25, 1e30])

    assert g.quantize(x, "half-even").tolist() == [-128, 8, 8, 10, 12, 12, 127]
    assert g.quantize(x, "half-away").tolist() == [-128, 7, 8, 11, 12, 13, 127]
    assert g.quantize(x, "half-up").tolist() == [-128, 8, 9, 11, 12, 13, 127]
    assert g.saturate(np.int64([-1000, 0, 1000])).tolist() == [-128, 10, 127]
    assert grid(1.0, bits=4).saturate(np.int64([-99, 99])).tolist() == [-8, 7]


def test_opset_of_the_session_is_that_of_the_node():
    x = np.ones((1, 1, 2, 2), np.int32)
    node = helper.make_node("Conv", ["a", "b"], ["y"], kernel_shape=[1, 1])

    for opset in (13, 17, 21):
        assert ExactConvolution(node, x[:, :, :1, :1], 1, opset, 1)(x).sum() == 4
