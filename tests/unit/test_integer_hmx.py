"""The HTP's arithmetic against loops over Python's integers, and values its emulator computed."""

from __future__ import annotations

from fractions import Fraction
from math import floor, log2

import numpy as np
import onnx
import pytest

from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.hmx import (
    add_on_vectors,
    concatenate_on_vectors,
    convert_sums,
)
from onnxqat.qparams import QuantParams, QuantSpec
from onnxqat.rules import load_rule
from tests.networks import convnet, quantized, samples
from tests.unit.test_integer_arithmetic import rounded

HALF = Fraction(1, 2)


def grid(scale, zero_point, dtype=np.uint8):
    params = QuantParams(scale=np.float32(scale), zero_point=np.asarray(zero_point, dtype))
    bits = np.dtype(dtype).itemsize * 8
    return Grid(params, QuantSpec(bits=bits, signedness="unsigned", symmetric=False))


def ratio(one, other):
    return Fraction(float(np.float32(one))) / Fraction(float(np.float32(other)))


def floor_at(value, bits):
    """Return a fraction without what lies behind so many bits after the point."""
    return Fraction(floor(value * 2**bits), 2**bits)


def significand(scale, bits):
    """Return a scale rounded to so many bits."""
    unit = Fraction(2) ** (floor(log2(scale)) - bits + 1)
    return round(scale / unit) * unit


# --- sums ----------------------------------------------------------------------------------------


def converted(total, scale, zero_point, bits):
    """Convert one sum: a fixed-point fraction of the output's whole range, times 11 bits."""
    whole = 2**bits
    power = Fraction(2) ** floor(log2(scale))
    fraction = floor_at(
        (total + round(Fraction(zero_point) / scale)) * power / whole, bits * 3 // 2
    )
    levels = floor(fraction * (significand(scale, 11) / power) * whole + HALF)
    return min(max(levels, 0), whole - 1)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("scale", [2.0**-9, 0.00309, 0.0009, 0.3])
def test_sums_become_8_bits_as_the_matrix_unit_converts_them(scale, zero_point):
    sums = np.random.default_rng(0).integers(-int(140 / scale), int(140 / scale), 400)
    output = grid(1, zero_point)
    found = output.saturate(convert_sums(np.float64(scale), output)(sums))
    expected = [converted(int(s), Fraction(scale), zero_point, 8) for s in sums]

    assert found.tolist() == expected


def test_each_channel_has_its_own_scale():
    scale = np.float64([[0.002], [0.0471]])
    sums = np.int64([[4321, -77], [812, -1003]])
    output = grid(1, 9)
    both = convert_sums(scale, output)(sums)
    alone = [convert_sums(scale[i], output)(sums[i]).tolist() for i in range(2)]

    assert both.tolist() == alone


def test_sums_of_16_bit_activations_are_kept_in_halves():
    rng = np.random.default_rng(1)
    levels, weights = rng.integers(0, 2**16, (60, 7)), rng.integers(-127, 128, 7)
    zero_in, zero_out, bias, scale = 31001, 30000, 55700, 0.0021
    expected = []
    for row in levels.tolist():
        high = sum(w * (x >> 8) for w, x in zip(weights.tolist(), row, strict=True))
        low = sum(w * (x & 255) for w, x in zip(weights.tolist(), row, strict=True))
        moved = rounded(Fraction(-zero_in * int(weights.sum()), 256), "half-up")
        total = high + (low >> 8) + moved + ((bias + round(zero_out / scale)) >> 8)
        expected.append(converted(total, Fraction(scale) * 256, 0, 16))
    output = grid(1, zero_out, np.uint16)
    requantize = convert_sums(
        np.float64(scale),
        output,
        bias=np.int64(bias),
        offsets=np.int64(zero_in * weights.sum()),
    )

    assert output.saturate(requantize((levels - zero_in) @ weights + bias)).tolist() == expected


EMULATED_SUMS = [  # s_w, sums with their bias, the emulator's integers, exact ones
    (0.01905881, [-14071, -11150, -8229, -18135], [84, 93, 102, 72], [85, 94, 103, 72]),
    (0.00632777, [5382, 9282, 12182, 4982], [133, 137, 140, 133], [134, 138, 141, 133]),
    (0.00381052, [5733, 5701, 5669, 6661], [131, 131, 131, 132], [132, 132, 132, 132]),
]


@pytest.mark.parametrize(("weight_scale", "sums", "emulated", "exact"), EMULATED_SUMS)
def test_the_emulator_converted_the_same_to_8_bits(weight_scale, sums, emulated, exact):
    output = grid(0.17284553, 128)
    scale = np.float64(np.float32(0.028031973)) * np.float32(weight_scale) / output.scale

    assert output.saturate(convert_sums(scale, output)(np.int64(sums))).tolist() == emulated
    assert np.floor(np.int64(sums) * scale + 128.5).tolist() == exact


@pytest.mark.parametrize(
    ("scale", "weight", "sums", "emulated"),
    [
        (0.002717240592286989, 106, [5514120, 2593290, 450712], [48184, 40245, 34422]),
        (0.0009390978259749093, -115, [-5982300, -2813475, -488980], [27565, 30540, 32723]),
    ],
)
def test_the_emulator_converted_the_same_to_16_bits(scale, weight, sums, emulated):
    output = grid(1, 33189, np.uint16)
    requantize = convert_sums(np.float64(scale), output, offsets=np.int64(3757 * weight))

    assert output.saturate(requantize(np.int64(sums))).tolist() == emulated


# --- the vector unit -----------------------------------------------------------------------------


def added(x, y, grids, sign):
    """Add one pair, with multipliers of 14 bits at one shift."""
    ratios = [ratio(g.scale, grids[2].scale) for g in grids[:2]]
    zeros = [int(g.params.zero_point) for g in grids]
    shift = 13 - floor(log2(sum(ratios) if sign > 0 else max(ratios)))
    a, b = (round(r * 2**shift) for r in ratios)
    constant = rounded(Fraction(zeros[2] * 2**shift - zeros[0] * a - sign * zeros[1] * b, 256),
                       "half-up") * 256  # fmt: skip
    levels = rounded(Fraction(x * a + sign * y * b + constant, 2**shift), "half-up")
    return min(max(levels, 0), 255)


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("scales", [(0.0306, 0.0267, 0.0387), (0.01, 0.05, 0.06), (0.02, 0.02, 1)])
def test_additions_have_one_shift_and_a_coarse_constant(scales, subtract):
    grids = [grid(s, z) for s, z in zip(scales, (249, 160, 126), strict=True)]
    x, y = np.random.default_rng(3).integers(0, 256, (2, 500)).astype(np.uint8)
    kernel = add_on_vectors(grids[:2], grids[2], subtract=subtract)
    sign = -1 if subtract else 1
    expected = [added(int(a), int(b), grids, sign) for a, b in zip(x, y, strict=True)]

    assert grids[2].saturate(kernel(x, y)).tolist() == expected


EMULATED_ADDITIONS = [  # scales, zero points, both operands, the emulator's integers
    (
        (0.030686939135193825, 0.02671956829726696, 0.03873120993375778),
        (249, 160, 126),
        [29, 160, 190, 211, 229, 244],
        [238, 218, 156, 42, 146, 194],
        [5, 96, 77, 15, 101, 146],
    ),
    (
        (0.011300000362098217, 0.05000000074505806, 0.05999999865889549),
        (255, 130, 128),
        [9, 32, 86, 117, 163, 209],
        [35, 211, 68, 67, 23, 183],
        [2, 153, 44, 49, 21, 163],
    ),
]
EMULATED_SUBTRACTION = (
    (0.008241772651672363, 0.02390757016837597, 0.01490318588912487),
    (81, 233, 95),
    [0, 14, 33, 57, 90, 171],
    [115, 151, 223, 192, 204, 250],
    [240, 190, 85, 148, 147, 117],
)


@pytest.mark.parametrize(
    ("case", "subtract"),
    [*((case, False) for case in EMULATED_ADDITIONS), (EMULATED_SUBTRACTION, True)],
)
def test_the_emulator_added_the_same(case, subtract):
    scales, zeros, x, y, emulated = case
    grids = [grid(s, z) for s, z in zip(scales, zeros, strict=True)]
    kernel = add_on_vectors(grids[:2], grids[2], subtract=subtract)
    found = grids[2].saturate(kernel(np.uint8(x), np.uint8(y)))
    sign = -1 if subtract else 1
    exact = [
        rounded((a - zeros[0]) * ratio(scales[0], scales[2])
                + sign * (b - zeros[1]) * ratio(scales[1], scales[2]) + zeros[2], "half-up")
        for a, b in zip(x, y, strict=True)
    ]  # fmt: skip

    assert found.tolist() == emulated
    assert all(one != other for one, other in zip(emulated, exact, strict=True))


def rescaled(x, own, output):
    """Rescale one integer: 15 bits, then 6 bits behind the point, then none."""
    factor = ratio(own.scale, output.scale)
    bits = 6 - max(floor(log2(factor)), 0)
    product = (x - int(own.params.zero_point)) * significand(factor, 15)
    coarse = Fraction(rounded(product * 2**bits, "half-up"), 2**bits)
    return min(max(rounded(coarse, "half-up") + int(output.params.zero_point), 0), 255)


def test_tensors_are_rescaled_before_they_are_concatenated():
    output = grid(0.0119, 141)
    operands = [grid(s, z) for s, z in ((0.0417, 82), (0.0026, 66), (0.05, 7), (0.0119, 141))]
    x = np.random.default_rng(4).permutation(256).astype(np.uint8).reshape(2, 128)
    found = output.saturate(concatenate_on_vectors(operands, output, -1)(x, x, x, x))
    expected = [[rescaled(int(v), own, output) for own in operands for v in row] for row in x]

    assert found.tolist() == expected
    assert np.array_equal(found[:, -128:], x)


@pytest.mark.parametrize(
    ("scale", "zero_point", "levels", "emulated", "exact"),
    [
        (0.04168013483285904, 82, [42, 81], [1, 138], [0, 137]),
        (0.002622639760375023, 66, [23, 118, 213], [132, 153, 174], [131, 152, 173]),
    ],
)
def test_the_emulator_rescaled_the_same(scale, zero_point, levels, emulated, exact):
    own, output = grid(scale, zero_point), grid(0.011865170672535896, 141)
    found = output.saturate(concatenate_on_vectors([own], output, 0)(np.uint8(levels)))
    once = [rounded((v - zero_point) * ratio(scale, output.scale) + 141, "half-up") for v in levels]

    assert found.tolist() == emulated
    assert once == exact


def test_wider_integers_are_rounded_once():
    grids = [grid(s, z, np.uint16) for s, z in ((3e-4, 20000), (7e-5, 40000), (4e-4, 30000))]
    x, y = np.random.default_rng(5).integers(0, 2**16, (2, 200)).astype(np.uint16)
    ratios = [ratio(g.scale, grids[2].scale) for g in grids[:2]]
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    sums = [(a - 20000) * ratios[0] + (b - 40000) * ratios[1] for a, b in pairs]
    joined = [(v - 40000) * ratios[1] for v in y.tolist()]

    found = add_on_vectors(grids[:2], grids[2])(x, y)
    assert found.tolist() == [rounded(s, "half-up") for s in sums]
    found = concatenate_on_vectors(grids[1:2], grids[2], 0)(y)
    assert found.tolist() == [rounded(s, "half-up") for s in joined]


# --- networks ------------------------------------------------------------------------------------


def strided(smallest):
    """Return a depthwise Conv with strides whose second channel has small weights."""
    rng = np.random.default_rng(6)
    weight = rng.uniform(0.5, 1, (4, 1, 3, 3)).astype(np.float32)
    weight[1] *= np.float32(smallest)
    conv = onnx.helper.make_node(
        "Conv", ["input", "w"], ["output"], "conv", group=4, strides=[2, 2], pads=[1] * 4
    )
    shape = ["N", 4, 16, 16]
    graph = onnx.helper.make_graph(
        [conv],
        "strided",
        [onnx.helper.make_tensor_value_info("input", 1, shape)],
        [onnx.helper.make_tensor_value_info("output", 1, ["N", 4, 8, 8])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )


@pytest.mark.parametrize(("smallest", "once"), [(0.5, True), (1e-3, False)])
def test_strided_depthwise_convolutions_are_rounded_once_unless_a_scale_is_small(smallest, once):
    network = strided(smallest)
    _, qdq = quantized(network, "qnn-htp")
    program = IntegerProgram(qdq, threads=1)
    program.run(None, {"input": samples(network, 64, seed=5)})
    (point,) = (p for p in program.points if p.tensor == "output")

    assert (point.differing < 1e-3) == once


@pytest.mark.parametrize(("rule", "levels"), [("qnn-htp", 1), ("qnn-htp-16", 40)])
def test_networks_run_in_the_arithmetic_of_the_htp(rule, levels):
    network = convnet(activation="LeakyRelu")
    _, qdq = quantized(network, rule)
    program = IntegerProgram(qdq, threads=1)
    program.run(None, {"input": samples(network, 16, seed=5)})

    assert load_rule(rule).arithmetic.requantize == "hmx"
    assert len(program.points) >= 11
    assert max(point.max_levels for point in program.points) <= levels
    assert any(point.differing > 0.01 for point in program.points)
