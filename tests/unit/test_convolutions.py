"""Gradients of convolutions as products, against loops in float64 over integers: exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxqat.train.convolutions import batch_convolutions
from tests.oracles import run_ort

CASES = {
    "1x1 map": ((8, 6, 1, 1), (8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "2x2 map": ((8, 4, 2, 2), (5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "no pads": ((8, 3, 5, 4), (4, 3, 3, 2), {}),
    "uneven pads": ((8, 3, 4, 5), (4, 3, 3, 3), {"pads": [0, 2, 1, 0]}),
    "strides": ((8, 3, 7, 6), (4, 3, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "dilations": ((8, 3, 7, 8), (17, 3, 3, 2), {"dilations": [2, 3], "pads": [1, 1, 0, 1]}),
    "all": (
        (8, 6, 7, 8),
        (34, 3, 3, 2),
        {"group": 2, "strides": [1, 2], "dilations": [2, 1], "pads": [2, 0, 1, 1]},
    ),
    "1x1 kernel": ((8, 5, 3, 4), (7, 5, 1, 1), {}),
    "1x1 kernel with strides": ((8, 5, 4, 4), (7, 5, 1, 1), {"strides": [2, 2]}),
    "groups": ((8, 6, 3, 3), (9, 2, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
    "depthwise": ((8, 6, 2, 2), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    "depthwise, two filters": ((8, 3, 3, 3), (6, 1, 2, 2), {"group": 3}),
    "kernel of the map": ((8, 4, 3, 3), (5, 4, 3, 3), {}),
    "pads beyond the kernel": ((9, 3, 2, 2), (17, 3, 2, 2), {"pads": [2, 2, 2, 2]}),
    "one axis": ((8, 4, 9), (5, 4, 3), {"strides": [2], "pads": [1, 0]}),
    "three axes": ((8, 2, 2, 3, 2), (3, 2, 3, 2, 1), {"pads": [1, 0, 0, 1, 1, 0]}),
}  # x, w, attributes


def conv_grad(x, w, attributes, outputs=("dx", "dw", "db")):
    """Return a model of one ConvGrad and the shape of its dy."""
    rank = len(w) - 2
    strides, dilations = (attributes.get(n, [1] * rank) for n in ("strides", "dilations"))
    pads = attributes.get("pads", [0] * (2 * rank))
    dy = [x[0], w[0]]
    for i in range(rank):
        reach = dilations[i] * (w[2 + i] - 1) + 1
        dy.append((x[2 + i] + pads[i] + pads[i + rank] - reach) // strides[i] + 1)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"dy": dy, "x": x, "w": w}.items()
    ]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs if n]
    node = helper.make_node(
        "ConvGrad",
        ["dy", "x", "w"],
        outputs,
        name="grad",
        domain="com.microsoft",
        **{"kernel_shape": w[2:], **attributes},
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "grad", values, made)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), dy


def expected(dy, x, w, attributes):
    """Return dx, dw, db by the definition of Conv, one tap at one position at a time."""
    rank = w.ndim - 2
    group = attributes.get("group", 1)
    strides, dilations = (attributes.get(n, [1] * rank) for n in ("strides", "dilations"))
    pads = attributes.get("pads", [0] * (2 * rank))
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    filters, channels = w.shape[0] // group, w.shape[1]
    for out in np.ndindex(dy.shape[2:]):
        for tap in np.ndindex(w.shape[2:]):
            at = tuple(
                o * s - p + t * d
                for o, s, p, t, d in zip(out, strides, pads[:rank], tap, dilations, strict=True)
            )
            if not all(0 <= a < length for a, length in zip(at, x.shape[2:], strict=True)):
                continue
            for g in range(group):
                f, c = (slice(g * n, (g + 1) * n) for n in (filters, channels))
                above, below = dy[(slice(None), f, *out)], x[(slice(None), c, *at)]
                dw[(f, slice(None), *tap)] += above.T @ below
                dx[(slice(None), c, *at)] += above @ w[(f, slice(None), *tap)]
    return {"dx": dx, "dw": dw, "db": dy.sum((0, *range(2, dy.ndim)))}


def integers(rng, shape):
    """Return small integers: their sums are exact in float32, in whatever order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_products_are_the_gradient(name):
    x_shape, w_shape, attributes = CASES[name]
    model, dy_shape = conv_grad(x_shape, w_shape, attributes)
    batch_convolutions(model)
    assert "ConvGrad" not in {node.op_type for node in model.graph.node}

    rng = np.random.default_rng(0)
    feeds = {n: integers(rng, s) for n, s in zip(("dy", "x", "w"), (dy_shape, x_shape, w_shape),
                                                 strict=True)}  # fmt: skip
    results = dict(zip(("dx", "dw", "db"), run_ort(model, feeds), strict=True))
    for output, values in expected(**feeds, attributes=attributes).items():
        assert results[output].shape == values.shape
        np.testing.assert_array_equal(results[output], values, err_msg=output)


WANTED = [w for w in itertools.product(("dx", ""), ("dw", ""), ("db", "")) if any(w)]


@pytest.mark.parametrize("outputs", WANTED, ids=str)
def test_only_what_is_read_is_computed(outputs):
    x_shape, w_shape, attributes = CASES["2x2 map"]
    model, dy_shape = conv_grad(x_shape, w_shape, attributes, outputs)
    batch_convolutions(model)
    assert "ConvGrad" not in {node.op_type for node in model.graph.node}
    read = {name for node in model.graph.node for name in node.input}
    read |= {output.name for output in model.graph.output}
    assert all(set(node.output) <= read for node in model.graph.node)

    rng = np.random.default_rng(0)
    feeds = {n: integers(rng, s) for n, s in zip(("dy", "x", "w"), (dy_shape, x_shape, w_shape),
                                                 strict=True)}  # fmt: skip
    values = expected(**feeds, attributes=attributes)
    wanted = [name for name in outputs if name]
    for name, result in zip(wanted, run_ort(model, feeds), strict=True):
        np.testing.assert_array_equal(result, values[name])


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((8, 64, 14, 14), (64, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((8, 64, 7, 7), (64, 1, 3, 3), {"pads": [1, 1, 1, 1], "group": 64}),
        ((7, 64, 2, 2), (64, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((8, 32, 8, 8), (32, 32, 15, 15), {"pads": [6, 6, 6, 6]}),
        ((8, 32, 4, 4), (32, 32, 3, 3), {"auto_pad": "VALID"}),
    ],
    ids=["large map", "depthwise", "few samples", "large kernel", "auto_pad"],
)
def test_others_are_left_to_onnxruntime(x, w, attributes):
    model, _ = conv_grad(x, w, attributes)
    before = model.SerializeToString()
    batch_convolutions(model)

    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ["dy", "x", "w"])
def test_unknown_shapes_are_left_to_onnxruntime(name):
    model, _ = conv_grad(*CASES["2x2 map"])
    value = next(v for v in model.graph.input if v.name == name)
    value.type.tensor_type.shape.dim[0].Clear()
    before = model.SerializeToString()
    batch_convolutions(model)

    assert model.SerializeToString() == before
