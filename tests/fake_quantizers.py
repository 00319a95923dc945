"""A single fake-quantize op: its gradients, and inputs that reach all of its branches."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxqat.gradients import add_gradients
from onnxqat.qparams import QuantSpec, quantized_range
from onnxqat.runtime import open_session
from onnxqat.train.fake_quantize import DOMAIN, FakeQuantize
from tests.builder import HAS_BUILDER, built

SPECS = {
    "int8": QuantSpec(),
    "uint8": QuantSpec(signedness="unsigned"),
    "asymmetric": QuantSpec(signedness="unsigned", symmetric=False),
    "int4": QuantSpec(bits=4),
    "uint4": QuantSpec(bits=4, signedness="unsigned"),
    "narrow": QuantSpec(narrow_range=True),
    "per-axis 0": QuantSpec(axis=0),
    "per-axis 1": QuantSpec(axis=1, bits=4),
}


def variant_of(spec, params, rank, *, learns_x=True, method="lsq", moves_zero_point=False):
    """Return the variant of the op for a spec and its parameters."""
    qmin, qmax = quantized_range(spec, signed=params.signed)
    return FakeQuantize(
        dtype=params.zero_point.dtype.name,
        qmin=qmin,
        qmax=qmax,
        axis=spec.axis,
        rank=rank,
        learns_x=learns_x,
        method=method,
        moves_zero_point=moves_zero_point,
    )


def one_op(variant, x, params, upstream, opset=17):
    """Return dL/dx, dL/ds and dL/dz of one fake-quantize op, with L = sum(upstream * y)."""
    value = helper.make_tensor_value_info
    s = params.scale
    nodes = [
        helper.make_node(variant.op_type, list(variant.inputs), ["y"], domain=DOMAIN),
        helper.make_node("Mul", ["y", "g"], ["yg"]),
        helper.make_node("ReduceSum", ["yg"], ["loss"], keepdims=0),
    ]
    feeds, constants = {"x": x, "s": s, "g": upstream}, {"z": params.zero_point}
    if variant.moves_zero_point:
        feeds["z"] = constants.pop("z").astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "step",
        [value(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()],
        [value("loss", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=[value("y", TensorProto.FLOAT, x.shape)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    functions = [variant.function(opset), variant.gradient_function(opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    wanted = {"x": variant.learns_x, "s": variant.learns_scale, "z": variant.learns_zero_point}
    learned = {name for name, learns in wanted.items() if learns}
    results = []
    graphs = [add_gradients(model, learned, kernels=frozenset())]
    graphs += [built(model, learned)] if HAS_BUILDER else []
    for graph in graphs:
        session = open_session(graph, optimization="basic", threads=1)
        names = (o.name for o in session.get_outputs())
        results.append(dict(zip(names, session.run(None, feeds), strict=True)))
    for name, gradient in results[0].items():
        np.testing.assert_array_equal(gradient, results[-1][name])
    return results[0]


def values_with_ties_and_ends(spec, params, shape=(4, 6, 5)):
    """Return random values, exact ties, the ends of the range, and values just beyond them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    s = float(params.scale.flat[0])
    qmin, qmax = quantized_range(spec, signed=params.signed)
    z = int(params.zero_point.flat[0])
    special = [qmin - z, qmax - z, qmin - z - 0.5, qmax - z + 0.5, 0, 0.5, 1.5, -0.5]
    special += [qmax - z + 0.51, qmin - z - 0.51, qmax - z + 0.49, 3 * qmax, -3 * qmax]
    x.reshape(-1)[: len(special)] = np.float32(special) * np.float32(s)
    return x
