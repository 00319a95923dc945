"""Gradients of single nodes in the training form, and finite differences in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxqat.gradients import add_gradients, installed_kernels
from onnxqat.model import from_proto
from onnxqat.preparation.shapes import infer_shapes
from onnxqat.runtime import open_session
from onnxqat.train.lowering import lower
from onnxqat.train.lowering.gradient import LOWERED_DOMAIN
from tests.builder import HAS_BUILDER, built
from tests.oracles import run_ort

Array = NDArray[Any]


def one_node(op_type, inputs, constants=None, *, opset=17, outputs=1, domain="", **attributes):
    """Return a model of one node: float ``inputs``, then ``constants``; None is left out."""
    constants = constants or {}
    names = [name if value is not None else "" for name, value in {**inputs, **constants}.items()]
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, made, name="node", domain=domain, **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [value(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [value(name, TensorProto.FLOAT, None) for name in made],
        [numpy_helper.from_array(v, n) for n, v in constants.items() if v is not None],
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 21 else 10)


def lowered(model, learned, *, all_reach_loss=True):
    """Return the training form of a one-node model, its ops registered, with typed values."""
    work = from_proto(model)
    infer_shapes(work.graph)
    node = work.graph.nodes[0]
    indices = [i for i, t in enumerate(node.inputs) if t.name in learned]
    nodes, ops = lower(node, indices, opset=work.graph.opset, all_reach_loss=all_reach_loss)
    if all(made is not node for made in nodes):
        node.inputs.clear()
        node.outputs.clear()
    work.graph.nodes.clear()
    work.graph.nodes.extend(nodes)
    proto = work.to_proto()
    proto.opset_import.append(helper.make_opsetid(LOWERED_DOMAIN, 1))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    for op in ops:
        proto.functions.extend([op.forward, op.gradient])
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def gradients(model, inputs, learned, upstream, **options):
    """Return dL/dinput for L = sum over outputs of sum(upstream * output)."""
    proto = lowered(model, learned, **options)
    graph = proto.graph
    terms = []
    for output, weight in zip(list(graph.output), upstream, strict=True):
        graph.initializer.append(numpy_helper.from_array(weight, f"g/{output.name}"))
        graph.node.append(
            helper.make_node("Mul", [output.name, f"g/{output.name}"], [f"m/{output.name}"])
        )
        total = f"t/{output.name}"
        graph.node.append(helper.make_node("ReduceSum", [f"m/{output.name}"], [total], keepdims=0))
        terms.append(total)
    for i, term in enumerate(terms[1:]):
        graph.node.append(helper.make_node("Add", [terms[0], term], [f"s{i}"]))
        terms[0] = f"s{i}"
    graph.node.append(helper.make_node("Identity", [terms[0]], ["loss"]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    feeds = {n: np.asarray(a) for n, a in inputs.items()}
    results = {}
    for title, build in BUILDERS.items():
        session = open_session(build(proto, set(learned)), optimization="basic", threads=1)
        outputs = (o.name for o in session.get_outputs())
        results[title] = dict(zip(outputs, session.run(None, feeds), strict=True))
    # onnxruntime's gradient of a scalar can have the shape (1,),
    found = {n: results["standard"][f"{n}_grad"].reshape(inputs[n].shape) for n in learned}
    for title, others in results.items():
        for name, gradient in found.items():
            other = others[f"{name}_grad"].reshape(gradient.shape)
            error, size = np.linalg.norm(other - gradient), np.linalg.norm(gradient)
            assert error <= FORMS * (size + 1e-6), (title, name, error / size)
    return found


FORMS = 1e-4  # relative tolerance between the forms of a definition
BUILDERS = {
    "standard": lambda model, learned: add_gradients(model, learned, kernels=frozenset()),
    "kernels": lambda model, learned: add_gradients(model, learned, kernels=installed_kernels()),
}
if HAS_BUILDER:
    BUILDERS["onnxruntime"] = built
CHECKS = ("tolerance", "step", "oracle", "all_reach_loss")


def check_node(op_type, inputs, constants=None, learned=None, **options):
    """Check a model of one node, see `one_node` and `check_model`."""
    checks = {name: options.pop(name) for name in CHECKS if name in options}
    check_model(one_node(op_type, inputs, constants, **options), inputs, learned, **checks)


def check_model(
    model, inputs, learned=None, *, tolerance=2e-4, step=1e-6, oracle=None, all_reach_loss=True
):
    """Compare the forward pass bit for bit, and gradients with finite differences.

    The differences are along random directions.
    """
    learned = list(learned or inputs)
    expected = run_ort(model, inputs)
    actual = run_ort(lowered(model, learned, all_reach_loss=all_reach_loss), inputs)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)
    rng = np.random.default_rng(7)
    upstream = [rng.normal(size=e.shape).astype(np.float32) for e in expected]
    found = gradients(model, inputs, learned, upstream, all_reach_loss=all_reach_loss)
    evaluate = oracle or reference(model)
    doubles = {n: a.astype(np.float64) for n, a in inputs.items()}

    def loss(**changed):
        outputs = evaluate(doubles | changed)
        return sum(float((u * o).sum()) for u, o in zip(upstream, outputs, strict=True))

    for name in learned:
        for _ in range(6):
            line = rng.normal(size=inputs[name].shape)
            ends = [loss(**{name: doubles[name] + sign * step * line}) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            along = float((found[name] * line).sum())
            size = float(np.abs(found[name] * line).sum()) + 1e-3
            assert abs(along - slope) <= tolerance * size, (name, along, slope)


def reference(model):
    """Return ONNX's reference evaluator of a model, in float64."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    for value in (*double.graph.input, *double.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in double.graph.initializer:
        array = numpy_helper.to_array(tensor)
        # the scales of a Resize are float32 by definition
        if array.dtype == np.float32 and double.graph.node[0].op_type != "Resize":
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float64), tensor.name))
    evaluator = onnx.reference.ReferenceEvaluator(double)
    return lambda feeds: evaluator.run(None, feeds)
