"""Attention blocks that Sophgo's compiler fuses, against loops over heads, rows and columns."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxqat.data import open_data
from onnxqat.deploy import read_table, write_deployment
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.attention import CopyStep, SoftmaxStep
from onnxqat.evaluation.integer.steps import ProductStep
from onnxqat.qparams import quantize
from onnxqat.settings import input_specs
from onnxqat.train import Config, finetune
from onnxqat.train.form import training_form
from tests.networks import _Graph, planned, quantized, samples

TOKENS, WIDTH, HEADS = 5, 8, 2
PART = WIDTH // HEADS
PROJECTIONS = ("wq", "wk", "wv")


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
        self.scales = {n: float(g.scale) for n, g in program.grids.items() if not g.scale.ndim}
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


def test_a_plan_with_one_scale_for_each_weight_changes_nothing_on_the_chip():
    other = quantized(block(), "sophgo-bm1684x", ("weight.axis=none",))[1]
    program, x = IntegerProgram(other), samples(block(), 2, seed=6)
    grids, real = program.grids, program.tensors({"input": x})
    integers, ours = (grids[n].quantize(real[n], "half-even") for n in ("input", "o"))

    assert [Loops(other, program).run(row.tolist()) for row in integers] == ours.tolist()


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
        factors = np.atleast_1d(step.scale / step.target.grid.scale)
        sums = np.repeat(np.int64(totals)[:, None], factors.size, axis=1)
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


# --- the plan's scale for each head -------------------------------------------------------------


def axes(model):
    """Return axis and number of heads of each matrix, by name."""
    points = {p.tensor: p.spec for p in model.plan.grid_points()}
    return {name: (points[name].axis, points[name].heads) for name in (*PROJECTIONS, "wo")}


def test_the_plan_gives_projections_a_scale_for_each_head(model):
    per_tensor = dict.fromkeys((*PROJECTIONS, "wo"), (None, None))
    others = {
        "no mask": quantized(block(), "sophgo-bm1688")[1],
        "mask": quantized(block(mask=True), "sophgo-bm1684x")[1],
        "asked": quantized(block(), "sophgo-bm1684x", ("weight.axis=none",))[1],
    }

    assert axes(model) == per_tensor | dict.fromkeys(PROJECTIONS, (1, HEADS))
    assert all(axes(other) == per_tensor for other in others.values())
    assert all("head" in str(p) for p in model.plan.points if p.tensor in PROJECTIONS)


def compilers_integers(weight):
    """Return the integers of a stripped weight and their scales, by the compiler's rule."""
    levels, scales = np.empty(weight.shape, np.int64), np.empty(WIDTH)
    for head in range(HEADS):
        part = slice(head * PART, (head + 1) * PART)
        scales[part] = np.abs(weight[:, part].astype(np.float64)).max() / 127
        levels[:, part] = [[away(float(w) / scales[part][0]) for w in row]
                           for row in weight[:, part]]  # fmt: skip
    return levels, scales


def assert_the_compiler_finds_ours(model, folder):
    write_deployment(model, folder)
    with (folder / "model.onnx").open("rb") as file:
        stripped = gs.import_onnx(onnx.load(file)).tensors()
    tensors = model.floats.graph.tensors()
    for point in model.plan.grid_points():
        if point.tensor in PROJECTIONS:
            params = model.params[point.parameters]
            levels, scales = compilers_integers(stripped[point.tensor].values)
            ours = quantize(tensors[point.tensor].values, params, point.spec)
            np.testing.assert_array_equal(ours, levels)
            np.testing.assert_array_max_ulp(params.scale, scales.astype(np.float32), 1)
            assert not np.array_equal(params.scale[:PART], params.scale[PART:])


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_the_compiler_computes_the_calibrated_scales(observer, tmp_path):
    overrides = ("weight.range_factor=0.8", "weight.method=pact")  # for other weights
    model = quantized(block(), "sophgo-bm1684x", overrides, observer=observer)[1]

    assert_the_compiler_finds_ours(model, tmp_path)


def test_a_dead_channel_keeps_the_scale_of_its_head(tmp_path):
    network = block()
    for initializer in network.graph.initializer:
        if initializer.name in ("wq", "bq"):
            values = onnx.numpy_helper.to_array(initializer).copy()
            values[..., 1] = 1e6 if initializer.name == "bq" else 0
            initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))

    assert_the_compiler_finds_ours(quantized(network, "sophgo-bm1684x")[1], tmp_path)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, input=samples(block(), 32, seed=9))
    with open_data(str(path), input_specs(model)) as opened:
        yield opened


@pytest.mark.parametrize(
    "settings", [{"method": "pact"}, {"groups": ("scale.freeze=true",)}], ids=str
)
def test_the_compiler_computes_the_trained_scales(model, data, settings, tmp_path):
    states = []
    config = Config(epochs=2, batch_size=8, threads=1, lr=0.02, loss="mse", **settings)
    finetune(model, data, config=config, report=lambda p: states.append(p.model))

    assert all(not np.array_equal(states[-1].params[w].scale, model.params[w].scale)
               for w in PROJECTIONS)  # fmt: skip
    assert_the_compiler_finds_ours(states[-1], tmp_path)


def test_no_gradient_moves_the_scales_of_heads(model):
    form = training_form(model, method="lsq")

    assert form.learned >= {"wo/scale", *PROJECTIONS}
    assert not form.learned & {f"{name}/scale" for name in PROJECTIONS}


def test_the_tables_scales_of_heads_are_not_read(model, tmp_path):
    floats, plan = planned(block(), "sophgo-bm1684x", ("tensor:s1.range_factor=0.7",))
    path = write_deployment(model, tmp_path).files["table"]
    lines = [
        f"{line.split()[0]} 1 0.5 0"
        if line.startswith(("q1_Add_weight", "v1_Add_weight"))
        else line
        for line in path.read_text().splitlines()
    ]
    assert sum(line.endswith(" 1 0.5 0") for line in lines) == 2
    path.write_text("\n".join(lines) + "\n")

    _, params = read_table(path, floats, plan)

    for name in (*PROJECTIONS, "wo"):
        assert params[name].same_as(model.params[name])
