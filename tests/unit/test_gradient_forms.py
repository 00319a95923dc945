"""Definitions whose forms differ with shapes and runtimes: convolutions, pooling, the loss."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import TrainingError
from onnxqat.gradients import add_gradients, convolution, installed_kernels
from onnxqat.runtime import open_session

CONVOLUTIONS = {
    "plain": ((2, 3, 5, 4), (4, 3, 3, 2), {}),
    "1x1 map": ((8, 6, 1, 1), (8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "small map": ((8, 4, 2, 2), (5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "uneven pads": ((2, 3, 4, 5), (4, 3, 3, 3), {"pads": [0, 2, 1, 0]}),
    "strides": ((2, 3, 7, 6), (4, 3, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "dilations": ((2, 3, 7, 8), (17, 3, 3, 2), {"dilations": [2, 3], "pads": [1, 1, 0, 1]}),
    "all": (
        (2, 6, 7, 8),
        (34, 3, 3, 2),
        {"group": 2, "strides": [1, 2], "dilations": [2, 1], "pads": [2, 0, 1, 1]},
    ),
    "1x1 kernel": ((2, 5, 3, 4), (7, 5, 1, 1), {}),
    "1x1 kernel, groups": ((2, 4, 3, 4), (6, 2, 1, 1), {"group": 2}),
    "1x1 kernel with strides": ((2, 5, 5, 4), (7, 5, 1, 1), {"strides": [2, 2]}),
    "1x1 kernel with pads": ((2, 5, 3, 4), (7, 5, 1, 1), {"pads": [1, 0, 0, 1]}),
    "groups": ((2, 6, 3, 3), (9, 2, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 6, 4, 5), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    "depthwise with strides": ((2, 6, 8, 5), (6, 1, 3, 3), {"group": 6, "strides": [2, 2]}),
    "depthwise, two filters": ((2, 3, 3, 3), (6, 1, 2, 2), {"group": 3}),
    "kernel of the map": ((2, 4, 3, 3), (5, 4, 3, 3), {}),
    "pads beyond the kernel": ((9, 3, 2, 2), (17, 3, 2, 2), {"pads": [2, 2, 2, 2]}),
    "one axis": ((2, 4, 9), (5, 4, 3), {"strides": [2], "pads": [1, 0]}),
    "three axes": ((2, 2, 2, 3, 2), (3, 2, 3, 2, 1), {"pads": [1, 0, 0, 1, 1, 0]}),
    "valid": ((2, 3, 5, 4), (4, 3, 3, 2), {"auto_pad": "VALID"}),
}  # x, w, attributes


def integers(rng, shape):
    """Return small integers: their sums are exact in float32, in whatever order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def result_shape(x, w, attributes):
    rank = len(w) - 2
    strides, dilations = (attributes.get(n, [1] * rank) for n in ("strides", "dilations"))
    pads = attributes.get("pads", [0] * (2 * rank))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, w[2:], strict=True)]
    lengths = zip(x[2:], pads, pads[rank:], reach, strides, strict=False)
    return [x[0], w[0], *((n + p + q - r) // s + 1 for n, p, q, r, s in lengths)]


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
    return {"x": dx, "w": dw, "b": dy.sum((0, *range(2, dy.ndim)))}


def differentiated(
    node, inputs, dy, learned, kernels=frozenset(), free=(), opset=17, *, wide=False
):
    """Return the gradients of ``sum(dy * first output)``; ``free`` axes have no known length."""
    shapes = {n: [None if i in free and n == "x" else k for i, k in enumerate(a.shape)]
              for n, a in inputs.items()}  # fmt: skip
    value = helper.make_tensor_value_info
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in inputs.items()}
    terms = helper.make_node("Mul", [node.output[0], "dy"], ["terms"])
    total = helper.make_node("ReduceSum", ["terms"], ["loss"], keepdims=0)
    graph = helper.make_graph(
        [node, terms, total],
        "g",
        [value(n, kinds[n], shape) for n, shape in shapes.items()],
        [value("loss", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(dy, "dy")],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    built = add_gradients(model, learned, kernels=kernels, wide=wide)
    session = open_session(built, optimization="basic", threads=1)
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(None, inputs), strict=True))
    return {name.removesuffix("_grad"): v for name, v in found.items()}, built


def conv(name, bias=True):
    x, w, attributes = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    inputs = {"x": integers(rng, x), "w": integers(rng, w)}
    inputs |= {"b": integers(rng, w[:1])} if bias else {}
    node = helper.make_node("Conv", list(inputs), ["y"], **attributes)
    dy = integers(rng, result_shape(x, w, attributes))
    return node, inputs, dy, expected(dy, inputs["x"], inputs["w"], attributes)


@pytest.mark.parametrize(
    "form", ["columns", "taps", "free", "conv", "wide", "kernels", "kernels, conv"]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, form, monkeypatch):
    if form == "taps":
        monkeypatch.setattr(convolution, "MOST_COLUMNS", 0)
    if "conv" in form:
        monkeypatch.setattr(convolution, "MANY_POSITIONS", 0)
    monkeypatch.setattr(convolution, "MOST_JOINED", 4)
    node, inputs, dy, wanted = conv(name)
    kernels = installed_kernels() if "kernels" in form else frozenset()
    free = range(2, dy.ndim) if form == "free" else ()
    wide = form == "wide"
    found, _ = differentiated(node, inputs, dy, set(inputs), kernels, free, wide=wide)
    for which, values in wanted.items():
        assert found[which].shape == values.shape
        np.testing.assert_array_equal(found[which], values, err_msg=which)


def test_a_depthwise_gradient_for_a_gpu_reads_each_row_of_the_kernel_once():
    node, inputs, dy, _ = conv("depthwise")
    kinds = []
    for wide in (False, True):
        built = differentiated(node, inputs, dy, {"w"}, wide=wide)[1]
        kinds.append([n.op_type for n in built.graph.node])

    assert [k.count("Slice") for k in kinds] == [9, 3]
    assert kinds[1].count("FusedMatMul") == 3
    assert kinds[1].count("ReduceSum") == 2


def test_no_concat_for_a_gpu_has_more_than_32_inputs():
    """A graph of CUDA may hold no larger one, nor unequal parts; a kernel of 7x7 has 49 taps."""
    rng = np.random.default_rng(0)
    inputs = {"x": integers(rng, (1, 2, 9, 9)), "w": integers(rng, (2, 2, 7, 7))}
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    dy = integers(rng, (1, 2, 3, 3))
    found, built = differentiated(node, inputs, dy, {"w"}, wide=True)
    joined = [len(n.input) for n in built.graph.node if n.op_type == "Concat"]

    assert joined == [7] * 8
    np.testing.assert_array_equal(found["w"], expected(dy, inputs["x"], inputs["w"], {})["w"])


WANTED = [set(w) for r in (1, 2) for w in itertools.combinations("xwb", r)]


@pytest.mark.parametrize("learned", WANTED, ids=lambda w: "".join(sorted(w)))
@pytest.mark.parametrize("name", ["plain", "small map", "depthwise", "1x1 kernel"])
@pytest.mark.parametrize("form", ["standard", "kernels"])
def test_only_what_is_learned_is_computed(name, learned, form):
    node, inputs, dy, wanted = conv(name)
    kernels = installed_kernels() if form == "kernels" else frozenset()
    found, built = differentiated(node, inputs, dy, learned, kernels)
    read = {name for node in built.graph.node for name in node.input}
    read |= {output.name for output in built.graph.output}

    assert all({o for o in node.output if o} <= read for node in built.graph.node)
    assert found.keys() == {"loss", *learned}
    for which in learned:
        np.testing.assert_array_equal(found[which], wanted[which])


def test_same_padding_has_no_gradient():
    node, inputs, _, _ = conv("plain")
    node.attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    with pytest.raises(
        TrainingError, match="needs the pads of auto_pad SAME_UPPER, which is unknown"
    ):
        differentiated(node, inputs, np.zeros((2, 4, 5, 4), np.float32), {"x"})


@pytest.mark.parametrize("free", [(), (2, 3)], ids=["known", "free"])
@pytest.mark.parametrize("opset", [13, 17])
def test_a_maximum_of_several_windows_gets_the_sum(free, opset):
    x = np.float32([[[[1, 2, 0, 0], [0, 9, 0, 3], [0, 0, 5, 0], [7, 7, 0, 0]]]])
    dy = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2])
    wanted = np.zeros((4, 4))
    wanted[1, 1], wanted[1, 3], wanted[2, 2], wanted[3, 0] = 1 + 2 + 4 + 5, 3, 6 + 8 + 9, 7
    # the window of 5 and 9 holds 9; of those below the first 7 counts, and one holds 7 and 5
    wanted[1, 1], wanted[2, 2], wanted[3, 0], wanted[3, 1] = 12, 15, 7, 8
    for kernels in (frozenset(), installed_kernels()):
        found, _ = differentiated(node, {"x": x}, dy, {"x"}, kernels, free, opset)
        np.testing.assert_array_equal(found["x"][0, 0], wanted)


REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 3), (2, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("ignored", [None, -1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", ["standard", "kernels"])
def test_cross_entropy(shape, weighted, ignored, reduction, form):
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, 4, (shape[0], *shape[2:]))
    if ignored == -1:
        labels[0] = -1
    inputs = {"x": x, "t": labels}
    inputs |= {"weights": np.float32([0.5, 1, 2, 3])} if weighted else {}
    attributes = {} if ignored is None else {"ignore_index": ignored}
    node = helper.make_node(
        "SoftmaxCrossEntropyLoss", list(inputs), ["y", "log_p"], reduction=reduction, **attributes
    )
    dy = rng.normal(size=labels.shape if reduction == "none" else ()).astype(np.float32)
    kernels = installed_kernels() if form == "kernels" else frozenset()
    found, _ = differentiated(node, inputs, dy, {"x"}, kernels)

    powers = np.exp(x.astype(np.float64))
    p = powers / powers.sum(1, keepdims=True)
    right = np.moveaxis(np.eye(4)[np.clip(labels, 0, 3)], -1, 1)
    weight = np.ones(labels.shape) if not weighted else inputs["weights"][np.clip(labels, 0, 3)]
    weight = weight * (labels != ignored)
    factor = dy * weight / (weight.sum() if reduction == "mean" else 1)
    np.testing.assert_allclose(found["x"], (p - right) * factor[:, None], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["standard", "kernels"])
def test_cross_entropy_where_no_label_counts(form):
    x = np.ones((2, 3), np.float32)
    inputs = {"x": x, "t": np.array([-1, -1])}
    node = helper.make_node("SoftmaxCrossEntropyLoss", ["x", "t"], ["y", "p"], ignore_index=-1)
    kernels = installed_kernels() if form == "kernels" else frozenset()
    found, _ = differentiated(node, inputs, np.ones((), np.float32), {"x"}, kernels)

    np.testing.assert_array_equal(found["x"], np.zeros((2, 3)))
