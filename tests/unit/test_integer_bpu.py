"""Horizon's BPU against loops over Python's integers, written after its plugin and hbdk.

horizon_plugin_pytorch 2.5.9 nn/quantized/functional_impl.py (``_add``, ``_sub``), hbdk 3
hbdk/torch_script/utils.py (``gen_rescale_param``), hbdk4 4.1.17 hbtl/Support/MathExtras.h
(``arithRightShift``).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import onnx
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import RuleError
from onnxqat.evaluation import IntegerProgram
from onnxqat.evaluation.integer.bpu import sum_factors
from onnxqat.evaluation.integer.kernels import add, mean
from onnxqat.evaluation.integer.requantize import requantizer, two_shifts
from onnxqat.evaluation.integer.steps import Addend, MeanStep, ProductStep, Values
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import convnet, quantized, samples
from tests.unit.test_integer_kernels import grid, levels

BAYES = load_rule("horizon-bayes").arithmetic
BERNOULLI2 = load_rule("horizon-bernoulli2").arithmetic


@cache
def rescale_parameters(scale):
    """gen_rescale_param for int32 to int8: multiplier, shift before, shift after."""
    mantissa, exponent = np.frexp(np.clip(np.float32(scale), -32768, 32767))
    multiplier = int(min(max(math.floor(float(mantissa) * 2**15 + 0.5), -32768), 32767))
    shift = 15 - int(exponent)
    before = min(max(shift - (30 - 1 - 7), 0), 31)
    return multiplier, before, min(max(shift - before, 0), 31)


def right_shift(x, n, rounds):
    """arithRightShift: the carry is the last bit that is shifted out."""
    carry = (x >> (n - 1)) & 1 if rounds and n > 0 else 0
    return (x >> n) + carry


def rescaled(x, scale, *, rounds=True, rounds_before=False):
    multiplier, before, after = rescale_parameters(scale)
    return right_shift(right_shift(int(x), before, rounds_before) * multiplier, after, rounds)


SUMS = np.concatenate(
    [np.arange(-300, 300), np.random.default_rng(0).integers(-(2**28), 2**28, 400)]
)


@pytest.mark.parametrize("scale", [3e-6, 1e-4, 0.0031, 0.5, 1.0, 1.7, -0.013])
def test_two_shifts_are_those_of_a_rescale(scale):
    assert tuple(int(v) for v in two_shifts(np.float32(scale))) == rescale_parameters(scale)
    for arithmetic, rounds in ((BAYES, True), (BERNOULLI2, False)):
        rounding = arithmetic.product_rounding
        found = requantizer(arithmetic, np.float32(scale), 16, rounding=rounding)(SUMS)

        assert found.tolist() == [rescaled(s, scale, rounds=rounds) for s in SUMS]


def test_two_shifts_are_near_to_the_scale():
    scales = np.exp(np.random.default_rng(3).uniform(np.log(1e-6), np.log(40), 300))
    multiplier, before, after = two_shifts(scales)

    np.testing.assert_allclose(multiplier / 2.0 ** (before + after), scales, rtol=2.0**-15)


PAIRS = [(0.021, 0.0043), (0.0043, 0.021), (0.02, 0.02), (0.5, 0.0001)]


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("scales", PAIRS)
def test_sum_on_bayes_shifts_one_operand(scales, subtract):
    """``(x << shift) + y * qscale``, rescaled."""
    a, b, out = (grid(s) for s in (*scales, 0.03))
    x, y = levels(a, 1000, 1), levels(b, 1000, 2)
    first, second = (float(np.float32(s)) for s in scales)
    swapped = second / first > first / second
    large, small = (second, first) if swapped else (first, second)
    shift = min(math.floor(math.log2(32767 * large / small)), 23)
    factor = math.floor((-1 if subtract else 1) * small * 2**shift / large + 0.5)
    factor = min(max(factor, -32767), 32767)
    scale = np.float32(large) / np.float32(2**shift) * np.float32(-1 if subtract and swapped else 1)
    expected = []
    for one, other in zip(x.tolist(), y.tolist(), strict=True):
        p, q = (other, one) if swapped else (one, other)
        expected.append(rescaled((p << shift) + q * factor, scale / out.scale))

    assert add((a, b), out, BAYES, subtract=subtract)(x, y).tolist() == expected


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("scales", PAIRS[:3])
def test_sum_on_bernoulli2_multiplies_both_operands(scales, subtract):
    """As a convolution with an int8 weight, and an addend with an int16 factor."""
    a, b, out = (grid(s) for s in (*scales, 0.03))
    x, y = levels(a, 1000, 1), levels(b, 1000, 2)
    small, large = sorted(np.float32(s) for s in scales)
    inner = np.maximum(small / np.float32(127), large / np.float32(1 << 25))
    weight = min(max(math.floor(float(small / inner) + 0.5), -128), 127)
    mantissa, exponent = math.frexp(math.floor(float(large / inner) + 0.5))
    factor = int(min(2 ** min(exponent, 15) * mantissa, 32767))
    left = max(exponent - 15, 0)
    expected = []
    for one, other in zip(x.tolist(), y.tolist(), strict=True):
        second = min(max(-other, -128), 127) if subtract else other
        p, q = (second, one) if scales[0] > scales[1] else (one, second)
        expected.append(rescaled(p * weight + (q << left) * factor, inner / out.scale))

    assert add((a, b), out, BERNOULLI2, subtract=subtract)(x, y).tolist() == expected


@pytest.mark.parametrize("rule", ["horizon-bayes", "horizon-bernoulli2"])
def test_an_average_pool_rounds_its_first_shift_on_bayes_only(rule):
    """A window of 32 x 32 has a factor below 2**-8, which needs a first shift."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N,1,32,32] input) => (float[N,1,1,1] y)
        { v = AveragePool<kernel_shape = [32, 32]>(input) y = Sigmoid(v) }"""
    )
    floats = prepare(from_proto(model))
    plan = make_plan(floats.graph, load_rule(rule))
    x = np.full((1, 1, 32, 32), 2, np.float32)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    program = IntegerProgram(calibrate(empty, [{"input": x}], observer="minmax"), threads=1)
    source, target = program.grids["input"], program.grids["v"]
    scale = source.scale / (target.scale * np.float32(1024))
    modes = [[rescaled(s, scale, rounds_before=m) for s in range(2**13)] for m in (False, True)]
    differing = [s for s in range(2**13) if modes[0][s] != modes[1][s]]
    rows = [[s // 1024 + (i < s % 1024) for i in range(1024)] for s in differing]  # their sums
    given = np.array(rows, np.int8).reshape(-1, 1, 32, 32)
    (step,) = (one for one in program.steps if isinstance(one, MeanStep))
    found = step.run(Values(levels={"input": given})).levels["v"]

    assert len(differing) > 10
    assert found.ravel().tolist() == [modes[rule == "horizon-bayes"][s] for s in differing]


def test_mean_has_the_count_in_its_factor():
    a, out = grid(0.02), grid(0.011)
    sums = np.random.default_rng(1).integers(-6000, 6000, 500)
    scale = np.float32(0.02) / (np.float32(0.011) * np.float32(49))

    assert mean(a, out, BAYES, 49)(sums).tolist() == [rescaled(s, scale) for s in sums.tolist()]


def test_convolution_adds_the_other_branch_to_its_sums():
    network = convnet()
    _, qdq = quantized(network, "horizon-bayes")
    program = IntegerProgram(qdq, threads=1)
    x = samples(network, 8)
    (step,) = (
        s for s in program.steps if isinstance(s, ProductStep) and isinstance(s.addend, Addend)
    )
    values = Values(floats={"input": x})
    for one in program.steps[: program.steps.index(step)]:
        result = one.run(values)
        values.levels |= result.levels
        values.floats |= result.floats
    tensors = qdq.floats.graph.tensors()
    source, other, weight, out = (program.grids[n] for n in ("r2", "r1", "w3", "r3"))
    w = weight.quantize(tensors["w3"].values, "half-even").astype(np.int64)[:, :, 0, 0]
    products = np.einsum("oi,nihw->nohw", w, source.centered(values.levels["r2"]).astype(np.int64))
    addend = other.centered(values.levels["r1"]).astype(np.int64)
    expected = np.empty_like(products)
    for channel in range(6):
        scale = source.scale * weight.scale[channel]
        mantissa, exponent = math.frexp(math.floor(float(other.scale / scale) + 0.5))
        factor = int(min(2 ** min(exponent, 15) * mantissa, 32767))
        sums = products[:, channel] + (addend[:, channel] << max(exponent - 15, 0)) * factor
        flat = [rescaled(s, scale / out.scale) for s in sums.ravel().tolist()]
        expected[:, channel] = np.clip(flat, 0, 127).reshape(sums.shape)  # Relu

    np.testing.assert_array_equal(step.run(values).levels["r3"], expected)


def test_an_addend_of_almost_the_scale_of_the_sums_is_refused():
    with pytest.raises(RuleError, match="only 3 times that of the sums"):
        sum_factors(np.float32([200, 3]))


def test_tables_of_16_bits_are_refused():
    _, qdq = quantized(
        convnet(activation="Sigmoid"), "horizon-bayes", ("tensor:^(c1|r1)$.bits=16",)
    )
    with pytest.raises(RuleError, match="table of 16-bit integers is unknown"):
        IntegerProgram(qdq)
