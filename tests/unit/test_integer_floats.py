"""Chips with float steps: Ascend, ncnn, Cambricon, Sophgo and others, against plain numpy.

Ascend: canndev ascend_quant.py and ascend_dequant.py. ncnn: src/layer/quantize.cpp and
requantize.cpp. Cambricon: the formulas of the CNNL user guide. Sophgo: lib/Support/CastUtils.cpp.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from onnxqat.errors import RuleError
from onnxqat.evaluation import IntegerProgram
from onnxqat.evaluation.integer.products import SplitConvolution
from onnxqat.evaluation.integer.requantize import dequantizer, requantizer
from onnxqat.evaluation.integer.steps import (
    FloatStep,
    FloatTarget,
    ProductStep,
    QuantizeStep,
    Values,
)
from onnxqat.rules import Arithmetic, load_rule
from tests.networks import _Graph, convnet, quantized, samples
from tests.unit.test_integer_kernels import direct_convolution, grid

ASCEND = load_rule("ascend").arithmetic
NCNN = load_rule("ncnn").arithmetic
ROUNDED = {
    "half-even": lambda v: int(np.rint(np.float64(v))),
    "half-away": lambda v: int(math.copysign(math.floor(abs(float(v)) + 0.5), v)),
    "half-up": lambda v: math.floor(float(v) + 0.5),
}


def values_near_ties(scale, seed=0):
    rng = np.random.default_rng(seed)
    ties = (np.arange(-300, 300) + 0.5) * float(scale)
    return np.concatenate([rng.normal(scale=60 * float(scale), size=500), ties]).astype(np.float32)


def test_ascend_quantizes_in_float16():
    """x * (1 / s), then + offset, both rounded to float16; then to the nearest even integer."""
    g = grid(0.0173, -9)
    x = values_near_ties(g.scale)
    inverse = np.float16(np.float32(1) / g.scale)
    expected = []
    for value in x:
        scaled = np.float16(np.float16(value) * inverse)
        shifted = np.float16(scaled + np.float16(-9))
        expected.append(min(max(ROUNDED["half-even"](shifted), -128), 127))

    assert g.quantize_as(x, ASCEND).tolist() == expected
    assert expected != g.quantize(x, "half-even").tolist()


@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_cambricon_multiplies_and_rounds_as_it_is_set(rounding, kind):
    rule = Arithmetic(
        requantize="float", float_scaling="multiply", float_rounding=rounding, float_type=kind
    )
    g = grid(0.0173)
    x = values_near_ties(g.scale)
    one = np.dtype(kind).type
    inverse = one(np.float32(1) / g.scale)
    expected = [min(max(ROUNDED[rounding](one(one(v) * inverse)), -128), 127) for v in x]

    assert g.quantize_as(x, rule).tolist() == expected


def test_ncnn_rounds_half_away_and_leaves_out_minus_128():
    _, qdq = quantized(convnet(), "ncnn")
    g = IntegerProgram(qdq, threads=1).grids["r1"]
    x = values_near_ties(g.scale)
    inverse = np.float32(1) / g.scale
    expected = [min(max(ROUNDED["half-away"](np.float32(v * inverse)), -127), 127) for v in x]

    assert g.quantize_as(x, NCNN).tolist() == expected


def half(value):
    return np.float32(np.float16(value))


def normalized(row, gamma, beta):
    """Return a LayerNormalization of float16 values with float16 parameters, in float32."""
    centered = row - row.mean(dtype=np.float32)
    inverse = np.float32(1) / np.sqrt((centered * centered).mean(dtype=np.float32) + 1e-5)
    return centered * inverse * half(gamma) + half(beta)


def test_sophgo_normalizes_in_float16():
    """Scales, integers times scales, parameters, and what becomes integers are float16."""
    g = _Graph(0)
    g.node("MatMul", ["input", g.weight("w", 8, 16)], "a")
    gamma, beta = (g.weight(n, 16, size=1.0) for n in ("gamma", "beta"))
    g.node("LayerNormalization", ["a", gamma, beta], "b")
    g.node("MatMul", ["b", g.weight("v", 16, 4)], "output")
    network = g.model(["N", 8], ["N", 4])
    model = quantized(network, "sophgo-bm1684x")[1]
    program = IntegerProgram(model, threads=1)
    values = Values(floats={"input": samples(network, 64, seed=3)})
    for step in program.steps:
        found = step.run(values)
        values = Values(values.levels | found.levels, values.floats | found.floats)
    scale, inverse = half(program.grids["a"].scale), half(1 / program.grids["b"].scale)
    tensors = model.floats.graph.tensors()
    parameters = [tensors[name].values for name in ("gamma", "beta")]
    rows = [normalized(half(scale * row.astype(np.float32)), *parameters)
            for row in values.levels["a"]]  # fmt: skip
    expected = [[min(max(ROUNDED["half-away"](half(y * inverse)), -128), 127) for y in row]
                for row in rows]  # fmt: skip

    assert values.levels["b"].tolist() == expected
    away = program.grids["b"].quantize(values.floats["b"], "half-away")
    assert 0 < np.count_nonzero(away != values.levels["b"]) < 20


def test_a_constant_beyond_float16_keeps_an_op_in_float32():
    g = _Graph(0)
    g.node("MatMul", ["input", g.weight("w", 8, 16)], "a")
    g.node("LayerNormalization", ["a", g.weight("gamma", 16, size=1e5)], "output")
    model = quantized(g.model(["N", 8], ["N", 16]), "sophgo-bm1684x")[1]

    assert [s.halves for s in IntegerProgram(model).steps if isinstance(s, FloatStep)] == [False]


def test_a_scale_whose_inverse_is_no_float16_is_an_error():
    with pytest.raises(RuleError, match="1e-06 is too small: its inverse exceeds float16"):
        grid(1e-6).quantize_as(np.float32([0]), ASCEND)
    step = QuantizeStep(tensor="x", grid=grid(1e-6), arithmetic=ASCEND)
    with pytest.raises(RuleError, match="'x': Scale 1e-06 is too small"):
        step.run(Values(floats={"x": np.float32([0])}))


SUMS = np.random.default_rng(1).integers(-(2**23), 2**23, 600)


@pytest.mark.parametrize("kind", ["float32", "float19", "float16"])
def test_sums_are_multiplied_by_a_rounded_factor(kind):
    """deq_scale as float32, as its upper 19 bits, or as float16; the result is a float16."""
    rule = Arithmetic(requantize="float", factor_type=kind, float_type="float16")
    scales = np.float32(0.0173), np.float32([0.00213, 0.0007])
    expected = []
    for scale in scales[1]:
        factor = np.float32(scales[0] * scale)
        if kind == "float19":
            bits = int(factor.view(np.uint32)) & 0xFFFFE000
            factor = np.uint32(bits).view(np.float32)
        elif kind == "float16":
            factor = np.float32(np.float16(factor))
        expected.append([float(np.float16(np.float32(s) * factor)) for s in SUMS])
    found = dequantizer(rule, (scales[0], scales[1].reshape(-1, 1)))(np.stack([SUMS, SUMS]))

    assert found.tolist() == expected


def test_a_float_bias_is_added_to_floats():
    bias = np.float32([[0.3], [-0.7]])
    scales = np.float32(0.0173), np.float32([[0.00213], [0.0007]])
    found = dequantizer(NCNN, scales, bias)(np.stack([SUMS, SUMS]))
    for row in range(2):
        factor = np.float32(scales[0] * scales[1][row, 0])
        expected = [float(np.float32(np.float32(s) * factor) + bias[row, 0]) for s in SUMS]

        assert found[row].tolist() == expected


def test_a_float_bias_before_rounding_is_in_levels():
    rule = load_rule("axera-ax650").arithmetic
    factor, offset = np.float32(0.0031), np.float32(2.7)
    expected = [int(np.rint(np.float32(np.float32(s) * factor) + offset)) for s in SUMS]

    assert requantizer(rule, factor, 32, offset=offset)(SUMS).tolist() == expected
    with pytest.raises(RuleError, match="keeps the bias of a convolution in float"):
        requantizer(Arithmetic(requantize="gemmlowp"), factor, 32, offset=offset)


@pytest.mark.parametrize("rule", ["ascend", "ncnn", "axera-ax650"])
def test_a_convolution_adds_its_bias_where_the_chip_does(rule):
    """Ascend adds integers, ncnn floats, and Axera is assumed to add floats before it rounds."""
    network = convnet()
    _, qdq = quantized(network, rule)
    program = IntegerProgram(qdq, threads=1)
    step = next(s for s in program.steps if isinstance(s, ProductStep))
    x = program.grids["input"]
    values = Values(levels={"input": x.quantize(samples(network, 4), "half-even")})
    found = step.run(values)
    tensors = qdq.floats.graph.tensors()
    weight, bias = program.grids["w1"], tensors["b1"].values.reshape(-1, 1, 1)
    w = weight.quantize(tensors["w1"].values, "half-even").astype(np.int32)
    centered = x.centered(values.levels["input"])
    sums = direct_convolution(centered, w, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    factor = (x.scale * weight.scale).reshape(-1, 1, 1)
    if rule == "ascend":
        sums = sums + np.rint(bias.astype(np.float64) / (x.scale * weight.scale.reshape(-1, 1, 1)))
        expected = (sums.astype(np.float32) * factor).astype(np.float16)
        np.testing.assert_array_equal(found.floats["c1"], expected)
    elif rule == "ncnn":
        np.testing.assert_array_equal(found.floats["c1"], sums.astype(np.float32) * factor + bias)
    else:
        out = program.grids["r1"]
        levels = np.rint(sums.astype(np.float32) * (factor / out.scale) + bias / out.scale)
        zero_point = int(out.params.zero_point)
        expected = np.clip(levels + zero_point, zero_point, 255)  # Relu
        np.testing.assert_array_equal(found.levels["r1"], expected)
    assert isinstance(step.target, FloatTarget) == (rule != "axera-ax650")


def wide(rng, shape, largest):
    values = rng.integers(-largest, largest + 1, shape).astype(np.int32)
    values.flat[:2] = -largest, largest
    return values


@pytest.mark.parametrize("weight_bits", [8, 16])
def test_sums_of_16_bits_are_exact(weight_bits):
    """Also if the zero point is at an end, so that centered integers have 17 bits."""
    rng = np.random.default_rng(2)
    x, w = wide(rng, (2, 5, 6, 7), 2**16 - 1), wide(rng, (3, 5, 3, 3), 2 ** (weight_bits - 1) - 1)
    node = next(n for n in convnet().graph.node if n.op_type == "Conv")
    found = SplitConvolution(node, w, 2**16 - 1, 17, 1)(x)

    np.testing.assert_array_equal(found, direct_convolution(x, w, (1, 1), (1, 1, 1, 1), (1, 1), 1))


def test_sums_of_many_wide_products_are_exact():
    """729 products of halves, 255 * 127, add up to an odd number above 2**24."""
    x, w = np.full((1, 81, 3, 3), 65407, np.int32), np.full((1, 81, 3, 3), 32639, np.int32)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    found = SplitConvolution(node, w, 2**16 - 1, 17, 1)(x)

    assert found.tolist() == [[[[729 * 65407 * 32639]]]]
