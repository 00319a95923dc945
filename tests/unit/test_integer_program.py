"""Whole networks in integers: against onnxruntime's integer kernels, and against fake-quantize."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.cli import main
from onnxqat.errors import ModelError, PlanError, RuleError
from onnxqat.evaluation import IntegerProgram, evaluate
from onnxqat.evaluation.integer.requantize import fixed_point
from onnxqat.evaluation.integer.steps import (
    ElementwiseStep,
    FloatStep,
    MeanStep,
    MoveStep,
    ProductStep,
    TableStep,
    Values,
)
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import Arithmetic, describe_rule, load_rule
from tests.networks import RULES, W4A4, attention, convnet, quantized, samples
from tests.oracles import run_ort
from tests.unit.test_evaluate import Batch, batches
from tests.unit.test_integer_arithmetic import divide_by_power, high_mul

# Without VNNI, a sum of two uint8 x int8 products saturates at 16 bits; of 7 bits none reaches it.
EVERY_CPU = ("weight.bits=7",)


def integer_kernels(model, x, path):
    """Return the integers that onnxruntime's integer kernels compute, by tensor."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    proto = integer_model(model).to_proto().SerializeToString()
    ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(path)
    names = [n for node in optimized.graph.node for n in node.output if n.endswith("/quantized")]
    optimized.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = run_ort(optimized, {"input": x})[len(optimized.graph.output) - len(names) :]
    return {name.removesuffix("/quantized"): a for name, a in zip(names, found, strict=True)}


def trace(program, inputs, levels=None):
    """Return what every step computes: on its own results, or on the given integers."""
    values = Values(floats=dict(inputs), levels=dict(levels or {}))
    found = {}
    for step in program.steps:
        result = step.run(values)
        found |= result.levels
        values.floats |= result.floats
        if levels is None:
            values.levels |= result.levels
    return found


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Sigmoid"])
def test_onnxruntimes_integer_kernels_compute_the_same(activation, tmp_path):
    """Equal but for sums that lie within a float32 rounding of a tie."""
    network = convnet(activation=activation)
    _, qdq = quantized(network, "onnxruntime-cpu", EVERY_CPU)
    x = samples(network, 64, seed=7)
    expected = integer_kernels(qdq, x, tmp_path / "o.onnx")
    program = IntegerProgram(qdq, threads=1)
    alone = trace(program, {"input": x}, expected)

    assert len(expected) >= 11
    for tensor, integers in expected.items():
        difference = np.abs(integers.astype(int) - alone[tensor])
        assert difference.max() <= 1, tensor
        assert np.mean(difference > 0) <= 2e-3, tensor


def test_whole_network_is_that_of_onnxruntimes_integer_kernels(tmp_path):
    network = convnet()
    _, qdq = quantized(network, "onnxruntime-cpu", EVERY_CPU)
    x = samples(network, 64, seed=7)
    expected = integer_kernels(qdq, x, tmp_path / "o.onnx")
    found = trace(IntegerProgram(qdq, threads=1), {"input": x})
    for tensor in ("input", "r1", "r2", "c3", "r3", "p1", "c4", "output"):
        np.testing.assert_allclose(found[tensor].astype(int), expected[tensor], atol=1)


# Add and averages differ in more than a few values where multipliers have 8 bits, or where many
# sums lie on ties (power-of-two grids, averages of four values) that the rule rounds otherwise.
SOPHGO = {"sophgo-bm1684x", "sophgo-bm1688", "sophgo-bm1690", "sophgo-cv183x"}
COARSE = {*SOPHGO, "esp32-s3", "tflite"}
# The HTP multiplies by 11 bits, which is up to an eighth of a level of 8 bits, or 32 of 16.
# Ascend has floats of half precision; Bernoulli2 does not round the last shift of a product.
LIMITS = {
    "qnn-htp": (1, 0.13),
    "qnn-htp-16": (32, 1),
    "ascend": (1, 0.06),
    "horizon-bernoulli2": (1, 0.6),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_node_is_near_fake_quantize(rule, seed):
    network = convnet(seed=seed)
    _, qdq = quantized(network, rule)
    program = IntegerProgram(qdq, threads=1)
    program.run(None, {"input": samples(network, 64, seed=5)})

    constants = {t.name for t in network.graph.initializer}
    tensors = [p.tensor for p in program.points]
    assert sorted(tensors) == sorted({p.tensor for p in qdq.plan.grid_points()} - constants)
    for point in program.points:
        summed = point.tensor in ("r3", "v1", "v2") or "/requantized/" in point.tensor
        coarse = rule in COARSE and summed
        levels, share = (2, 0.3) if coarse else LIMITS.get(rule, (1, 2e-2))
        assert point.max_levels <= levels
        assert point.differing <= share
        assert point.bias_differing <= 1e-2
    weighted = {p.tensor: p.bias_differing for p in program.points}
    assert weighted.get("c3", 0) == 0  # it has no bias
    if load_rule(rule).bias == "int32":
        assert weighted["r1"] > 0


POOL = "AveragePool<kernel_shape = [3, 3], pads = [1, 1, 0, 1]"


@pytest.mark.parametrize(
    ("rule", "body", "shape"),
    [
        ("sophgo-bm1684x", "y = ConvTranspose<group = 2>(input, w, b)", (4, 3, 1, 1)),
        ("onnxruntime-cpu", f"y = {POOL}>(input)", ()),
        ("onnxruntime-cpu", f"y = {POOL}, count_include_pad = 1>(input)", ()),
        ("clips", "c = Conv(input, w) d = Clip(c, two, six) y = Clip(d, zero, four)", (6, 4, 1, 1)),
    ],
    ids=["groups", "border", "border included", "clips"],
)
def test_groups_borders_and_the_narrowest_limits_count(rule, body, shape):
    """In the integers of the rule as in fake-quantize; ``clips`` runs two Clip with a Conv."""
    rng = np.random.default_rng(0)
    network = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[N,4,5,5] input) => (float[N,p,q,r] y)
        <float zero = {{0}}, float two = {{2}}, float four = {{4}}, float six = {{6}}>
        {{ {body} }}"""
    )
    sizes = np.reshape([1, 4, 16], (3, 1, 1)) if 3 in shape else 3  # no two scales are alike
    arrays = {"w": rng.normal(size=shape) * sizes, "b": rng.normal(size=6)} if shape else {}
    tensors = (onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in arrays.items())
    network.graph.initializer.extend(tensors)
    loaded = load_rule("onnxruntime-cpu" if rule == "clips" else rule)
    if rule == "clips":
        loaded = msgspec.structs.replace(loaded, fuse=(("Conv", "Clip", "Clip"),))
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, loaded)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    x = samples(network, 32)
    program = IntegerProgram(calibrate(empty, [{"input": x}], observer="minmax"), loaded, threads=1)
    program.run(None, {"input": x})
    (found,) = (p for p in program.points if p.tensor == "y")

    assert found.max_levels <= 1
    assert found.differing <= 0.02


@pytest.mark.parametrize("constant", [100.0, -100.0, [3.0, -90.0], 0.25])
@pytest.mark.parametrize(
    "body", ["y = Sub(k, c)", "y = Sub(c, k)", "d = Sub(k, c) y = Relu(d)", "y = Add(k, c)"]
)
def test_compiled_constant_fits_the_scale_of_the_output(body, constant):
    """The output's values are near to zero, where a constant in its scale would saturate."""
    values = np.float32(np.reshape(constant, (-1, 1)))
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[N,2,4] input) => (float[N,2,4] y)
        {{ c = MatMul(input, w) {body} }}"""
    )
    tensors = {"k": values, "w": np.eye(4, dtype=np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in tensors.items())
    sign = -1 if "Add" in body else 1
    x = np.random.default_rng(0).normal(size=(64, 2, 4)).astype(np.float32) + sign * values
    floats = prepare(from_proto(model))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    program = IntegerProgram(calibrate(empty, [{"input": x}], observer="minmax"), threads=1)
    program.run(None, {"input": x})
    (point,) = [p for p in program.points if p.tensor == "y"]

    assert point.max_levels <= 2


def test_counts_are_those_of_the_two_runs():
    network = convnet()
    _, qdq = quantized(network, "sophgo-bm1684x")
    program = IntegerProgram(qdq, threads=1)
    x = samples(network, 48, seed=5)
    outputs = [program.run(None, {"input": part})[0] for part in (x[:32], x[32:])]
    proto = qdq.to_proto()
    names = [f"{p.tensor}/quantized" for p in program.points]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    reference, *integers = run_ort(proto, {"input": x})
    end = trace(program, {"input": x})
    alone = trace(program, {"input": x}, dict(zip(end, integers, strict=True)))
    for point, expected in zip(program.points, integers, strict=True):
        for found, share, levels in (
            (alone[point.tensor], point.differing, point.max_levels),
            (end[point.tensor], point.end_differing, point.end_max_levels),
        ):
            difference = np.abs(found.astype(int) - expected)
            assert share == np.mean(difference > 0)
            assert levels == difference.max()
    scale = program.grids["output"].scale

    assert np.concatenate(outputs).shape == reference.shape
    np.testing.assert_array_equal(np.concatenate(outputs), end["output"] * scale)


def test_steps_are_what_the_rule_says():
    _, qdq = quantized(convnet(activation="Sigmoid"), "sophgo-bm1684x")
    kinds = [type(step) for step in IntegerProgram(qdq, threads=1).steps]

    assert kinds.count(ProductStep) == 5
    assert kinds.count(TableStep) == 1
    assert kinds.count(ElementwiseStep) == 1
    assert kinds.count(MeanStep) == 2
    assert kinds.count(MoveStep) == 3
    assert FloatStep not in kinds


def test_float_nodes_run_in_float_between_integers():
    network = attention()
    _, qdq = quantized(network, "onnxruntime-cpu")
    program = IntegerProgram(qdq, threads=1)
    program.run(None, {"input": samples(network, 16, seed=3)})
    floats = [step for step in program.steps if isinstance(step, FloatStep)]

    assert {name for step in floats for name in step.outputs} >= {"l", "s2"}
    assert max(point.max_levels for point in program.points) <= 1


def test_an_output_left_float_is_the_dequantized_accumulator():
    network = convnet()
    _, qdq = quantized(network, overrides=("tensor:output.quantize=false",))
    program = IntegerProgram(qdq, threads=1)
    x = samples(network, 8)
    (found,) = program.run(None, {"input": x})
    values = Values(floats={"input": x})
    for step in program.steps[:-1]:
        result = step.run(values)
        values.levels |= result.levels
    grid, tensors = program.grids["f1"], qdq.floats.graph.tensors()
    weight = program.grids["w5"].quantize(tensors["w5"].values, "half-even").astype(np.int64)
    scale = np.float64(grid.scale) * program.grids["w5"].scale
    bias = np.floor(np.abs(tensors["b5"].values / scale) + 0.5) * np.sign(tensors["b5"].values)
    sums = grid.centered(values.levels["f1"]).astype(np.int64) @ weight.T + bias

    np.testing.assert_array_equal(found, (sums * scale).astype(np.float32))


@pytest.mark.parametrize(("left", "written"), [("w3", "c3"), ("c4", "k1"), ("c3", "r3")])
def test_a_node_with_a_float_operand_runs_in_float(left, written):
    """A weight, an operand of a Concat, an operand of an Add."""
    network = convnet()
    _, qdq = quantized(network, overrides=(f"tensor:^{left}$.quantize=false",))
    program = IntegerProgram(qdq, threads=1)
    program.run(None, {"input": samples(network, 32)})
    points = {p.tensor: p for p in program.points}

    assert any(isinstance(s, FloatStep) and s.outputs == (written,) for s in program.steps)
    assert points[written].max_levels <= 1
    assert points[written].differing <= 1e-2


def test_an_average_that_is_left_float_is_that_of_the_dequantized_integers():
    network = convnet()
    _, qdq = quantized(network, overrides=("tensor:^v1$.quantize=false",))
    program = IntegerProgram(qdq, threads=1)
    values = Values(floats={"input": samples(network, 4)})
    for step in program.steps:
        found = step.run(values)
        values.levels |= found.levels
        values.floats |= found.floats
    x = program.grids["k1"].dequantize(values.levels["k1"])
    n, channels, height, width = x.shape
    windows = x.reshape(n, channels, height // 2, 2, width // 2, 2)

    # the rule's chip computes float ops in float16
    np.testing.assert_allclose(values.floats["v1"], windows.mean((3, 5)), rtol=2e-3, atol=2e-3)


def test_four_bits_saturate_at_their_ends():
    network = convnet()
    _, qdq = quantized(network, overrides=W4A4)
    found = trace(IntegerProgram(qdq, threads=1), {"input": 9 * samples(network, 16)})

    assert found["r1"].max() == 15
    assert (found["c3"].min(), found["c3"].max()) == (-8, 7)


def test_evaluation_compares_with_the_fake_quantized_model():
    network = convnet()
    _, qdq = quantized(network)
    x = samples(network, 40)
    labels = np.arange(40) % 5
    found = evaluate(qdq, batches(x, labels), mode="integer", threads=1)
    fake = evaluate(qdq, batches(x, labels), threads=1)

    assert found.reference == fake.metrics
    assert len(found.points) == 12
    assert fake.points == ()
    assert found.agreement >= 0.95


def half_away(values):
    return np.sign(values) * np.floor(np.abs(values) + 0.5)


def test_each_op_of_tflite_has_the_arithmetic_of_its_kernel():
    _, qdq = quantized(convnet(), "tflite")
    steps = IntegerProgram(qdq, threads=1).steps
    products = {s.target.tensor: s for s in steps if isinstance(s, ProductStep)}
    means = {s.target.tensor: s for s in steps if isinstance(s, MeanStep)}
    sums = np.random.default_rng(0).integers(-(2**20), 2**20, (4000, 5))
    gemm, conv = products["output"], products["c4"]
    once = half_away(sums * (gemm.scale / np.float64(gemm.target.grid.scale)))
    four = sums[:, :4, None, None]
    twice = half_away(four * (conv.scale / np.float64(conv.target.grid.scale)))

    assert np.array_equal(gemm.requantize(sums), once)
    assert 0 < np.count_nonzero(conv.requantize(four) != twice) < 0.01 * four.size
    # AVERAGE_POOL_2D averages the integers themselves; MEAN has the count in its multiplier
    pool, zero = means["v1"], int(means["v1"].grid.params.zero_point)
    raw = np.arange(-512, 509)
    centered = np.zeros((1, 1, 2, 2), np.int32)
    assert np.array_equal(pool.kernel_for(centered)(raw - 4 * zero), half_away(raw / 4) - zero)
    mean = means["v2"]
    found = mean.kernel_for(np.zeros((1, 1, 2, 2), np.int32))(raw)
    factor = np.float64(mean.grid.scale) / mean.target.grid.scale / 4
    assert np.abs(found - raw * factor).max() <= 0.5 + 1e-6


def test_products_of_two_activations_have_a_float32_factor():
    _, qdq = quantized(attention(), "tflite", ("op:Softmax.quantize=false",))
    step = next(s for s in IntegerProgram(qdq, threads=1).steps
                if isinstance(s, ProductStep) and len(s.sources) == 2)  # fmt: skip
    x, y = (g.scale for g in step.grids)
    output = np.float64(step.target.grid.scale)
    sums = np.random.default_rng(0).integers(-(2**30), 2**30, 2000)

    def expected(factor):
        multiplier, exponent = (int(v) for v in fixed_point(np.asarray(factor)))
        return [divide_by_power(high_mul(int(s), multiplier), -exponent) for s in sums]

    found = step.requantize(sums).tolist()
    assert found == expected(np.float64(x * y) / output)
    assert found != expected(np.float64(x) * np.float64(y) / output)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", [None, Arithmetic(requantize="unknown")])
def test_rule_without_documented_arithmetic_is_refused(arithmetic):
    _, qdq = quantized(convnet())
    silent = msgspec.structs.replace(load_rule("tflite"), name="silent", arithmetic=arithmetic)
    with pytest.raises(RuleError, match="Rule silent: its integer arithmetic is unknown"):
        IntegerProgram(qdq, silent)
    assert "arithmetic: unknown; no integer evaluation" in describe_rule(silent)


def test_op_without_documented_arithmetic_is_refused():
    _, qdq = quantized(convnet(activation="HardSwish"), "tflite")
    with pytest.raises(RuleError, match=r"node 'n_r1' \(HardSwish\): the arithmetic of HardSwish"):
        IntegerProgram(qdq)


def test_an_error_of_a_kernel_names_the_node(monkeypatch):
    def fail(*_):
        raise RuleError("The scales differ.")

    _, qdq = quantized(convnet(), "tflite")
    monkeypatch.setattr("onnxqat.evaluation.integer.build._choose", lambda *_: fail)
    with pytest.raises(RuleError, match=r"Node 'n_\w+' \(Conv\): The scales differ\."):
        IntegerProgram(qdq)


def test_float_and_uncalibrated_models_are_refused():
    floats = prepare(from_proto(convnet()))
    plan = make_plan(floats.graph, load_rule("sophgo-bm1684x"))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")

    with pytest.raises(ModelError, match="contains no quantization plan"):
        evaluate(floats, [Batch({})], mode="integer")
    with pytest.raises(PlanError, match="is not calibrated"):
        evaluate(empty, [Batch({})], mode="integer")


def test_wide_integers_are_refused():
    _, qdq = quantized(convnet(), overrides=("weight.bits=16",))
    with pytest.raises(RuleError, match="supports at most 8 bits"):
        IntegerProgram(qdq)


def test_bias_beyond_its_bits_is_an_error():
    _, qdq = quantized(convnet(), "esp32-p4")
    narrow = msgspec.structs.replace(load_rule("esp32-p4"), bias_bits=8)
    with pytest.raises(PlanError, match=r"Bias 'b1': .* beyond 8 bits"):
        IntegerProgram(qdq, narrow)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('requantize = "sometimes"', "Invalid enum value 'sometimes' - at `arithmetic.requantize`"),
        ("operand_bits = 3", r"\[arithmetic\]: operand_bits = 3. Widths are 4 to 32"),
        ('table = ["Sigmoidd"]', "'Sigmoidd' is not an op type of ONNX. Did you mean 'Sigmoid'"),
        ('float = ["Conv"]', "lists Conv more than once"),
        ("operandbits = 8", "Did you mean 'operand_bits'"),
    ],
)
def test_wrong_arithmetic_of_a_rule_file_is_named(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "sophgo-bm1684x"\nname = "mine"\n[arithmetic]\n{text}\n')
    with pytest.raises(RuleError, match=message):
        load_rule(str(path))


def test_every_bundled_rule_has_an_arithmetic_and_describes_it():
    lines = {name: describe_rule(load_rule(name)).splitlines() for name in RULES}
    found = {
        name: next(line for line in text if line.startswith("arithmetic: "))
        for name, text in lines.items()
    }

    assert found["sophgo-bm1684x"].startswith(
        "arithmetic: requantize by multiplier, half-up; bias half-away; float to integer half-away"
    )
    assert {name for name, line in found.items() if "unknown" in line} == set()


# --- the command ---------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def files(tmp_path):
    network = convnet()
    quantized(network)[1].save(tmp_path / "m.onnx")
    x = samples(network, 24)
    np.savez(tmp_path / "d.npz", input=x, label=np.arange(24) % 5)
    return tmp_path / "m.onnx", tmp_path / "d.npz"


def test_command_reports_the_points(files):
    result = run("evaluate", *files, "--mode", "integer", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)

    assert document["mode"] == "integer"
    assert document["agreement"] >= 0.9
    assert document["reference"].keys() == document["metrics"].keys()
    assert [p["tensor"] for p in document["points"]][:2] == ["input", "r1"]
    assert document["points"][0].keys() == {
        *("tensor", "differing", "max_levels", "bias_differing"),
        *("end_differing", "end_max_levels"),
    }


def test_command_prints_the_worst_points(files):
    result = run("evaluate", *files, "--mode", "integer")

    assert result.exit_code == 0, result.output
    assert "the worst 10 of 12 tensors" in result.stdout
    assert len(result.stdout.split("12 tensors:")[1].splitlines()) == 12


def test_command_takes_a_rule_of_ones_own(files, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "sophgo-bm1684x"\nname = "mine"\n[arithmetic]\noperand_bits = 32\n')
    shares = []
    for words in ((), ("--rules", path)):
        result = run("evaluate", *files, "--mode", "integer", "--json", *words)
        assert result.exit_code == 0, result.output
        points = {p["tensor"]: p["differing"] for p in json.loads(result.stdout)["points"]}
        shares.append(points["v2"])

    assert shares[1] <= shares[0]
    assert run("evaluate", *files, "--rules", path).exit_code == 2
