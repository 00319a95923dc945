"""Whatever a table holds comes back from it, and what it does not hold is listed."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxqat.deploy import read_table, write_deployment
from onnxqat.errors import FormatError, RuleError
from onnxqat.formats import FORMATS, Calibrated, Table, Written
from onnxqat.model import Model
from onnxqat.plan import QuantPlan
from onnxqat.quantized import insert_pairs
from onnxqat.rules import bundled_rules, load_rule
from tests.networks import (
    _Graph,
    attention,
    convnet,
    detector,
    joined_to_a_constant,
    samples,
    spotter,
)
from tests.oracles import run_ort
from tests.random_params import with_random_params

OWN = [(rule, load_rule(rule).table) for rule in bundled_rules() if load_rule(rule).table]
READABLE = ("table", "ranges", "dynamic_range", "cache")


def called_twice() -> onnx.ModelProto:
    """One weight in two convolutions and in two products, one activation in three readers."""
    g = _Graph(0)
    pads = {"pads": [1, 1, 1, 1]}
    conv, product = g.weight("conv.weight", 3, 3, 3, 3), g.weight("fc.weight", 9, 9)
    bias = g.weight("conv.bias", 3)
    g.node("Conv", ["input", conv, bias], "c1", **pads)
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", conv, bias], "c2", **pads)
    g.node("Conv", ["r1", g.weight("other.weight", 3, 3, 1, 1)], "c3")
    g.node("Concat", ["r1", "c2", "c3"], "k", axis=1)
    g.node("GlobalAveragePool", ["k"], "v")
    g.node("Flatten", ["v"], "f")
    g.node("Gemm", ["f", product], "g1")
    g.node("Gemm", ["g1", product], "output")
    return g.model(["N", 3, 8, 8], ["N", 9])


def constants() -> onnx.ModelProto:
    """Constants of ranks 0 to 4, one output channel, groups, a ConvTranspose."""
    g = _Graph(0)
    g.node("Mul", ["input", g.constant("s0", np.float32(0.3))], "m1")
    g.node("Add", ["m1", g.constant("s1", np.float32([0.25]))], "a1")
    g.node("Conv", ["a1", g.weight("w1", 4, 2, 1, 1)], "c1", group=2)
    g.node("Mul", ["c1", g.weight("s4", 1, 4, 1, 1)], "m2")
    g.node("Sub", ["m2", g.weight("s3", 4, 1, 1)], "d1")
    g.node("ConvTranspose", ["d1", g.weight("w2", 4, 3, 2, 2)], "t1", strides=[2, 2])
    g.node("Relu", ["t1"], "r1")
    g.node("Conv", ["r1", g.weight("w3", 1, 3, 1, 1)], "c2")
    g.node("ReduceMean", ["c2"], "v", axes=[2], keepdims=0)
    g.node("MatMul", ["v", g.weight("w4", 16, 5)], "mm")
    g.node("Add", ["mm", g.weight("b4", 5)], "output")
    return g.model(["N", 4, 8, 8], ["N", 1, 5])


NETWORKS = {
    f.__name__: f
    for f in (attention, called_twice, constants, convnet, detector, joined_to_a_constant, spotter)
}
OVERRIDES = [(), ("weight.bits=4",), ("activation.bits=4",), ("activation.bits=16",),
             ("weight.axis=none",), ("weight.axis=channel",), ("weight.narrow_range=true",),
             ("activation.symmetric=false",), ("activation.signedness=signed",)]  # fmt: skip


@cache
def network(name: str) -> onnx.ModelProto:
    return NETWORKS[name]()


def check(name: str, written: Written, floats: Model, plan: QuantPlan, model: Model) -> None:
    """Read a table: by the plan of the rule, and by the one that calibration settled."""
    trained = model.params
    listed = {entry for names in written.left_out.values() for entry in names}
    plans = [model.plan]
    if name != "tengine":  # which says no dtype: the rule has to
        plans.append(plan)
    for kind in (kind for kind in READABLE if kind in written.files):
        content = written.files[kind]
        data = content if isinstance(content, bytes) else content.encode()
        for by in plans:
            found = FORMATS[name].read(Table(name=kind, data=data), floats.graph, by)
            assert found.unused == []
            for point in by.grid_points():
                said = found.params.get(point.parameters)
                told = point.tensor in listed or {e.node for e in point.consumers} <= listed
                # ncnn has one scale for a group of channels; strip tells which are regridded
                free = point.role == "weight" and (told or kind == "ranges" or name == "ncnn")
                if said is None:
                    assert told, f"{name}, {kind}: '{point.tensor}' is lost"
                elif not free:
                    same = said.same_as(trained[point.parameters])
                    assert same, f"{name}, {kind}: '{point.tensor}' has other parameters"


@pytest.mark.parametrize("network_name", ["called_twice", "constants", "spotter"])
@pytest.mark.parametrize(("rule", "table"), OWN, ids=[rule for rule, _ in OWN])
def test_the_table_of_a_rule_holds_shared_weights_and_constants_of_any_rank(
    rule, table, network_name
):
    made = with_random_params(network(network_name), rule)
    check(table, FORMATS[table].write(Calibrated(made[-1])), *made)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(bundled_rules()),
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(OVERRIDES),
    st.integers(0, 2**32),
    st.sampled_from([1, 2, None]),
)
def test_what_is_written_is_read(name, rule, network_name, overrides, seed, distinct):
    try:
        made = with_random_params(
            network(network_name), rule, overrides, seed=seed, distinct=distinct
        )
        written = FORMATS[name].write(Calibrated(made[-1]))
    except (FormatError, RuleError):  # it cannot say that, or the override covers nothing
        assume(False)
    check(name, written, *made)


PARTIAL = [
    ("amct", "ascend"),
    ("mnn", "sophgo-cv183x"),
    ("ncnn", "ncnn"),
    ("cambricon", "tensorrt"),
]


@pytest.mark.parametrize(("table", "rule"), PARTIAL, ids=[table for table, _ in PARTIAL])
def test_what_a_table_leaves_out_stays_float_when_it_is_read(table, rule, tmp_path, caplog):
    net = convnet()
    floats, plan, model = with_random_params(net, rule)
    deployment = write_deployment(model, tmp_path, table=table)
    with caplog.at_level("WARNING"):
        found, params = read_table(deployment.files["table"], floats, plan, table=table)
    again = insert_pairs(floats, found, params, state="calibrated")
    lost = {p.tensor for p in plan.grid_points()} - {p.tensor for p in found.grid_points()}
    grids = model.params

    assert lost == set(deployment.left_out.get("tensors of other ops", ()))
    assert bool(lost) == ("which stay float" in caplog.text)
    assert all(grids[key].same_as(value) for key, value in params.items())
    read = {e.node for p in found.points for e in p.consumers} | {s.node for s in found.skips}
    assert {e.node for p in plan.points for e in p.consumers} <= read
    run_ort(again.to_proto(), {"input": samples(net, 2)})
