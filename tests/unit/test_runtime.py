"""What onnxruntime refuses is one line that names model, node and the next step."""

from __future__ import annotations

import gc

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.device import Device
from onnxqat.ends import TensorReader
from onnxqat.errors import DataError, ModelError
from onnxqat.runtime import UnknownOpError, explained_memory, open_session

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model(op, inputs, *, name="the_node", domain="", opset=17, constants=(), **attributes):
    """Return a model of one node; ``inputs`` are (name, type, shape) or names of constants."""
    names = [entry if isinstance(entry, str) else entry[0] for entry in inputs]
    node = helper.make_node(op, names, ["y"], name=name, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(*entry) for entry in inputs if not isinstance(entry, str)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(values, key) for key, values in constants],
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] * bool(domain))]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def zeros(*shape):
    return np.zeros(shape, np.float32)


TABLE = ("table", zeros(10, 3))
GATHER = model("Gather", ["table", ("i", INT64, ["N"])], constants=[TABLE])
RESHAPE = model(
    "Reshape", [("x", FLOAT, ["N", 6]), "shape"], constants=[("shape", np.array([1, 6]))]
)
MATMUL = model("MatMul", [("a", FLOAT, ["N", "K"]), ("b", FLOAT, ["M", 3])])
UNNAMED = model("MatMul", [("a", FLOAT, ["N", "K"]), ("b", FLOAT, ["M", 3])], name="")
CONCAT = model("Concat", [("a", FLOAT, ["N", "K"]), ("b", FLOAT, ["M", 3])], axis=0)


@pytest.mark.parametrize(
    ("proto", "feeds", "message"),
    [
        (GATHER, {"i": np.array([3, 10])}, r"'the_node' \(Gather\).* idx=10 must.*valid indices"),
        (RESHAPE, {"x": zeros(2, 6)}, r"'the_node' \(Reshape\).*shape:{1,6}.*as --batch-size"),
        (MATMUL, {"a": zeros(2, 4), "b": zeros(5, 3)}, r"'the_node' \(MatMul\) does not run"),
        (UNNAMED, {"a": zeros(2, 4), "b": zeros(5, 3)}, "the MatMul that computes 'y' does not"),
        (CONCAT, {"a": zeros(2, 4), "b": zeros(5, 3)}, r"'the_node' \(Concat\).* of 3 and 4\)\."),
    ],
)
def test_a_node_that_fails_is_named(proto, feeds, message):
    session = open_session(proto, optimization="none", threads=1, name="net.onnx")
    for run in (
        lambda: session.run(None, feeds),
        lambda: TensorReader(proto, ["y"], optimization="none", name="net.onnx").run(feeds),
        lambda: _run_bound(session, feeds),
    ):
        with pytest.raises(ModelError, match=rf"^net\.onnx: .*{message}") as caught:
            run()
        assert "\n" not in str(caught.value)
        assert "onnxruntime_src" not in str(caught.value)


def _run_bound(session, feeds):
    binding = session.io_binding()
    for name, values in feeds.items():
        binding.bind_cpu_input(name, values)
    binding.bind_output("y")
    session.run_with_iobinding(binding)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": zeros(2, 5)}, "x for the following indices index: 1 Got: 5 Expected: 6"),
        ({"x": zeros(2, 6, 1)}, "Invalid rank for input: x Got: 3 Expected: 2"),
        ({"x": np.zeros((2, 6))}, r"Actual: \(tensor\(double\)\) , expected: \(tensor\(float\)\)"),
        ({}, r"\['x'\]\) are missing"),
        ({"x": zeros(1, 6), "z": zeros(1)}, "Invalid input name: z"),
    ],
)
def test_data_of_another_shape_or_dtype_are_an_error_of_the_data(feeds, message):
    session = open_session(RESHAPE, optimization="none", threads=1, name="net.onnx")
    with pytest.raises(DataError, match=rf"^net\.onnx: does not run on the data \(.*{message}"):
        session.run(None, feeds)


@pytest.mark.parametrize(
    ("proto", "op", "node", "message"),
    [
        (model("NMS_TRT", [("x", FLOAT, ["N"])], domain="TRT"), "NMS_TRT", None, "domain 'TRT'"),
        (model("Foo", [("x", FLOAT, ["N"])], domain="com.microsoft"), "Foo", None, "no Foo of"),
        (model("Foo", [("x", FLOAT, ["N"])]), "Foo", None, "onnxruntime has no Foo"),
        (
            model("Relu", [("x", TensorProto.BFLOAT16, ["N"])]),
            "Relu",
            "the_node",
            r"cannot run node 'the_node' \(Relu\) with its data types",
        ),
    ],
)
def test_an_op_that_onnxruntime_lacks_is_named(proto, op, node, message):
    with pytest.raises(UnknownOpError, match=rf"^net\.onnx: .*{message}") as caught:
        open_session(proto, optimization="none", name="net.onnx")
    assert (caught.value.op, caught.value.node) == (op, node)


def test_outputs_in_place_are_those_of_a_run_and_outlive_the_session():
    """Also of other types, without elements, and from an array that is not contiguous."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) =>
    (float[N, 3] y, int64[2] shape, float[0] none, float s) {
        y = Relu(x) shape = Shape(x) s = ReduceSum<keepdims = 0>(y)
        one = Constant<value = float[1] {1}> () zero = Constant<value = int64[1] {0}> ()
        none = Expand(one, zero) }"""
    session = open_session(onnx.parser.parse_model(text), optimization="basic")
    names = ["y", "shape", "none", "s"]
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((3, n)).astype(np.float32).T} for n in (4, 4, 7)]
    found = [session.run_in_place(names, feed) for feed in feeds]
    expected = [session.run(names, feed) for feed in feeds]
    del session
    gc.collect()

    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_array_equal(a, b)
    assert not found[0][0].flags.writeable


def test_in_place_a_wrong_shape_is_an_error_of_the_data():
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) {y = Relu(x)}'
    )
    session = open_session(onnx.parser.parse_model(text), optimization="basic", name="net")
    with pytest.raises(DataError, match=r"^net: does not run on the data"):
        session.run_in_place(["y"], {"x": np.zeros((2, 4), np.float32)})


ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv "
    "node. Name:'c' Status Message: /src/bfc_arena.cc:376 Failed to allocate memory for requested "
    "buffer of size 4096"
)


@pytest.mark.parametrize("text", [ARENA, "CUDA failure 2: out of memory ; GPU=1"])
def test_a_full_memory_of_a_gpu_is_told_with_what_to_do(monkeypatch, text):
    def full(*_, **__):
        raise RuntimeError(text)

    session = open_session(MATMUL, optimization="none", name="net.onnx")
    monkeypatch.setattr(ort.InferenceSession, "run", full)
    with pytest.raises((ModelError, DataError), match="does not run on the data"):
        session.run(None, {})
    session._device = Device(kind="cuda", index=1)
    said = r"^net\.onnx: the memory of cuda:1 is full\. Pass a smaller --batch-size"
    with pytest.raises(ModelError, match=said):
        session.run(None, {})
    with (
        pytest.raises(ModelError, match=r"^training: the memory of cuda:1 is full"),
        explained_memory("training", session._device),
    ):
        full()
    with (
        pytest.raises(RuntimeError, match="another"),
        explained_memory("training", session._device),
    ):
        raise RuntimeError("another")


def test_a_session_has_the_threads_that_were_asked_for():
    options = open_session(MATMUL, optimization="none", threads=2).get_session_options()

    assert options.intra_op_num_threads == 2
