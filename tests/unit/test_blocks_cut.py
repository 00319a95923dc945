"""Where graphs are cut, and that their blocks together are the network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.train.blocks.cut import cut
from onnxqat.train.blocks.parts import between, block_model, quantized_crossings
from onnxqat.train.lowering import sample_shapes
from tests.networks import answering, attention, convnet, detector, quantized, samples, upsampling
from tests.oracles import run_ort


def convolutions(lines, outputs, shape=("N", 4, 4, 4)):
    """Return a graph of 1x1 convolutions and others: ``target = op(sources)``."""
    nodes, weights = [], []
    for line in lines:
        target, call = line.split(" = ")
        op, names = call.rstrip(")").split("(")
        inputs = names.split(", ")
        if op == "Conv":
            weight = np.random.default_rng(len(nodes)).normal(size=(4, 4, 1, 1))
            weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w_{target}"))
            inputs.append(f"w_{target}")
        nodes.append(helper.make_node(op, inputs, [target], name=f"n_{target}"))
    x, *ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", *outputs))
    graph = helper.make_graph(nodes, "g", [x], ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def blocks_of(network, limit=2):
    model = prepare(from_proto(network))
    return cut(model, sample_shapes(model), limit)


CHAIN = ["a = Conv(x)", "r = Relu(a)", "b = Conv(r)", "s = Relu(b)", "c = Conv(s)", "y = Relu(c)"]


@pytest.mark.parametrize(("limit", "sizes"), [(1, [[1, 1, 1]]), (2, [[1, 2], [2, 1]]), (3, [[3]])])
def test_a_chain_is_cut_behind_activation_functions(limit, sizes):
    blocks = blocks_of(convolutions(CHAIN, ["y"]), limit)

    assert [len(block.layers) for block in blocks] in sizes
    assert {block.outputs[0] for block in blocks} <= {"r", "s", "y"}


RESIDUAL = [
    "r = Relu(x)",
    "a = Conv(r)",
    "b = Relu(a)",
    "c = Conv(b)",
    "d = Relu(c)",
    "e = Conv(d)",
    "s = Add(e, r)",
    "t = Relu(s)",
    "y = Conv(t)",
]


def test_a_residual_block_stays_whole():
    blocks = blocks_of(convolutions(RESIDUAL, ["y"]), 2)

    assert [block.outputs for block in blocks] == [("t",), ("y",)]
    assert blocks[0].layers == ("n_a", "n_c", "n_e")
    assert blocks[1].inputs == ("t",)


def test_one_of_more_than_twice_the_limit_does_not():
    blocks = blocks_of(convolutions(RESIDUAL, ["y"]), 1)

    assert max(len(block.layers) for block in blocks) <= 2
    assert ("t",) in [block.outputs for block in blocks]


HEADS = [
    "a = Conv(x)",
    "b = Relu(a)",
    "c = Conv(b)",
    "p = Sigmoid(c)",
    "d = Conv(p)",
    "u = Conv(d)",
    "e = Tanh(b)",
    "f = Conv(e)",
    "v = Conv(f)",
]


def test_branches_part_at_the_tensors_that_both_need():
    blocks = blocks_of(convolutions(HEADS, ["u", "v"]), 2)

    assert sum((block.nodes for block in blocks), ()) == tuple(f"n_{line[0]}" for line in HEADS)
    last = blocks[-1]
    assert last.outputs == ("v",)
    assert last.inputs == ("e",)  # the last place before its layer
    assert "u" in sum((block.outputs for block in blocks[:-1]), ())


def test_what_has_no_row_for_each_sample_does_not_cross():
    """A Transpose puts the batch last, until another one moves it back."""
    nodes = convolutions(CHAIN[:4], ["y"])
    del nodes.graph.node[:]
    made = [
        helper.make_node("Conv", ["x", "w_a"], ["a"], name="n_a"),
        helper.make_node("Transpose", ["a"], ["t"], name="n_t", perm=[3, 1, 2, 0]),
        helper.make_node("Sigmoid", ["t"], ["q"], name="n_q"),
        helper.make_node("MatMul", ["w_m", "q"], ["m"], name="n_m"),
        helper.make_node("Transpose", ["m"], ["u"], name="n_u", perm=[3, 1, 2, 0]),
        helper.make_node("Conv", ["u", "w_b"], ["y"], name="n_y"),
    ]
    nodes.graph.node.extend(made)
    weight = np.eye(4, dtype=np.float32) + 1
    nodes.graph.initializer.append(numpy_helper.from_array(weight, "w_m"))
    blocks = blocks_of(nodes, 1)

    ends = [block.outputs for block in blocks]
    assert ("q",) not in ends
    assert ("t",) not in ends
    assert ends == [("a",), ("u",), ("y",)]


NETWORKS = {
    "convnet": convnet(),
    "attention": attention(),
    "upsampling": upsampling(),
    "detector": detector(),
    "answering": answering(),
    "residual": convolutions(RESIDUAL, ["y"]),
    "heads": convolutions(HEADS, ["u", "v"]),
}


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_one_after_the_other_are_the_network(name, limit):
    """Bit for bit, the float network and the quantized one."""
    network = NETWORKS[name]
    feed = network.graph.input[0].name
    if feed != "input":
        network = renamed(network, feed)
    floats, model = quantized(network, "onnxruntime-cpu")
    shapes = sample_shapes(floats)
    blocks = cut(model.floats, shapes, limit)
    crossings = quantized_crossings(model, blocks)
    x = {"input": samples(network, 3)}

    assert len(blocks) > 1
    assert sum((block.nodes for block in blocks), ()) == tuple(n.name for n in floats.graph.nodes)
    for whole, part in (
        (floats, lambda b: between(floats, b.inputs, b.outputs, shapes)),
        (model, lambda b: block_model(model, b, crossings, shapes)),
    ):
        known = dict(x)
        for block in blocks:
            found = run_ort(part(block).to_proto(), {n: known[n] for n in block.inputs})
            known |= dict(zip(block.outputs, found, strict=True))
        wanted = run_ort(whole.to_proto(), x)
        for tensor, values in zip(floats.graph.outputs, wanted, strict=True):
            np.testing.assert_array_equal(known[tensor.name], values)


def renamed(network, old):
    """Return a network whose input is called as `quantized` calls it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    copy.graph.input[0].name = "input"
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = "input"
    return copy


def test_a_pair_stands_in_one_block_alone():
    """What crosses on its grid is quantized by the block that computes it."""
    _, model = quantized(convnet(), "onnxruntime-cpu")
    shapes = sample_shapes(model.floats)
    blocks = cut(model.floats, shapes, 1)
    crossings = quantized_crossings(model, blocks)
    found = [
        point.tensor
        for block in blocks
        for point in block_model(model, block, crossings, shapes).plan.grid_points()
    ]

    assert {"r1", "p1"} <= crossings
    assert sorted(found) == sorted(p.tensor for p in model.plan.grid_points())
