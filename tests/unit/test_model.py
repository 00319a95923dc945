from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxqat.model
from onnxqat.errors import ModelError, OnnxQatError
from onnxqat.model import constant, from_proto, load_model
from onnxqat.preserve import stored_tensors
from onnxqat.validate import checks
from tests.oracles import run_ort

HEADER = '<ir_version: 8, opset_import: ["": 17]>'
SMALL = HEADER + "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"


def parse(text: str = SMALL) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def assert_same(found: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    """Equal up to the order of initializers and of value_info, at any depth."""
    copies = []
    for proto in (found, expected):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        _sort(copy.graph)
        copies.append(copy)

    assert copies[0] == copies[1]


def _sort(graph: onnx.GraphProto) -> None:
    for field in (graph.initializer, graph.value_info):
        field.sort(key=lambda message: message.name)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _sort(attribute.g)


def documented() -> onnx.ModelProto:
    proto = parse(
        HEADER + "g (float[N,2] x) => (float[N,2] y)"
        "<float[2] w = {1,2}, float[N,2] a, float[2] u = {3,4}>"
        "{ a = Add(x, w) y = Relu(a) }"
    )
    proto.producer_name, proto.producer_version, proto.domain = "exporter", "1.2", "org"
    proto.model_version, proto.doc_string = 7, "a model"
    for target in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer):
        target.metadata_props.add(key="key", value="value")
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    for index, target in enumerate(
        (proto.graph, *proto.graph.node, *proto.graph.initializer, *values)
    ):
        target.doc_string = f"text {index}"
    for value in values:
        value.metadata_props.add(key="key", value="value")
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    annotation = proto.graph.quantization_annotation.add(tensor_name="a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="u")
    return proto


ROUND_TRIPS = {
    "small": SMALL,
    "no-names-no-shapes": HEADER
    + "g (float x) => (float y) { a, b = Split<axis=0>(x) y = Max(a, b) }",
    "optional-inputs": HEADER
    + "g (float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] s = {1,1,2,2}> "
    '{ y = Resize<mode="nearest">(x, , s) }',
    "unused-initializer": HEADER
    + "g (float[2] x) => (float[2] y) <float[2] w = {1,2}, int64[1] e = {3}> { y = Relu(x) }",
    "initializers-as-inputs": HEADER + "g (float[2] w, float[2] x, float[2] u) => (float[2] y)"
    "<float[2] w = {1,2}, float[2] u = {3,4}>"
    "{ y = Add(x, w) }",
    "initializer-as-output": HEADER
    + "g (float[2] x) => (float[2] x, float[2] w) <float[2] w = {1,2}> { }",
    "one-output-twice": HEADER + "g (float[2] x) => (float[2] y, float[2] y) { y = Relu(x) }",
    "if": HEADER
    + """g (float[2] x, bool t) => (float[2] y)
    <float[2] w = {1,2}, float[2] only = {3,4}, float[2] a> {
        a = Add(x, w)
        y = If (t) <
            then_branch = p () => (float[2] u) { i = Add(a, w) u = Add(i, only) },
            else_branch = q () => (float[2] v) <float[2] own = {5,6}, float[2] j>
                { j = Mul(a, only) v = Add(j, own) }>
    }""",
    "loop": HEADER
    + """g (float[2] x, bool t) => (float[2] y) <int64 n = {3}, float[2] w = {1,2}> {
        y = Loop (n, t, x) <body = b (int64 i, bool c, float[2] z) => (bool d, float[2] e)
            { d = Identity(c) e = Mul(z, w) }>
    }""",
    "nested": HEADER
    + """g (float[2] x, bool t) => (float[2] y) <float[2] w = {1,2}> {
        y = If (t) <
            then_branch = p () => (float[2] u) <float[2] middle = {3,4}> {
                k = Add(x, middle)
                u = If (t) <
                    then_branch = r () => (float[2] l) { l = Add(k, w) },
                    else_branch = s () => (float[2] m) { m = Mul(x, middle) }> },
            else_branch = q () => (float[2] v) { v = Exp(x) }>
    }""",
    "functions": """<ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[2] x) => (float[2] y) { y = my.act<slope = 0.5>(x) }
        <domain: "my", opset_import: ["": 17]>
        act <slope> (p) => (q) {
            c = Constant<value = float {2}>()
            r = Mul(p, c)
            q = LeakyRelu<alpha : float = @slope>(r)
        }""",
    "sequence": HEADER + "g (float[2] x) => (seq(float[2]) s, float[2] y) "
    "{ s = SequenceConstruct(x, x) i = Constant<value = int64 {0}>() y = SequenceAt(s, i) }",
}


@pytest.mark.parametrize("text", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip(text: str, tmp_path: Path) -> None:
    proto = parse(text)
    source = proto.SerializeToString(deterministic=True)
    model = from_proto(proto)

    assert_same(model.to_proto(), proto)
    assert_same(model.copy().to_proto(), proto)
    model.save(tmp_path / "m.onnx")
    assert_same(onnx.load(tmp_path / "m.onnx"), proto)
    assert proto.SerializeToString(deterministic=True) == source


def test_round_trip_of_everything_beside_the_graph() -> None:
    proto = documented()

    assert_same(from_proto(proto).to_proto(), proto)
    assert_same(from_proto(proto).copy().to_proto(), proto)
    assert_same(from_proto(from_proto(proto).to_proto()).to_proto(), proto)


def test_documentation_in_subgraphs_and_functions() -> None:
    proto = parse(ROUND_TRIPS["if"])
    branch = proto.graph.node[1].attribute[0].g
    branch.doc_string, branch.node[0].doc_string = "a branch", "a node"
    functions = parse(ROUND_TRIPS["functions"])
    functions.functions[0].doc_string = "a function"
    functions.functions[0].node[1].doc_string = "a node"
    functions.functions[0].metadata_props.add(key="key", value="value")

    assert_same(from_proto(proto).to_proto(), proto)
    assert_same(from_proto(functions).to_proto(), functions)


@pytest.mark.parametrize("dtype", ["BFLOAT16", "FLOAT16", "INT4", "FLOAT8E4M3FN", "BOOL", "STRING"])
def test_round_trip_of_rare_types(dtype: str) -> None:
    kind = getattr(TensorProto, dtype)
    value = [b"a", b"b"] if dtype == "STRING" else [1, 0]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", kind, [2])],
        [helper.make_tensor("w", kind, [2], value)],
    )
    opsets = [helper.make_opsetid("", 21)]
    proto = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    proto.ClearField("producer_name")

    assert_same(from_proto(proto).copy().to_proto(), proto)


def test_sparse_initializers() -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [3.0])
    indices = helper.make_tensor("", TensorProto.INT64, [1], [1])
    unread = helper.make_tensor("u", TensorProto.FLOAT, [1], [4.0])
    proto = parse(HEADER + "g (float[2] x) => (float[2] y) { y = Add(x, w) }")
    for tensor in (values, unread):
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [2]))

    assert_same(from_proto(proto).to_proto(), proto)


def test_a_copy_can_be_changed_without_changing_the_original() -> None:
    proto = parse(ROUND_TRIPS["if"])
    model = from_proto(proto)
    copy = model.copy()

    weight = copy.graph.tensors()["w"]
    weight.values = weight.values * 2
    copy.graph.nodes[0].domain = "my"
    copy.graph.outputs[0].name = "z"
    copy.metadata["key"] = "value"
    changed = copy.to_proto()

    assert_same(model.to_proto(), proto)
    assert [o.domain for o in changed.opset_import] == ["", "my"]


def test_a_subgraph_reads_what_became_of_an_outer_weight() -> None:
    copy = from_proto(parse(ROUND_TRIPS["loop"])).copy()
    inner = next(copy.graph.subgraphs()).nodes[1].inputs[1]
    inner.values = np.float32([10, 10])

    result = copy.to_proto()

    feeds = {"x": np.float32([1, 1]), "t": np.array(True)}
    assert np.array_equal(run_ort(result, feeds)[0], [1000, 1000])
    assert [t.name for t in result.graph.initializer] == ["n", "w"]


def test_a_node_with_other_outputs_keeps_its_documentation_by_name() -> None:
    proto = parse(HEADER + "g (float[2] x) => (float[2] y) { a = Exp(x) y = Relu(a) }")
    for node, name in zip(proto.graph.node, ("first", "second"), strict=True):
        node.name = node.doc_string = name
    model = from_proto(proto)
    first, second = model.graph.nodes
    second.outputs.clear()
    second.inputs.clear()
    model.graph.nodes = [first]
    first.outputs[0] = model.graph.outputs[0]

    assert [node.doc_string for node in model.to_proto().graph.node] == ["first"]


def test_constants_keep_the_shape_of_scalars() -> None:
    assert constant("c", np.array(1.0)).shape == ()
    assert constant("c", np.ones((2, 3)).T).values.flags.c_contiguous


# refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(SMALL.replace("17", "6"), "opset 6 is not in the range 7 to", id="old-opset"),
        pytest.param(
            SMALL.replace("17", "99"), "opset 99 is not in the range 7 to", id="new-opset"
        ),
        pytest.param(SMALL.replace("8", "99"), "IR version 99 is newer than", id="new-ir"),
        pytest.param(
            SMALL.replace('"": 17', '"my": 1'), "no version of the default", id="no-opset"
        ),
    ],
)
def test_versions_outside_of_the_runtime(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"^m.onnx: .*{message}"):
        from_proto(parse(text), name="m.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x00" * 64], ids=["empty", "text", "zeros"]
)
@pytest.mark.parametrize("suffix", ["onnx", "json", "onnxtxt"])
def test_not_an_onnx_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)

    with pytest.raises(ModelError, match="not an ONNX file"):
        load_model(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.onnx: no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)


def test_attributes_that_would_be_lost_are_refused() -> None:
    typed = parse(HEADER + "g (float[2] x) => (float[2] y) { a = Relu(x) y = Neg(a) }")
    attribute = typed.graph.node[1].attribute.add(name="type", type=onnx.AttributeProto.TYPE_PROTO)
    attribute.tp.tensor_type.elem_type = 1
    empty = parse(HEADER + "g (float[2] x) => (float[2] y) { a = Relu(x) y = Neg(a) }")
    empty.graph.node[1].attribute.add(name="axes", type=onnx.AttributeProto.INTS)

    with pytest.raises(ModelError, match=r"'type' of node 'y' \(Neg\) has the unsupported type"):
        from_proto(typed)
    with pytest.raises(ModelError, match=r"'axes' of node 'y' \(Neg\) is an empty list"):
        from_proto(empty)


def test_values_that_are_neither_tensors_nor_sequences_are_refused() -> None:
    proto = parse()
    elem = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    proto.graph.input.append(helper.make_value_info("o", helper.make_optional_type_proto(elem)))

    with pytest.raises(ModelError, match="'o' has the unsupported type 'optional_type'"):
        from_proto(proto)


def test_subgraphs_that_nest_too_deep_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = parse(ROUND_TRIPS["nested"])
    monkeypatch.setattr(checks, "MAX_SUBGRAPH_DEPTH", 1)

    with pytest.raises(ModelError, match="nest deeper than 1 "):
        from_proto(proto)


def storing(place: str, **fields: Any) -> onnx.ModelProto:
    """Return a model that stores a tensor of float[2] at some place, with these fields instead."""
    tensor = onnx.numpy_helper.from_array(np.float32([1, 2]), "w")
    for name, value in fields.items():
        setattr(tensor, name, value)
    if place == "initializer":
        proto = parse(HEADER + "g (float[2] x) => (float[2] y) { y = Add(x, w) }")
        proto.graph.initializer.add().CopyFrom(tensor)
        return proto
    proto = parse(ROUND_TRIPS["nested"])
    branch = next(n for n in proto.graph.node if n.op_type == "If").attribute[0].g
    if place == "branch":
        branch.initializer.add().CopyFrom(tensor)
    else:
        branch.node.add(op_type="Constant", output=["w"]).attribute.append(
            helper.make_attribute("value", tensor)
        )
    return proto


@pytest.mark.parametrize("place", ["initializer", "branch", "constant"])
@pytest.mark.parametrize(
    "fields",
    [{"raw_data": b""}, {"raw_data": b"1234567"}, {"raw_data": b"12345678" * 2}, {"data_type": 99}],
    ids=["none", "odd", "more", "type"],
)
def test_a_tensor_whose_data_is_not_of_its_shape(
    fields: dict[str, Any], place: str, tmp_path: Path
) -> None:
    onnx.save(storing(place), tmp_path / "whole.onnx")
    onnx.save(storing(place, **fields), tmp_path / "m.onnx")

    load_model(tmp_path / "whole.onnx")
    with pytest.raises(ModelError, match=r"m.onnx: tensor 'w' of shape \[2\] .*Export again"):
        load_model(tmp_path / "m.onnx")


# external data


def external(path: Path) -> Path:
    proto = parse()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32([1, 2]), "w"))
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data_is_read_and_becomes_internal(tmp_path: Path) -> None:
    model = load_model(external(tmp_path / "m.onnx"))
    (tmp_path / "weights.bin").unlink()
    model.save(tmp_path / "out.onnx")

    weight = onnx.load(tmp_path / "out.onnx").graph.initializer[0]
    assert weight.data_location == TensorProto.DEFAULT
    assert np.array_equal(numpy_helper.to_array(weight), [1, 2])


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx")
    (tmp_path / "weights.bin").unlink()

    with pytest.raises(ModelError, match=r"'weights\.bin' is missing"):
        load_model(path)


CONSTANT = (
    "g (float[2] x) => (float[2] y) { c = Constant<value = float[2] {1, 2}>() y = Add(x, c) }"
)
BRANCH = """g (float[2] x, bool t) => (float[2] y) {
    y = If (t) <then_branch = p () => (float[2] u) <float[2] w = {1,2}> { u = Add(x, w) },
                else_branch = q () => (float[2] v) { v = Exp(x) }> }"""


@pytest.mark.parametrize(
    "text", [SMALL, HEADER + CONSTANT, HEADER + BRANCH], ids=["top", "node", "if"]
)
@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", ""])
def test_external_data_outside_of_the_folder(text: str, location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    proto = parse(text)
    for tensor in stored_tensors(proto):
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())

    with pytest.raises(ModelError, match="outside of the model's folder"):
        load_model(folder / "m.onnx")


def test_external_data_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder / "m.onnx")
    (folder / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")

    with pytest.raises(ModelError, match="outside of the model's folder"):
        load_model(path)


def large(monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    """Return a model that counts as too large for one file."""
    monkeypatch.setattr(onnxqat.model, "MAX_PROTOBUF_BYTES", 2**24)
    weight = np.arange(1024, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_a_large_model_is_written_with_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = large(monkeypatch)
    from_proto(proto).save(tmp_path / "m.onnx")

    model, data = sorted(p.name for p in tmp_path.iterdir())
    assert model == "m.onnx"
    assert re.fullmatch(r"m\.onnx\.[0-9a-f]{16}\.data", data)
    weight = load_model(tmp_path / "m.onnx").to_proto().graph.initializer[0]
    assert np.array_equal(numpy_helper.to_array(weight), np.arange(1024, dtype=np.float32))


def test_data_of_others_beside_a_large_model_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = large(monkeypatch)
    kept = {"m.onnx.data", "m.onnx.0123456789abcdef.data"}  # of another tool; of a renamed model
    for name in kept:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        from_proto(proto).save(tmp_path / "m.onnx", force=True)
        proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[::-1]

    assert all((tmp_path / name).read_text() == "mine" for name in kept)
    assert len(list(tmp_path.iterdir())) == 4  # the data of the replaced model are gone
    assert load_model(tmp_path / "m.onnx").to_proto().graph.initializer[0].dims == [1024]


# writing


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("mine")

    with pytest.raises(OnnxQatError, match=r"m.onnx: already exists. Pass --force"):
        from_proto(parse()).save(path)
    assert path.read_text() == "mine"
    from_proto(parse()).save(path, force=True)
    assert_same(onnx.load(path), parse())


def test_a_failing_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("mine")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OnnxQatError, match=r"m.onnx: cannot be written \(No space left"):
        from_proto(parse()).save(path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "mine"


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    model = from_proto(parse())

    with pytest.raises(OnnxQatError, match=r"does not exist\. Create it first"):
        model.save(tmp_path / "none" / "m.onnx")
    with pytest.raises(OnnxQatError, match="is a directory"):
        model.save(tmp_path)


def test_a_constant_with_an_empty_list_is_an_empty_tensor(tmp_path):
    """PyTorch's exporter writes it where optimizing is off; Expand to no sizes is the identity."""
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) '
        "{s = Constant<value_ints=[1]>() y = Expand(x, s)}"
    )
    proto = onnx.parser.parse_model(text)
    del proto.graph.node[0].attribute[0].ints[:]
    onnx.save(proto, tmp_path / "model.onnx")
    written = load_model(tmp_path / "model.onnx").to_proto()
    x = np.float32([1, 2])

    np.testing.assert_array_equal(run_ort(written, {"x": x})[0], x)
    assert onnx.load(tmp_path / "model.onnx") == proto
