"""A tensor that is read at two scales: its own, and that of the output of one reader."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.version_converter
import pytest
from onnx.reference import ReferenceEvaluator

from onnxqat.analysis import compare_points
from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.data import Batch
from onnxqat.deploy import deployed_model, read_table, write_deployment
from onnxqat.errors import FormatError
from onnxqat.evaluation import IntegerProgram
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.qparams import QuantParams
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from onnxqat.train.engine import StepSession
from onnxqat.train.form import training_form
from onnxqat.train.losses import read_loss, teacher_input
from tests.oracles import run_ort

CONVS = (
    "<float[4,4,1,1] w = {"
    + "1, -0.5, 0.25, 0.125, " * 3
    + "1, 1, 0.5, -1}, float[4,4,1,1] v = {"
    + "-0.5, 1, 0.5, 0.75, " * 3
    + "1, 1, 0.5, -1}>"
)
BODY = "r = Relu(x) k = Sigmoid(r) s = Add(k, r) t = Relu(s) y = Mul(t, k)"


def network(body: str, constants: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4,6,6] x) => (float[N,p,q,r] y) {constants} {{ {body} }}"""
    )


def planned(body: str, *overrides: str, rule: str = "esp32-p4", constants: str = ""):
    floats = prepare(from_proto(network(body, constants)))
    return floats, make_plan(floats.graph, load_rule(rule), [parse_override(o) for o in overrides])


def quantized(body: str, rule: str = "esp32-p4", constants: str = "", **powers: int):
    """Return the model; ``powers`` are the binary logarithms of scales, by tensor (default 0)."""
    floats, plan = planned(body, rule=rule, constants=constants)
    params = placeholder_params(floats, plan)
    given = {p.parameters: powers[p.tensor] for p in plan.grid_points() if p.tensor in powers}
    found = {
        name: QuantParams(
            scale=np.full_like(p.scale, 2.0 ** given.get(name, 0)), zero_point=p.zero_point
        )
        for name, p in params.items()
    }
    return insert_pairs(floats, plan, found, state="calibrated")


def newer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model at the first opset whose pairs onnx's reference evaluator knows."""
    return onnx.version_converter.convert_version(model, 19)


def samples() -> np.ndarray:
    """Return values on and between the levels of 1/16, ties included, and some beyond int8."""
    return (np.random.default_rng(0).integers(-300, 300, (8, 4, 6, 6)) / 32).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "kept", "requantized"),
    [
        ("a = Sigmoid(x) b = Tanh(x) y = Add(a, b)", [], []),
        ("a = Sigmoid(x) b = Tanh(a) y = Add(a, b)", ["a"], ["a"]),
        ("a = Sigmoid(x) y = Add(a, a)", ["a"], ["a"]),
        ("y = Add(x, c)", [], []),
        ("a = Sigmoid(x) b = Reshape(a, s) d = Tanh(x) e = Reshape(d, s) y = Concat<axis=0>(b, e)",
         ["b", "e"], ["b", "e"]),
        ("a = Sigmoid(x) b = Tanh(a) y = Mul(a, b)", [], []),
        ("a = Sigmoid(x) d = Div(c, a) g = Sigmoid(a) b = Mul(a, g) y = Add(b, d)", ["a"], []),
    ],
    ids=["one reader", "two readers", "read twice", "constant", "moved", "not aligned", "others"],
)  # fmt: skip
def test_what_takes_the_scale_of_the_output_and_what_is_requantized(body, kept, requantized):
    constants = "<float[1,4,1,1] c = {1, 2, 3, 4}, int64[4] s = {-1, 2, 12, 6}>"
    _, plan = planned(body, constants=constants)
    points = {p.tensor: p for p in plan.grid_points()}
    aligned = [p for p in plan.grid_points() if p.group == points["y"].parameters and p.group]
    edges = [edge for p in plan.grid_points() for edge in p.consumers]

    assert len(edges) == len(set(edges))
    assert sorted(plan.requantized().values()) == requantized
    for source in kept:
        assert points[source].parameters != points["y"].parameters
    if "Add" in body or "Concat" in body:
        assert [p.tensor for p in aligned if p.observed] == ["y"]
        assert all(e.node.split("_")[0] in ("Add", "Concat", "output", "")
                   for p in aligned for e in p.consumers)  # fmt: skip


def test_a_chain_of_aligned_ops_takes_the_last_scale():
    _, plan = planned("a = Sigmoid(x) b = Tanh(x) d = Add(a, b) e = Relu(d) y = Concat<axis=1>(e)")

    assert {p.tensor: (p.group, p.observed) for p in plan.grid_points() if p.tensor in "abey"} == {
        "a": ("a", False), "b": ("a", False), "e": ("a", False), "y": ("a", True)
    }  # fmt: skip


def test_an_add_that_stays_float_reads_what_others_read():
    _, plan = planned(BODY, "op:Add.quantize=false")

    assert plan.requantized() == {}
    assert [p.group for p in plan.grid_points()] == [None] * len(plan.grid_points())


@pytest.mark.parametrize(
    ("tensor", "left"),
    [("r", ["x", "k", "k/requantized/Add_s", "t", "y"]),
     ("r/requantized/Add_s", ["x", "r", "k", "k/requantized/Add_s", "t", "y"]),
     ("r.*", ["x", "k", "k/requantized/Add_s", "t", "y"])],
)  # fmt: skip
def test_tensor_that_stays_float_is_not_requantized(tensor, left):
    floats, plan = planned(BODY, f"tensor:{tensor}.quantize=false")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")

    assert [p.tensor for p in plan.grid_points()] == left
    assert [n.name for n in empty.floats.graph.nodes if n.op == "Identity"] == left[-3:-2]


def test_planning_a_model_with_requantizations_gives_the_same_plan():
    model = quantized(BODY)

    assert make_plan(model.floats.graph, load_rule("esp32-p4")) == model.plan


@pytest.mark.parametrize("rule", ["esp32-p4", "esp32-s3"])
def test_qdq_and_integers_are_those_of_numpy(rule):
    """r has steps of 1/16; for the Add it is rounded to steps of 1/4, like the Add's output."""
    model = quantized(BODY, rule, x=-4, r=-4, k=-7, t=-2, y=-3)
    x = samples()
    up = rule == "esp32-s3"

    def levels(values, step):
        found = np.floor(values / step + 0.5) if up else np.rint(values / step)
        return np.clip(found, -128, 127)

    r = np.maximum(levels(x.astype(np.float64), 1 / 16), 0) / 16
    r = levels(r, 1 / 16) / 16
    k = levels(1 / (1 + np.exp(-r)), 2.0**-7) * 2.0**-7
    t = levels(np.maximum(levels(k, 0.25) / 4 + levels(r, 0.25) / 4, 0), 0.25) / 4
    y = levels(t * k, 0.125) / 8
    program = IntegerProgram(model, threads=1)
    (found,) = program.run(None, {"x": x})
    tensors = program.tensors({"x": x})

    np.testing.assert_array_equal(tensors["r/requantized/Add_s"], levels(r, 0.25) / 4)
    np.testing.assert_array_equal(tensors["t"], t)
    np.testing.assert_array_equal(found, y)
    if not up:  # Q/DQ rounds half to even
        (qdq,) = ReferenceEvaluator(newer(model.to_proto())).run(None, {"x": x})
        np.testing.assert_array_equal(qdq, y)
        np.testing.assert_array_equal(run_ort(model.to_proto(), {"x": x})[0], y)


def test_calibration_measures_the_output_alone():
    floats, plan = planned(BODY)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    model = calibrate(empty, [{"x": samples()}], observer="minmax")
    params = {p.tensor: model.params[p.parameters].scale for p in model.plan.grid_points()}

    assert params["r"] == 2.0**-3  # up to 9.4
    assert params["r/requantized/Add_s"] == params["k/requantized/Add_s"] == params["t"] == 2.0**-3


def test_a_constant_of_an_aligned_add_is_not_measured():
    floats, plan = planned("y = Add(x, c)", constants="<float[1,4,1,1] c = {100, 0, 0, 0}>")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    x = np.full((1, 4, 6, 6), -100, np.float32)
    x[:, 1:] = 0.5
    model = calibrate(empty, [{"x": x}], observer="minmax")

    assert {p.parameters for p in plan.grid_points()} == {"x"}
    assert model.params["x"].scale == 2.0**-7  # y is 0 or 0.5, whereas x and c are +-100


def test_training_computes_the_same_and_the_output_has_the_only_scale():
    model = quantized("r = Conv(x, w) k = Conv(r, v) s = Add(k, r) y = Relu(s)", constants=CONVS,
                      x=-4, r=-5, w=-6, v=-6, y=-3)  # fmt: skip
    x = samples()
    form = training_form(model)
    feeds = {"x": x, **form.parameters}
    shared = [n.input[1] for n in form.proto.graph.node if "FakeQuantize" in n.op_type]

    assert set(form.scales) == {"x", "r", "w", "v", "k"}
    np.testing.assert_array_equal(
        run_ort(form.proto, feeds)[0], run_ort(model.to_proto(), {"x": x})[0]
    )
    assert shared.count("k/scale") == 3  # the Add's inputs, and its output


def test_gradient_of_the_scale_is_the_sum_over_all_tensors_that_have_it():
    model = quantized("k = Sigmoid(x) y = Add(x, k)", x=-5, y=-3)
    x, target = samples(), np.float32(1.0)
    session = StepSession(training_form(model), read_loss("mse"), batch_size=len(x), threads=1)
    session.run({"x": x, teacher_input("y"): np.full_like(x, target)})
    s = 0.125

    def fake(values):
        levels = np.rint(values / s)
        inside = (levels >= -128) & (levels <= 127)
        clipped = np.clip(levels, -128, 127)
        return clipped * s, inside, np.where(inside, clipped - values / s, clipped)

    read = np.clip(np.rint(x.astype(np.float64) * 32), -128, 127) / 32
    a, _, term_a = fake(read)
    b, _, term_b = fake(1 / (1 + np.exp(-read)))
    y, inside, term_y = fake(a + b)
    upstream = 2 * (y - target) / y.size
    expected = (upstream * (term_y + inside * (term_a + term_b))).sum()

    assert abs((upstream * term_a).sum()) > 1e-3 < abs((upstream * term_b).sum())
    assert session.gradients.views["k/scale"] == pytest.approx(expected, rel=1e-4)


def test_strip_leaves_no_trace_and_the_table_brings_it_back(tmp_path):
    model = quantized(BODY, x=-4, r=-4, k=-7, t=-2, y=-3)
    files = write_deployment(model, tmp_path / "chip").files
    stripped = onnx.load(files["model"])
    points = {p["tensor"]: p for p in json.loads(files["table"].read_text())["points"]}
    again = prepare(from_proto(stripped))
    plan, params = read_table(files["table"], again, make_plan(again.graph, load_rule("esp32-p4")))
    back = insert_pairs(again, plan, params, state="calibrated")

    assert [n.op_type for n in stripped.graph.node] == ["Relu", "Sigmoid", "Add", "Relu", "Mul"]
    assert [n.name for n in deployed_model(model, weights="tuned").graph.nodes] == [
        n.name for n in stripped.graph.node
    ]
    for name in ("r", "k"):
        assert points[f"{name}/requantized/Add_s"]["requantizes"] == name
        assert points[f"{name}/requantized/Add_s"]["scale"] == points["t"]["scale"] == [0.25]
        assert points[f"{name}/requantized/Add_s"]["consumers"] == [
            {"node": "Add_s", "index": 1 if name == "r" else 0}
        ]
        assert "Add_s" not in {e["node"] for e in points[name]["consumers"]}
    x = {"x": samples()}
    np.testing.assert_array_equal(run_ort(back.to_proto(), x)[0], run_ort(model.to_proto(), x)[0])


def test_saving_and_loading_keeps_all_bytes(tmp_path):
    model = quantized(BODY)
    model.save(tmp_path / "one.onnx")
    load_model(tmp_path / "one.onnx").save(tmp_path / "two.onnx")

    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.parametrize("table", ["tensorrt", "mnn", "qnn", "sophgo", "tengine", "amct"])
def test_table_with_one_scale_for_each_tensor_refuses(table, tmp_path):
    with pytest.raises(FormatError, match=r"'r' has two scales; the table holds one for each"):
        write_deployment(quantized(BODY), tmp_path / "chip", table=table)


def test_figures_against_the_float_model_without_requantizations():
    model = quantized(BODY, x=-4, r=-4, k=-7, t=-2, y=-3)
    floats = prepare(from_proto(network(BODY)))
    x = samples()
    batch = Batch(inputs={"x": x}, labels=None, indices=np.arange(len(x)), size=len(x))
    own, other = (
        compare_points(model, [batch], floats=f, threads=1) for f in (model.floats, floats)
    )

    assert own == other
    assert {"r", "r/requantized/Add_s"} <= {point.tensor for point in own}
