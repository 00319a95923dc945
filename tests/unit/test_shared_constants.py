"""A constant that a chip reads as integers and others as floats."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.deploy import deployed_model, read_table, write_deployment
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.qparams import fake_quantize
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from tests.oracles import run_ort

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def info(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, outputs, **constants):
    """Return a MatMul of x and k, which is quantized, beside other nodes that read k."""
    rng = np.random.default_rng(0)
    weights = {"k": rng.normal(size=(8, 8)).astype(np.float32)} | constants
    nodes = [helper.make_node("MatMul", ["x", "k"], ["y"], name="product"), *nodes]
    inputs = [info("x", ["N", 8]), info("flag", [], TensorProto.BOOL), info("i", ["N"], INT64)]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "network",
        [i for i in inputs if i.name in used],
        [info("y", ["N", 8]), *outputs],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branch(name, op):
    nodes = [helper.make_node(op, ["k"], [name], name=f"{name}_{op}")]
    return helper.make_graph(nodes, name, [], [info(name, [8, 8])])


def network(reader):
    """Return a model in which a reader of each kind keeps k float."""
    if reader == "node":
        return model_of([helper.make_node("Sin", ["k"], ["o"], name="sin")], [info("o", [8, 8])])
    if reader == "computed":  # cannot be folded: it depends on an input
        add = helper.make_node("Mod", ["x", "k"], ["o"], name="mod", fmod=1)
        return model_of([add], [info("o", [8, 8])])
    if reader == "gather":
        gather = helper.make_node("Gather", ["k", "i"], ["o"], name="lookup")
        return model_of([gather], [info("o", ["N", 8])])
    if reader == "subgraphs":
        both = {"then_branch": branch("a", "Sin"), "else_branch": branch("b", "Cos")}
        return model_of([helper.make_node("If", ["flag"], ["o"], name="if", **both)],
                        [info("o", [8, 8])])  # fmt: skip
    if reader == "subgraph of the same node name":
        inner = helper.make_graph(
            [helper.make_node("MatMul", ["x", "k"], ["a"], name="product")], "a", [],
            [info("a", ["N", 8])],
        )  # fmt: skip
        outer = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["b"], name="id")], "b", [], [info("b", ["N", 8])]
        )
        both = {"then_branch": inner, "else_branch": outer}
        return model_of([helper.make_node("If", ["flag"], ["o"], name="if", **both)],
                        [info("o", ["N", 8])])  # fmt: skip
    assert reader == "output"
    return model_of([], [info("k", [8, 8])])


READERS = ["node", "computed", "gather", "subgraphs", "subgraph of the same node name", "output"]


def feeds(model, seed):
    rng = np.random.default_rng(seed)
    values = {
        "x": rng.normal(size=(8, 8)).astype(np.float32),
        "flag": np.array(True),
        "i": np.arange(8),
    }
    return {value.name: values[value.name] for value in model.graph.input}


def calibrated(model):
    floats = prepare(from_proto(model))
    overrides = [parse_override("op:Gather.quantize=false")] if "lookup" in str(model) else []
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"), overrides)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [feeds(model, s) for s in range(2)]), overrides


@pytest.mark.parametrize("reader", READERS)
def test_what_stays_float_reads_what_it_read(reader, tmp_path):
    network_ = network(reader)
    qdq, overrides = calibrated(network_)
    x = feeds(network_, 9)
    (point,) = (p for p in qdq.plan.points if p.role == "weight")
    files = write_deployment(qdq, tmp_path, table="onnxqat").files
    stripped = load_model(files["model"])
    onnx.checker.check_model(stripped.to_proto(), full_check=True)
    floats = prepare(stripped)
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"), overrides)
    plan, params = read_table(files["table"], floats, plan, table="onnxqat")
    again = insert_pairs(floats, plan, params, state="calibrated")
    old, new = run_ort(qdq.to_proto(), x), run_ort(again.to_proto(), x)

    np.testing.assert_array_equal(new[0], old[0])
    np.testing.assert_array_equal(new[1], old[1])
    np.testing.assert_array_equal(run_ort(stripped.to_proto(), x)[1], run_ort(network_, x)[1])
    if reader != "output":  # an output has the values that its name stood for
        snapped = stripped.to_proto()
        (k,) = (numpy_helper.to_array(t) for t in snapped.graph.initializer if t.name == "k")
        expected = fake_quantize(k, qdq.params[point.parameters], point.spec)
        np.testing.assert_array_equal(k, expected)


@pytest.mark.parametrize("reader", READERS)
def test_tuned_weights_and_the_given_model_are_left_alone(reader):
    network_ = network(reader)
    qdq, _ = calibrated(network_)
    before = qdq.to_proto().SerializeToString(deterministic=True)
    tuned = deployed_model(qdq, weights="tuned")
    deployed_model(qdq, weights="snapped")
    x = feeds(network_, 9)

    assert qdq.to_proto().SerializeToString(deterministic=True) == before
    np.testing.assert_array_equal(run_ort(tuned.to_proto(), x)[1], run_ort(network_, x)[1])


@pytest.mark.parametrize("reader", [r for r in READERS if r != "output"])
def test_an_export_with_a_float_weight_snaps_it_for_its_consumers_only(reader):
    network_ = network(reader)
    qdq, _ = calibrated(network_)
    x = feeds(network_, 9)
    exported = run_ort(integer_model(qdq, float_weights={"k"}).to_proto(), x)

    np.testing.assert_array_equal(exported[0], run_ort(qdq.to_proto(), x)[0])
    np.testing.assert_array_equal(exported[1], run_ort(network_, x)[1])
