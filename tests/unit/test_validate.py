"""Models that are refused when they are loaded, in one line that names tensor or node."""

# ruff: noqa: E501 - a model a line
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.quantized import load_model
from onnxqat.validate import validate
from tests.exported import EXPORTED, exported
from tests.oracles import run_ort

HEADER = '<ir_version: 8, opset_import: ["": 17, "my": 1]>'
CONV = """g (float[N,3,6,6] x) => (float[N,4,K,L] y) <float[4,3,3,3] w, float[4] b>
    { c = Conv<kernel_shape = [3,3]>(x, w, b) y = Relu(c) }"""


def filled(text: str) -> onnx.ModelProto:
    """Parse a model, and give what the text lists as a float value initializers of ones."""
    proto = onnx.parser.parse_model(HEADER + text)
    written = {name for node in proto.graph.node for name in node.output}
    for value in list(proto.graph.value_info):
        if value.name not in written:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            ones = np.ones(shape, np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(ones, value.name))
            proto.graph.value_info.remove(value)
    return proto


def conv(**attributes: object) -> str:
    given = ", ".join(f"{name} = {value}" for name, value in attributes.items())
    return f"""g (float[N,3,6,6] x) => (float[N,4,K,L] y) <float[4,3,3,3] w>
    {{ y = Conv<{given}>(x, w) }}"""


def of_weights(operator: str, *shapes: str) -> str:
    listed = ", ".join(f"float[{shape}] w{i}" for i, shape in enumerate(shapes))
    names = ", ".join(f"w{i}" for i in range(len(shapes)))
    body = f"{{ y = {operator}(x, {names}) }}"
    return f"g (float[6,1,3] x) => (float[A,B,C] y) <{listed}> {body}"


REFUSED = {  # by what is wrong: the model, and the message
    "cycle": ("g (float[2] x) => (float[2] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }", "a cycle"),
    "cycle-of-one": ("g (float[2] x) => (float[2] y) { y = Add(x, y) }", r"cycle .*'y' \(Add\)"),
    "cycle-through-a-branch": (
        """g (bool t, float[2] x) => (float[2] y) { y = If (t) <
        then_branch = p () => (float[2] u) { u = Neg(z) },
        else_branch = q () => (float[2] v) { v = Neg(x) }> z = Exp(y) }""",
        "cycle",
    ),
    "cycle-in-a-function": (
        """g (float[2] x) => (float[2] y) { y = my.f(x) }
        <domain: "my", opset_import: ["": 17]> f (p) => (q) { q = Add(p, r) r = Neg(q) }""",
        "function 'my.f': the graph has a cycle",
    ),
    "nobody-writes": ("g (float[2] x) => (float[2] y) { y = Add(x, z) }", "reads 'z', which nothing"),
    "nobody-writes-output": ("g (float[2] x) => (float[2] z) { y = Relu(x) }", "the output 'z'"),
    "nobody-writes-in-a-branch": (
        """g (bool t, float[2] x) => (float[2] y) { y = If (t) <
        then_branch = p () => (float[2] u) { u = Neg(z) },
        else_branch = q () => (float[2] v) { v = Neg(x) }> }""",
        "reads 'z'",
    ),
    "written-twice": ("g (float[2] x) => (float[2] y) { y = Relu(x) y = Exp(x) }", "'y' is written"),
    "written-over": ("g (float[2] x) => (float[2] y) { x = Relu(x) y = Exp(x) }", "'x' is written"),
    "one-node-twice": ("g (float[2] x) => (float[2] y) { y, y = Split(x) }", "one value twice"),
    "too-few-inputs": ("g (float[2] x) => (float[2] y) { y = Add(x) }", "1 inputs; the operator accepts 2"),
    "too-many-inputs": ("g (float[2] x) => (float[2] y) { y = Relu(x, x) }", "2 inputs"),
    "too-many-outputs": ("g (float[2] x) => (float[2] y) { y, z = Relu(x) }", "2 outputs; .* writes 1"),
    "input-left-out": ("g (float[2] x) => (float[2] y) { y = Add(, x) }", "leaves out input 0"),
    "cast-to-nothing": ("g (float[2] x) => (float[2] y) { y = Cast(x) }", "lacks the attribute 'to'"),
    "attribute-type": (
        "g (float[2] x) => (float[2] y) { y = Softmax<axis = 1.5>(x) }",
        "the attribute 'axis' of type FLOAT; it must be INT",
    ),
    "strides-0": (conv(strides=[0, 1]), r"has strides = \[0, 1\]; each must be 1 or more"),
    "strides-short": (conv(strides=[1]), r"has strides = \[1\]; 2 spatial axes need 2 values"),
    "pads-negative": (conv(pads=[-1, -1, -1, -1]), "has pads = "),
    "dilations-huge": (conv(dilations=[2**40, 1]), "has dilations = "),
    "group-0": (conv(group=0), "has group = 0"),
    "group-3": (conv(group=3), "3 groups do not divide"),
    "kernel-long": (conv(kernel_shape=[3, 3, 3]), "has kernel_shape = "),
    "pool-0": (
        """g (float[1,3,6,6] x) => (float[1,3,2,2] y)
        { y = MaxPool<kernel_shape = [2,2], strides = [0,0]>(x) }""",
        r"'y' \(MaxPool\) has strides = ",
    ),
    "weight-rank": (of_weights("ConvTranspose", "3"), r"weight 'w0' of shape \[3\]; its rank must be 3"),
    "data-rank": (
        """g (float[4] x) => (float[1,4,3,3] y) <float[4,4,3,3] w>
        { r = Relu(x) n = Neg(r) y = Conv(n, w) }""",
        "data 'n' of rank 1, but a weight of rank 4",
    ),
    "bias-rank": (of_weights("Conv", "4,1,3", "1,4"), r"'w1' of shape \[1, 4\]; its rank must be 1"),
    "bias-length": (of_weights("Conv", "4,1,3", "5"), "but 4 channels"),
    "bias-empty": (of_weights("ConvTranspose", "1,4,3", "0"), "which is empty"),
    "lstm-rank": (of_weights("LSTM", "16,3", "1,16,4"), r"'w0' of shape \[16, 3\]; its rank must be 3"),
    "lstm-input": (of_weights("LSTM<hidden_size = 4>", "3,16,1", "1,16,4"), r"'w0' of shape \[3, 16, 1\]; the operator needs 1 x 16 x 3"),
    "gru-units": (of_weights("GRU<hidden_size = 4>", "1,12,3", "1,12,5"), "the operator needs 1 x 12 x 4"),
    "rnn-bias": (of_weights("RNN<hidden_size = 4>", "1,4,3", "1,4,4", "1,4"), "the operator needs 1 x 8"),
    "gru-empty": (of_weights("GRU", "1,12,3", "1,0,4"), "which is empty"),
    "norm-empty": (of_weights("LayerNormalization", "3", "0"), "'w1' of shape .*empty"),
    "gather-nd": (
        "g (float[2,2] x, int64[1,2] i) => (float[1] y) { y = GatherND<batch_dims = -5>(x, i) }",
        "has batch_dims = -5; it must be 0 to 63",
    ),
    "division-by-0": (
        "g (int64[2] x) => (int64[2] y) <int64[2] z = {3, 0}> { y = Div(x, z) }",
        "divides by 'z'",
    ),
    "modulo-0": (
        "g (int64[2] x) => (int64[2] y) { z = Constant<value = int64 {0}>() y = Mod(x, z) }",
        "divides by 'z'",
    ),
    "input-without-type": ("g (x) => (float[2] y) { y = my.Op(x) }", "input 'x' has no type"),
    "output-without-type": ("g (float[2] x) => (y) { y = my.Op(x) }", "output 'y' has no type"),
    "absurd-input": (
        f"g (float[{2**40},{2**40}] x) => (float[2] y) {{ y = Relu(x) }}",
        "'x' has the impossible shape",
    ),
    "recursion": (
        """g (float[2] x) => (float[2] y) { y = my.f(x) }
        <domain: "my", opset_import: ["": 17, "my": 1]> f (p) => (q) { q = my.h(p) }
        <domain: "my", opset_import: ["": 17, "my": 1]> h (p) => (q) { q = my.f(p) }""",
        "calls itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        from_proto(filled(text), name="m.onnx")

    assert str(caught.value).startswith("m.onnx: ")
    assert "\n" not in str(caught.value)


def name_twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])


def nul(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "a\0b"


def negative_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = -4


def huge_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [2**62, 2**62]


def attribute_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(proto.graph.node[0].attribute[0])


def foreign_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute[0].ref_attr_name = "k"


def binary_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].attribute.append(helper.make_attribute("engine", b"\xff\x00"))


def unknown_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = 99


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (name_twice, "initializer 'w' is defined twice"),
        (nul, r"contains a NUL: 'a\\x00b'"),
        (negative_weight, r"'w' has the impossible shape \[-4"),
        (huge_weight, "'w' has the impossible shape"),
        (attribute_twice, r"'c' \(Conv\) has no operator, or has one attribute twice"),
        (foreign_attribute, "refers to a function's"),
        (binary_attribute, "an attribute of node number 1 of the graph contains .* not UTF-8"),
        (unknown_type, "input 'x' has the data type 99"),
    ],
)
def test_refused_messages(spoil: Callable[[onnx.ModelProto], None], message: str) -> None:
    proto = filled(CONV)
    spoil(proto)

    with pytest.raises(ModelError, match=message):
        from_proto(proto)


@pytest.mark.parametrize("place", ["value", "node", "weight", "input", "key", "domain", "function"])
def test_names_that_are_not_text_are_refused(place: str, tmp_path) -> None:
    """The bytes stand in the file; protobuf would not let anybody write them."""
    proto = filled(CONV)
    proto.graph.node[0].name = "node"
    proto.metadata_props.add(key="key", value="v")
    function = onnx.parser.parse_function(
        '<domain: "domain", opset_import: ["": 17]> function (value) => (q) { q = Relu(value) }'
    )
    proto.functions.append(function)
    old, new = {
        "value": (b"\x0a\x01c", b"\x0a\x01\xff"),
        "node": (b"\x1a\x04node", b"\x1a\x04nod\xff"),
        "weight": (b"\x42\x01w", b"\x42\x01\xe9"),
        "input": (b"\x0a\x01x\x12", b"\x0a\x01\xb0\x12"),
        "key": (b"\x0a\x03key", b"\x0a\x03k\xe9y"),
        "domain": (b"domain", b"\xd6\xd0main"),
        "function": (b"function", b"functi\xd6\xd0"),
    }[place]
    data = proto.SerializeToString()
    assert old in data
    path = tmp_path / "m.onnx"
    path.write_bytes(data.replace(old, new))

    with pytest.raises(ModelError, match="not UTF-8"):
        load_model(path)


@pytest.mark.parametrize("name", EXPORTED)
def test_what_exporters_write_is_let_through(name: str) -> None:
    validate(exported(name), name)


def test_lengths_below_0_are_unknown() -> None:
    proto = filled(CONV)
    for size in (proto.graph.input[0].type.tensor_type.shape.dim[0],):
        size.dim_value = -1
    x = {"x": np.random.default_rng(0).normal(size=(3, 3, 6, 6)).astype(np.float32)}

    model = from_proto(proto)

    assert list(model.graph.inputs[0].shape) == [None, 3, 6, 6]
    assert not prepare(model).to_proto().graph.input[0].type.tensor_type.shape.dim[0].dim_value
    assert run_ort(prepare(model).to_proto(), x)[0].shape == (3, 4, 4, 4)


def test_an_output_without_a_type_gets_the_one_that_is_inferred() -> None:
    proto = filled(CONV)
    proto.graph.output[0].ClearField("type")

    model = from_proto(proto)

    assert model.graph.outputs[0].dtype == np.float32
    assert not proto.graph.output[0].HasField("type")


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "INT4", "STRING"])
def test_types_that_are_not_computed_with_stay(kind: str) -> None:
    """Beside the network that is quantized there may be anything."""
    number = getattr(TensorProto, kind)
    values = [b"a", b"b"] if kind == "STRING" else [1, 0]
    proto = filled(CONV)
    proto.graph.node.append(helper.make_node("Identity", ["k"], ["z"]))
    proto.graph.initializer.append(helper.make_tensor("k", number, [2], values))
    proto.graph.output.append(helper.make_tensor_value_info("z", number, [2]))
    proto.opset_import[0].version, proto.ir_version = 21, 10

    result = prepare(from_proto(proto)).to_proto()

    stored = {t.name: t for t in result.graph.initializer}["k"]
    assert (stored.data_type, list(stored.dims)) == (number, [2])
    assert [n.op_type for n in result.graph.node] == ["Conv", "Relu", "Identity"]


def test_very_long_chains_and_wide_graphs() -> None:
    count = 5000  # a recursion ends at 1,000
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    x = helper.make_tensor_value_info("t0", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info(f"t{count}", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes[::-1], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17)]
    proto = helper.make_model(graph, ir_version=8, opset_imports=opsets)

    validate(proto, "m")  # without recursion, whatever the order of the file
    proto.graph.node[0].input[0] = f"t{count}"
    with pytest.raises(ModelError, match="cycle"):
        validate(proto, "m")
