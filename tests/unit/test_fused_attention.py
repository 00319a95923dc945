"""Attention blocks that Sophgo's compiler fuses, against loops over heads, rows and columns."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.attention import CopyStep, SoftmaxStep
from onnxqat.evaluation.integer.steps import ProductStep
from tests.networks import _Graph, quantized, samples

TOKENS, WIDTH, HEADS = 5, 8, 2
PART = WIDTH // HEADS


def block(*, mask=False):
    """Return an attention block with two heads, between two tensors of the residual stream."""
    g = _Graph(3)
    shape = g.constant("split", np.int64([0, TOKENS, HEADS, PART]))
    for name in ("q", "k", "v"):
        size = 0.5 if name == "q" else 0.3
        g.node("MatMul", ["input", g.weight(f"w{name}", WIDTH, WIDTH, size=size)], f"{name}0")
        g.node("Add", [f"{name}0", g.weight(f"b{name}", WIDTH)], f"{name}1")
        g.node("Reshape", [f"{name}1", shape], f"{name}2")
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        g.node("Transpose", [f"{name}2"], name, perm=perm)
    g.node("MatMul", ["q", "k"], "s0")
    g.node("Mul", ["s0", g.constant("scaling", np.float32(0.3))], "s1")
    if mask:
        g.node("Add", ["s1", g.weight("mask", TOKENS, TOKENS)], "s2")
    g.node("Softmax", ["s2" if mask else "s1"], "p", axis=-1)
    g.node("MatMul", ["p", "v"], "m")
    g.node("Transpose", ["m"], "m1", perm=[0, 2, 1, 3])
    g.node("Reshape", ["m1", g.constant("join", np.int64([0, TOKENS, WIDTH]))], "m2")
    g.node("MatMul", ["m2", g.weight("wo", WIDTH, WIDTH)], "o0")
    g.node("Add", ["o0", g.weight("bo", WIDTH)], "o")
    g.node("Add", ["input", "o"], "output")
    return g.model(["N", TOKENS, WIDTH], ["N", TOKENS, WIDTH])


def away(value):
    """Round a Fraction or a float half away from zero."""
    half = Fraction(1, 2) if isinstance(value, Fraction) else 0.5
    return int(math.copysign(math.floor(abs(value) + half), value))


def int8(value):
    return max(-128, min(127, value))


def requantize(total, factor):
    """Multiply by the nearest multiplier of 32 bits and shift, rounding half away from zero."""
    factor = Fraction(float(np.float32(factor)))
    shift = min(range(31), key=lambda n: abs(Fraction(away(factor * 2**n), 2**n) - factor))
    return away(Fraction(total * away(factor * 2**shift), 2**shift))


class Loops:
    """The block in Python's integers, as lib/Support/Dnnl/Attention.cpp computes it."""

    def __init__(self, model, program):
        self.scales = {name: float(grid.scale) for name, grid in program.grids.items()}
        tensors = model.floats.graph.tensors()
        self.values = {n: t.values for n, t in tensors.items() if hasattr(t, "values")}
        grids = program.grids
        self.stripped = {n: grids[n].dequantize(grids[n].quantize(self.values[n], "half-even"))
                         for n in ("wq", "wk", "wv", "wo")}  # fmt: skip

    def projected(self, name, x, head):
        """Return the integers of queries, keys or values of one head: rows of PART numbers."""
        weight = self.stripped[f"w{name}"][:, head * PART : (head + 1) * PART].astype(float)
        scale = np.abs(weight).max() / 127
        product = self.scales["input"] * scale
        columns = [[away(w / scale) for w in column] for column in weight.T]
        bias = self.values[f"b{name}"][head * PART : (head + 1) * PART]
        return [
            [
                int8(requantize(sum(a * w for a, w in zip(row, column, strict=True))
                                + away(float(b) / product), product / self.scales[f"{name}1"]))
                for column, b in zip(columns, bias, strict=True)
            ]
            for row in x
        ]  # fmt: skip

    def probabilities(self, scores):
        """Return uint8 probabilities of one row of integers."""
        powers = [np.float32(math.exp(-self.scales["s1"] * (127 - x))) for x in scores]
        total = np.float32(0)
        for power in powers:
            total += power
        scale = np.float32(self.scales["p"])
        return [min(255, away(float(power / (total * scale)))) for power in powers]

    def run(self, x):
        """Return the integers of the block's output for one sample."""
        s = self.scales
        weight = [[away(float(w) / s["wo"]) for w in row] for row in self.stripped["wo"]]
        bias = [away(float(b) / (s["m"] * s["wo"])) for b in self.values["bo"]]
        total = [list(bias) for _ in x]
        for head in range(HEADS):
            q, k, v = (self.projected(name, x, head) for name in ("q", "k", "v"))
            for i, row in enumerate(q):
                sums = [sum(a * b for a, b in zip(row, other, strict=True)) for other in k]
                p = self.probabilities(
                    [int8(requantize(t, s["q1"] * s["k1"] / s["s0"])) for t in sums]
                )
                for j in range(PART):
                    mixed = sum(a * other[j] for a, other in zip(p, v, strict=True))
                    mixed = int8(requantize(mixed, s["p"] * s["v1"] / s["m"]))
                    for c in range(WIDTH):
                        total[i][c] += mixed * weight[head * PART + j][c]
        return [[int8(requantize(t, s["m"] * s["wo"] / s["o"])) for t in row] for row in total]


@pytest.fixture(scope="module")
def model():
    # as after training, where the Mul's scale is not that of the scores times the number
    return quantized(block(), "sophgo-bm1684x", ("tensor:s1.range_factor=0.7",))[1]


@pytest.fixture(scope="module")
def program(model):
    return IntegerProgram(model)


@pytest.fixture(scope="module")
def found(program):
    """Return the integers of the block's input and output."""
    real, grids = program.tensors({"input": samples(block(), 6, seed=5)}), program.grids
    return {n: grids[n].quantize(real[n], "half-even") for n in ("input", "o")}


@pytest.fixture
def loops(model, program):
    return Loops(model, program)


def test_a_fused_block_computes_as_the_compilers_loops(found, loops):
    assert np.array_equal(found["o"], [loops.run(row.tolist()) for row in found["input"]])


def test_the_weights_of_a_head_get_a_scale_of_their_own(found, loops):
    """Regridding changes integers; without it the fused block is another one."""
    for name in ("wq", "wk", "wv"):
        heads = np.abs(loops.stripped[name]).reshape(WIDTH, HEADS, PART).max(axis=(0, 2))
        assert heads[0] != heads[1]
        loops.stripped[name] = loops.stripped[name] * (heads.max() / heads).repeat(PART)

    assert not np.array_equal(found["o"], [loops.run(row.tolist()) for row in found["input"]])


def test_products_of_a_block_round_ties_away_from_zero(program):
    products = [s for s in program.steps if isinstance(s, ProductStep)]
    totals = [sign * 2**n for n in range(40) for sign in (1, -1)]

    assert len(products) == 6
    for step in products:
        factors = np.broadcast_to(step.scale / step.target.grid.scale, (WIDTH,))
        sums = np.repeat(np.int64(totals)[:, None], WIDTH, axis=1)
        expected = [[requantize(total, float(f)) for f in factors] for total in totals]
        assert step.requantize(sums).tolist() == expected


def steps_of(program):
    return {type(step) for step in program.steps}


SPECIAL = {CopyStep, SoftmaxStep}


def test_only_blocks_that_the_compiler_fuses_are_fused(program):
    others = (quantized(block(), "sophgo-bm1688"), quantized(block(mask=True), "sophgo-bm1684x"))

    assert steps_of(program) >= SPECIAL
    for _, other in others:
        assert not SPECIAL & steps_of(IntegerProgram(other))


def test_an_inner_tensor_with_another_reader_prevents_it():
    network = block()
    network.graph.output.append(network.graph.output[0])
    network.graph.output[1].name = "p"
    del network.graph.output[1].type.tensor_type.shape.dim[:]
    network.graph.output[1].type.tensor_type.ClearField("shape")

    other = quantized(network, "sophgo-bm1684x")[1]

    assert not SPECIAL & steps_of(IntegerProgram(other))
