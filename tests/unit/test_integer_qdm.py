"""The arithmetic of Sophgo's CV18xx against loops written after its compiler and simulator.

sophgo/tpu-mlir: lib/Support/MathUtils.cpp, lib/Conversion/TopToTpu/CV18xx/*.cpp and
lib/Dialect/Tpu/Interfaces/Common/*.cpp. The numbers of the compiler were read from the int8 file
that tpu-mlir 1.30.2 made of a ResNet-20.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import RuleError
from onnxqat.evaluation import IntegerProgram
from onnxqat.evaluation.integer.kernels import add, leaky_relu, mean, multiply, multiply_constant
from onnxqat.evaluation.integer.qdm import compile_product
from onnxqat.evaluation.integer.requantize import cut_multiplier, gemmlowp
from onnxqat.evaluation.integer.steps import ProductStep
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import attention, quantized
from tests.unit.test_integer_arithmetic import divide_by_power, high_mul, rounded
from tests.unit.test_integer_kernels import grid, levels

RULE = load_rule("sophgo-cv183x").arithmetic
F = np.float32


def quantize_multiplier(value):
    """QuantizeMultiplier: 31 bits of the fraction, and the shift to the right."""
    fraction, exponent = math.frexp(value)
    whole = rounded(Fraction(fraction) * 2**31, "half-away")
    whole, exponent = (whole // 2, exponent + 1) if whole == 2**31 else (whole, exponent)
    return (0, 0) if exponent < -31 else (whole, -exponent)


def rescaled(value, multiplier, shift):
    """MultiplyByQuantizedMultiplier, half away from zero."""
    return divide_by_power(high_mul(int(value), multiplier), shift)


def cut(value, most=127):
    """getRShiftAndMultiplierFromQScale without qdm."""
    shift = 0
    while value * 2 ** (shift + 1) < most:
        shift += 1
    return int(value * 2**shift), shift


def half_up(value, shift):
    return math.floor(Fraction(int(value), 2**shift) + Fraction(1, 2))


# --- products -----------------------------------------------------------------------------------


def compiled_channel(weights, bias, source, output):
    """ConvLowering::LoweringINT8 for one channel; thresholds are 127 times the scales."""
    below, above = F(127 * float(source)), F(127 * float(output))
    scale = float(F(F(max(abs(w) for w in weights)) * below) / F(F(127) * above))
    scale = 0.999999 if scale >= 1 else scale
    needed = float(F(abs(bias) * F(127))) / (0x7FFFFFFF * 0.998 * float(above))
    if scale < needed < 1:
        scale = needed
    multiplier, shift = quantize_multiplier(scale)
    if not multiplier:
        return [0] * len(weights), 0, multiplier, shift
    inverse = 2.0 ** (shift + 31) / multiplier
    steps, counts = F(float(below / above) * inverse), F(float(F(127) / above) * inverse)
    integers = [min(max(round(float(F(w * steps))), -128), 127) for w in weights]
    return integers, round(float(F(bias * counts))), multiplier, shift


@pytest.fixture(scope="module")
def channels():
    """Channels with usual weights, nearly dead ones, zeros, large ones, and biases for each."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 1, 1e-5, 1e-9, 1e-12, 0, 1000, 3000])[:, None]
    weight = (rng.normal(scale=0.2, size=(8, 27)) * sizes).astype(F)
    bias = np.array([0.3, -7, 5, -9, 4, 1, 0.5, -2], F)
    return weight, bias


def test_convolution_is_compiled_channel_by_channel(channels):
    weight, bias = channels
    source, output = F(0.0213), F(0.0571)
    expected = [compiled_channel(w, b, source, output) for w, b in zip(*channels, strict=True)]
    found = compile_product(weight, bias.astype(float), 0, source=source, output=output)

    assert found.levels.tolist() == [e[0] for e in expected]
    assert found.bias.tolist() == [e[1] for e in expected]
    assert found.multiplier.tolist() == [e[2] for e in expected]
    assert (-found.exponent).tolist() == [e[3] for e in expected]
    # the cases are there: a larger scale for the sake of a bias, and M cut to below 1
    largest = np.abs(found.levels.astype(int)).max(axis=1).tolist()
    assert largest[:6] == [127, 127, 40, 0, 0, 0]
    assert found.multiplier[6:].tolist() == [quantize_multiplier(0.999999)[0]] * 2
    assert found.bias.max() > 0.99 * 0.998 * 2**31


def test_scales_of_the_table_count(channels):
    """The largest weight then need not become 127."""
    weight = channels[0][:2]
    scales = (np.abs(weight).max(axis=1) / 110).astype(F)
    found = compile_product(weight, None, 0, source=F(0.02), output=F(0.05), scales=scales)

    assert found.levels.tolist() == np.rint(weight / scales[:, None]).astype(int).tolist()
    assert np.abs(found.levels).max(axis=1).tolist() == [110, 110]
    np.testing.assert_allclose(found.scale, scales, rtol=1e-6)


def test_sums_become_output_integers_as_qdm(channels):
    weight, bias = channels
    made = compile_product(weight, bias.astype(float), 0, source=F(0.0213), output=F(0.0571))
    sums = np.random.default_rng(1).integers(-(2**24), 2**24, (200, 8)) >> np.arange(0, 16, 2)
    pairs = list(zip(made.multiplier.tolist(), (-made.exponent).tolist(), strict=True))
    expected = [[rescaled(s, *p) for s, p in zip(row, pairs, strict=True)] for row in sums.tolist()]

    assert gemmlowp(made.multiplier, made.exponent, "half-away")(sums).tolist() == expected


def test_matrix_has_one_scale_that_its_largest_bias_may_raise():
    rng = np.random.default_rng(2)
    weight, source, output = rng.normal(size=(6, 4)).astype(F), F(0.02), F(0.05)
    plain = compile_product(weight, None, None, source=source, output=output)
    tiny = compile_product(F(1e-9) * weight, np.array([1.0, -3, 2, 0]), None, source=source,
                           output=output)  # fmt: skip

    assert plain.bias is None
    assert np.abs(plain.levels).max() == 127
    below, above = F(127 * float(source)), F(127 * float(output))
    scale = float(F(np.abs(weight).max() * below) / F(F(127) * above))
    assert (int(plain.multiplier), -int(plain.exponent)) == quantize_multiplier(scale)
    assert np.abs(tiny.bias).max() == pytest.approx(0.998 * 2**31, rel=1e-6)
    assert not tiny.levels.any()


def test_multipliers_of_the_compiler():
    source, output = F(0.021682934835553169), F(0.015716005116701126)
    largest = F(127) * np.array([0.00029246785561554134, 0.0009599989280104637], F)
    made = compile_product(largest[:, None], None, 0, source=source, output=output)

    assert made.multiplier.tolist() == [1774654464, 1456285312]
    assert (-made.exponent).tolist() == [11, 9]
    assert cut_multiplier(0.085922464728355408 / 0.050380747765302658 / 64) == (109, 12)


# --- other ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("scales", [(0.014104607, 0.015716005, 0.020472342), (0.9, 0.001, 0.02)])
def test_sum_has_integers_of_7_bits_and_one_shift(scales, subtract):
    a, b, y = map(grid, scales)
    factors = [float(F(float(g.scale) / float(y.scale))) for g in (a, b)]
    _, shift = cut(max(factors))
    first, second = (int(f * 2**shift) for f in factors)
    if scales[0] < 0.02:
        assert (first, second, shift) == (88, 98, 7)  # the compiler's
    sign = -1 if subtract else 1
    x, z = levels(a, 2000, 1), levels(b, 2000, 2)
    expected = [half_up(p * first + sign * q * second, shift)
                for p, q in zip(x.tolist(), z.tolist(), strict=True)]  # fmt: skip

    assert add((a, b), y, RULE, subtract=subtract)(x, z).tolist() == expected


@pytest.mark.parametrize("output", [0.05, 0.0007])
def test_product_of_two_activations_has_a_factor_below_1(output):
    a, b, y = grid(0.021), grid(0.0437), grid(output)
    factor = float(a.scale) * float(b.scale) / float(y.scale)
    pair = quantize_multiplier(factor if factor < 1 else 0.999999)
    x, z = levels(a, 2000, 1), levels(b, 2000, 2)
    expected = [rescaled(p * q, *pair) for p, q in zip(x.tolist(), z.tolist(), strict=True)]

    assert multiply((a, b), y, RULE)(x, z).tolist() == expected


def test_product_with_a_number_is_a_table():
    a, y, number = grid(0.0437), grid(0.0182), 0.37
    x = np.arange(-128, 128).astype(np.int8)
    factor = float(a.scale) * float(F(number)) / float(y.scale)
    expected = [rounded(Fraction(v * factor), "half-away") for v in x.tolist()]

    assert multiply_constant(a, y, RULE, F(number))(x).tolist() == expected


@pytest.mark.parametrize("count", [4, 49, 3600])
def test_mean_has_the_count_in_its_multiplier(count):
    """Beyond 24 bits, the product is a float32."""
    a, y = grid(0.0859), grid(0.0504)
    multiplier, shift = cut(float(a.scale) / (float(y.scale) * count))
    sums = np.random.default_rng(0).integers(-128 * count, 127 * count + 1, 3000)
    products = [Fraction(float(F(int(s)) * F(multiplier))) for s in sums]
    expected = [math.floor(p / 2**shift + Fraction(1, 2)) for p in products]

    assert mean(a, y, RULE, count)(sums).tolist() == expected


@pytest.mark.parametrize("alpha", [0.1, -0.2])
def test_leaky_relu_multiplies_negative_integers(alpha):
    g, slope = grid(0.05), float(F(alpha))
    multiplier, shift = cut(abs(slope))
    x = levels(g, 1000)
    signed = multiplier if alpha > 0 else -multiplier
    expected = [v if v >= 0 else half_up(v * signed, shift) for v in x.tolist()]

    assert leaky_relu(g, g, RULE, slope)(x).tolist() == expected


@pytest.mark.parametrize(
    ("op", "shape", "expected"), [("Conv", (3, 4, 1), 110), ("ConvTranspose", (4, 3, 1), 127)]
)
def test_only_the_scales_of_a_conv_are_read_from_the_table(op, shape, expected):
    tensors = {"w": np.random.default_rng(0).normal(size=shape).astype(F)}
    data = np.random.default_rng(1).normal(size=(8, 4, 5)).astype(F)
    program = program_of(f"y = {op}(input, w)", tensors, data, ("weight.range_factor=1.15",))
    (step,) = (s for s in program.steps if isinstance(s, ProductStep))
    # one input at a time gives the column of its weights
    columns = step.sums(np.eye(4, dtype=np.int32)[:, :, None])

    assert np.abs(columns).max(axis=(0, 2)).tolist() == [expected] * 3


# --- networks -----------------------------------------------------------------------------------


def program_of(body, tensors, x, overrides=()):
    rank = ",".join(["N", *map(str, x.shape[1:])])
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[{rank}] input) => (float[p,q,r] y)
        {{ {body} }}"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in tensors.items())
    floats = prepare(from_proto(model))
    plan = make_plan(
        floats.graph, load_rule("sophgo-cv183x"), tuple(map(parse_override, overrides))
    )
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return IntegerProgram(calibrate(empty, [{"input": x}], observer="minmax"), threads=1)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(16, 2, 4)).astype(F)


EYE = {"w": np.eye(4, dtype=F)}


@pytest.mark.parametrize(
    ("body", "k"),
    [
        ("c = MatMul(input, w) d = Relu(c) y = Add(d, k)", np.float32([[1], [2]])),
        ("c = MatMul(input, w) y = Sub(k, c)", np.float32([[1], [2]])),
        ("c = MatMul(input, w) y = Mul(c, k)", np.float32([[1], [2]])),
        ("c = MatMul(input, w) d = Mul(c, k) y = Relu(d)", np.float32(0.3)),
    ],
)
def test_what_the_compiler_runs_in_bfloat16_is_refused(body, k, x):
    with pytest.raises(RuleError, match="computes it with a constant in bfloat16"):
        program_of(body, {**EYE, "k": k}, x)


def test_products_of_two_activations_are_refused():
    _, qdq = quantized(attention(), "sophgo-cv183x")
    with pytest.raises(RuleError, match=r"Node 'n_s0': the chip computes it in bfloat16"):
        IntegerProgram(qdq)


def test_product_with_a_float_output_is_refused(x):
    _, qdq = quantized(attention(), "sophgo-cv183x", ("tensor:^q$.quantize=false",))
    with pytest.raises(RuleError, match="because its output stays float"):
        IntegerProgram(qdq)


def test_a_bias_beyond_int32_is_added_in_integers(x):
    """Training leaves it float: at s_x * s_w it would have 36 bits. The compiler raises s_w."""
    tensors = {"w": F(1e-11) * np.eye(4, dtype=F), "k": F([1, -2, 3, 0])}
    program = program_of("c = MatMul(input, w) y = Add(c, k)", tensors, x)
    (found,) = program.run(None, {"input": x})
    (step,) = (s for s in program.steps if isinstance(s, ProductStep))

    assert np.abs(step.bias).max() > 2**30
    np.testing.assert_allclose(found, np.broadcast_to(tensors["k"], x.shape), atol=0.02)
