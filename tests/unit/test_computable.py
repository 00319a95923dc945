"""A model that ends in ops onnxruntime lacks is calibrated, trained and compared before them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.computable import computable
from onnxqat.data import open_data
from onnxqat.ends import TensorReader, prune
from onnxqat.errors import ModelError
from onnxqat.evaluation import evaluate
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.settings import input_specs
from onnxqat.train import Config, finetune, untrainable_nodes
from tests.networks import detector, samples

FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


def network():
    """Return a network of two outputs, and their names."""
    proto = detector()
    return proto, [value.name for value in proto.graph.output]


def with_tail(*nodes, outputs, keep=(), known=()):
    """Return the network with nodes behind it, whose results are its outputs."""
    proto, _ = network()
    kept = [value for value in proto.graph.output if value.name in keep]
    proto.graph.node.extend(nodes)
    proto.graph.value_info.extend(known)
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    proto.graph.output.extend(helper.make_tensor_value_info(*entry) for entry in outputs)
    for domain in sorted({node.domain for node in proto.graph.node} - {""}):
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    return from_proto(proto)


def plugin(name="nms", domain="TRT_PLUGINS", op="EfficientNMS_TRT"):
    _, ends = network()
    return helper.make_node(op, ends, ["count", "boxes"], name=name, domain=domain)


PLUGIN_OUTPUTS = [("count", INT32, ["N", 1]), ("boxes", FLOAT, ["N", 10, 4])]


def in_a_branch():
    """Return nodes that run the plugin in a branch of an If."""
    inner = helper.make_graph(
        [plugin()], "then", [], [helper.make_tensor_value_info("boxes", FLOAT, ["N", 10, 4])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", [network()[1][0]], ["other"])],
        "else",
        [],
        [helper.make_tensor_value_info("other", FLOAT, None)],
    )
    first = network()[1][0]
    return [
        helper.make_node("ReduceMax", [first], ["peak"], keepdims=0, name="peak"),
        helper.make_node("Cast", ["peak"], ["found"], to=TensorProto.BOOL, name="found"),
        helper.make_node(
            "If", ["found"], ["chosen"], then_branch=inner, else_branch=other, name="if"
        ),
    ]


def without_kernel():
    first = network()[1][0]
    return [
        helper.make_node("Cast", [first], ["wide"], to=TensorProto.DOUBLE, name="wide"),
        helper.make_node("Hardmax", ["wide"], ["moved"], name="move"),
    ]


TAILS = {
    "plugin": ([plugin()], PLUGIN_OUTPUTS, (), "EfficientNMS_TRT"),
    "an op that onnxruntime's own domain lacks": (
        [plugin(domain="com.microsoft", op="Secret")],
        PLUGIN_OUTPUTS,
        (),
        "Secret",
    ),
    "one output is left": ([plugin()], PLUGIN_OUTPUTS, tuple(network()[1][:1]), "Efficient"),
    "several behind each other": (
        [
            plugin(),
            helper.make_node("Cast", ["count"], ["total"], to=FLOAT, name="cast"),
            helper.make_node("Sort_TRT", ["boxes", "total"], ["sorted"], domain="TRT_PLUGINS"),
        ],
        [("sorted", FLOAT, ["N", 10, 4])],
        (),
        "EfficientNMS_TRT",
    ),
    "no kernel for the type": (
        without_kernel(),
        [("moved", TensorProto.DOUBLE, ["N", 5, 4, 4])],
        tuple(network()[1]),
        "Hardmax",
    ),
    "within a branch": (in_a_branch(), [("chosen", FLOAT, None)], (), "EfficientNMS_TRT"),
}


def quantized(model, x, rule="onnxruntime-cpu"):
    prepared = prepare(model)
    plan = make_plan(prepared.graph, load_rule(rule))
    empty = insert_pairs(prepared, plan, placeholder_params(prepared, plan), state="uncalibrated")
    return calibrate(empty, [{model.graph.inputs[0].name: x}], observer="minmax", threads=1)


@pytest.fixture(params=TAILS)
def tail(request):
    nodes, outputs, keep, op = TAILS[request.param]
    return with_tail(*nodes, outputs=outputs, keep=keep), op


def batches(model, x):
    class Samples:
        inputs = {model.graph.inputs[0].name: x}  # noqa: RUF012
        labels = None

    return [Samples()]


def test_what_stands_before_them_is_what_the_network_without_them_computes(tail):
    """The parameters and the figures are those of the network that ends there."""
    model, op = tail
    x = samples(network()[0], 16)
    cut = computable(model)
    assert any(op in one for one in cut.ops)
    assert set(cut.lost) == {t.name for t in model.graph.outputs} - set(network()[1])
    qdq, plain = quantized(model, x), quantized(from_proto(network()[0]), x)
    theirs, ours = plain.params, qdq.params
    assert theirs.keys() & ours.keys()
    for name in theirs.keys() & ours.keys():
        np.testing.assert_array_equal(ours[name].scale, theirs[name].scale, err_msg=name)
    found = evaluate(qdq, batches(model, x), against=model, threads=1)
    alone = evaluate(plain, batches(model, x), against=from_proto(network()[0]), threads=1)
    assert op.split("_")[0] in found.note
    differences = [o.max_abs_diff for o in found.outputs if o.kind == "values"]
    assert 0 < max(differences) < 2 * alone.max_abs_diff
    same = evaluate(model, batches(model, x), against=qdq.floats, threads=1)
    assert same.max_abs_diff < 1e-4


@pytest.mark.parametrize("rule", ["tensorrt", "onnxruntime-cpu"])
def test_training_ends_before_them_and_keeps_the_whole_graph(tmp_path, rule):
    model = with_tail(plugin(), outputs=PLUGIN_OUTPUTS)
    x = samples(network()[0], 40)
    qdq = quantized(model, x, rule)
    np.savez(tmp_path / "x.npz", **{model.graph.inputs[0].name: x})
    said = []
    with open_data(tmp_path / "x.npz", input_specs(model)) as data:
        result = finetune(
            qdq, data, config=Config(epochs=2, threads=1, select="loss"), say=said.append
        )
    assert "are replaced by" in said[0]
    assert result.after.loss < result.before.loss
    graph = result.model.floats.graph
    assert [t.name for t in graph.outputs] == ["count", "boxes"]
    assert graph.nodes[-1].op == "EfficientNMS_TRT"
    assert [t.name for t in graph.nodes[-1].inputs] == network()[1]


def test_they_do_not_keep_a_model_from_being_trained():
    prepared = prepare(with_tail(plugin(), outputs=PLUGIN_OUTPUTS))
    plan = make_plan(prepared.graph, load_rule("tensorrt"))
    assert untrainable_nodes(prepared, plan) == []


def test_a_point_behind_them_is_refused_by_name():
    first = network()[1][0]
    middle = helper.make_node("Magic_TRT", [first], ["magic"], name="m", domain="TRT_PLUGINS")
    after = helper.make_node("MatMul", ["magic", "magic"], ["end"], name="product")
    known = [helper.make_tensor_value_info("magic", FLOAT, ["N", 5, 4, 4])]
    model = with_tail(middle, after, outputs=[("end", FLOAT, ["N", 5, 4, 4])], known=known)
    with pytest.raises(ModelError, match=r"no Magic_TRT of the domain.*, and '\w+' is computed be"):
        quantized(model, samples(network()[0], 4))
    prepared = prepare(model)
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))
    unmeasured = insert_pairs(
        prepared, plan, placeholder_params(prepared, plan), state="calibrated"
    )
    with pytest.raises(ModelError, match="'magic' is quantized behind an op that onnxruntime lac"):
        computable(unmeasured)


def test_a_model_whose_input_they_read_computes_nothing():
    node = helper.make_node("Magic_TRT", ["x"], ["y"], domain="TRT_PLUGINS")
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", FLOAT, ["N"])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("TRT_PLUGINS", 1)]
    model = from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))
    with pytest.raises(ModelError, match="has no Magic_TRT, and there is nothing before it"):
        computable(model)


@pytest.mark.parametrize("opset", [9, 11])
def test_an_upgrade_is_compared_before_them(opset):
    model = with_tail(plugin(), outputs=PLUGIN_OUTPUTS).to_proto()
    model.opset_import[0].version = opset
    prepared = prepare(from_proto(model))
    assert prepared.graph.opset >= 13
    assert prepared.graph.nodes[-1].op == "EfficientNMS_TRT"


def test_a_model_without_them_is_itself():
    model = from_proto(network()[0])
    assert computable(model).model is model


def test_a_reader_takes_what_its_tensors_need():
    proto = with_tail(plugin(), outputs=PLUGIN_OUTPUTS).to_proto()
    inner = proto.graph.node[1].output[0]
    whole = onnx.ModelProto.FromString(proto.SerializeToString())
    prune(proto, [inner])
    assert len(proto.graph.node) == 2
    assert len(proto.graph.initializer) < len(whole.graph.initializer)
    reader = TensorReader(whole, [inner], optimization="none", threads=1)
    x = samples(network()[0], 4)
    feeds = {proto.graph.input[0].name: x, "other": x}
    assert reader.run(feeds)[inner].shape[0] == len(x)
    assert TensorReader(proto, [], optimization="none").run(feeds) == {}
