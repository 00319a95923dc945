"""Names that exporters and people write: each table holds them, or says at once that it cannot."""

from __future__ import annotations

import json
import struct

import onnx
import pytest
from click.testing import CliRunner
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from onnxqat.cli import main
from onnxqat.deploy import name_problems, write_deployment
from onnxqat.errors import FormatError
from onnxqat.formats import FORMATS, Calibrated, Table
from tests.networks import _Graph, convnet
from tests.random_params import with_random_params

RULES = {
    "amct": "ascend", "axera": "axera-ax650", "cambricon": "cambricon-mlu",
    "horizon": "horizon-bayes", "mindspore": "mindspore", "mnn": "sophgo-cv183x", "ncnn": "ncnn",
    "onnxqat": "tflite", "onnxruntime-calibration": "tensorrt", "qnn": "qnn-htp",
    "qnn-1.0.0": "qnn-htp", "rockchip": "rockchip-rk3588", "sophgo": "sophgo-bm1684x",
    "tengine": "axera-ax650", "tensorrt": "tensorrt",
}  # fmt: skip
ODD = ["a b", "a:b", "a: b", "a\tb", "a\nb", "a\r\nb", "a,b", "a'b", 'a"b', "a\\b", "a%sb", "a;b",
       "卷积", "naïve", "#a", "{a}", "a=b", "a/b.c::d", "a\u00a0b", "a\u2028b", "\ufeffa", "a\x7fb",
       "a\x1b[31mb", "x" * 300, "\U0001f600", "a_param_0", "-1", "1e3"]  # fmt: skip
# Which of them the readers of lines cannot take, by what their documentation says.
WHITE = {n for n in ODD if n.split() != [n]} | {"a\x7fb", "a\x1b[31mb"}
REFUSED = {
    "ncnn": WHITE | {"x" * 300, "a_param_0"},
    "onnxruntime-calibration": WHITE,
    "sophgo": WHITE | {"#a"},
    "tengine": WHITE,
    "tensorrt": {"a: b", "a\nb", "a\r\nb"},
}


def tiny() -> onnx.ModelProto:
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 3, 3, 1, 1), g.weight("b1", 3)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 2, 3, 1, 1)], "output")
    return g.model(["N", 3, 2, 2], ["N", 2, 2, 2])


def renamed(proto: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """Put a prefix before every name of a tensor and a node."""
    for values in (proto.graph.initializer, proto.graph.input, proto.graph.output):
        for value in values:
            value.name = prefix + value.name
    for node in proto.graph.node:
        node.name = prefix + node.name
        node.input[:] = [prefix + name for name in node.input]
        node.output[:] = [prefix + name for name in node.output]
    return proto


@pytest.mark.parametrize("table", FORMATS)
def test_a_name_comes_back_or_is_refused_before_there_are_parameters(table):
    for name in ODD:
        floats, plan, model = with_random_params(renamed(tiny(), name), RULES[table])
        problems = name_problems(floats, plan, table)
        assert bool(problems) == (name in REFUSED.get(table, ())), (name, problems)
        if problems:
            with pytest.raises(FormatError) as raised:
                FORMATS[table].write(Calibrated(model))
            assert repr(name)[1:-1] in str(raised.value)
            continue
        written = FORMATS[table].write(Calibrated(model)).files["table"]
        data = written if isinstance(written, bytes) else written.encode()
        found = FORMATS[table].read(Table(name="t", data=data), floats.graph, plan)
        trained = model.params
        activations = {p.parameters for p in plan.grid_points() if p.role == "activation"}
        assert activations & found.params.keys()
        assert found.unused == []
        for key in activations & found.params.keys():
            assert found.params[key].same_as(trained[key]), (name, key)


LINES = {
    "ncnn": lambda line: [float(x) for x in line.split()[1:]],
    "tengine": lambda line: [*map(float, line.split()[1:])],
    "sophgo": lambda line: [*map(float, line.split()[1:])],
    "tensorrt": lambda line: struct.unpack("!f", bytes.fromhex(line.split(": ")[1])),
}
HEADERS = {"sophgo": ("# ", "#int4_th", "#weight_scale"), "tensorrt": ("TRT-",)}


@pytest.mark.parametrize("table", LINES)
def test_lines_with_odd_names_read_as_their_documentation_says(table):
    for name in set(ODD) - REFUSED[table]:
        _, _, model = with_random_params(renamed(tiny(), name), RULES[table])
        text = FORMATS[table].write(Calibrated(model)).files["table"]
        lines = [x for x in text.split("\n")[:-1] if not x.startswith(HEADERS.get(table, "\n"))]
        assert len(lines) >= 2
        for line in lines:
            assert line.startswith(name)
            assert len(LINES[table](line)) >= 1


def record_class():
    """The message of a record file, as far as its documentation has it."""
    file = descriptor_pb2.FileDescriptorProto(name="record.proto", package="amct", syntax="proto2")
    value = file.message_type.add(name="Value")
    for i, (name, kind, label) in enumerate(
        (("scale_d", 2, 1), ("offset_d", 5, 1), ("scale_w", 2, 3), ("offset_w", 5, 3)), 1
    ):
        value.field.add(name=name, number=i, type=kind, label=label)
    record = file.message_type.add(name="Record")
    record.field.add(name="key", number=1, type=9, label=1)
    record.field.add(name="value", number=2, type=11, label=1, type_name=".amct.Value")
    whole = file.message_type.add(name="Records")
    whole.field.add(name="record", number=1, type=11, label=3, type_name=".amct.Record")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("amct.Records"))


def test_protobuf_reads_the_names_of_a_record_file():
    kind = record_class()
    for name in ODD:
        _, _, model = with_random_params(renamed(tiny(), name), RULES["amct"])
        text = FORMATS["amct"].write(Calibrated(model)).files["table"]
        keys = [record.key for record in text_format.Parse(text, kind()).record]

        assert f"{name}n_c1" in keys


@pytest.mark.parametrize("key", ["naïve", r"na\303\257ve", r"\156a\xc3\xafve"])
def test_a_record_file_may_hold_utf8_or_escapes(key):
    proto = convnet()
    proto.graph.node[0].name = "naïve"
    floats, plan, model = with_random_params(proto, "ascend")
    text = FORMATS["amct"].write(Calibrated(model)).files["table"]
    again = text.replace(r"na\303\257ve", key)
    found = FORMATS["amct"].read(Table(name="t", data=again.encode()), floats.graph, plan)

    assert found.params["w1"].same_as(model.params["w1"])


def test_two_tensors_under_one_key_are_refused():
    """Sophgo's compiler has graph inputs bare, and the others with their op behind."""
    proto = convnet()
    proto.graph.input[0].name = "r1_Relu"
    proto.graph.node[0].input[0] = "r1_Relu"
    floats, plan, model = with_random_params(proto, "sophgo-bm1684x")

    assert name_problems(floats, plan, "sophgo") == ["'r1_Relu' would be the name of two tensors"]
    with pytest.raises(FormatError, match="'r1_Relu' would be the name of two tensors"):
        FORMATS["sophgo"].write(Calibrated(model))


def module_called_twice() -> onnx.ModelProto:
    g = _Graph(0)
    weight, pads = g.weight("conv.weight", 3, 3, 3, 3), {"pads": [1, 1, 1, 1]}
    g.node("Conv", ["input", weight], "c1", **pads)
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", weight], "c2", **pads)
    g.node("Conv", ["input", g.weight("other.weight", 3, 3, 1, 1)], "c3")
    g.node("Conv", ["c3", g.weight("last.weight", 3, 3, 1, 1)], "c4")
    g.node("Add", ["c2", "c4"], "output")
    return g.model(["N", 3, 8, 8], ["N", 3, 8, 8])


def test_calls_of_one_module_with_two_inputs_go_by_their_nodes(tmp_path):
    _, _, model = with_random_params(module_called_twice(), "cambricon-mlu")
    state = json.loads(write_deployment(model, tmp_path).files["table"].read_text())
    params = model.params
    weight = 1 / float(params["conv.weight"].scale)

    assert state["n_c1.scale"] == [1 / float(params["input"].scale), weight]
    assert state["n_c2.scale"] == [1 / float(params["r1"].scale), weight]
    assert "other.scale" in state
    assert "conv.scale" not in state


def test_calls_of_one_module_on_one_input_go_by_the_module(tmp_path):
    proto = module_called_twice()
    proto.graph.node[2].input[0] = "input"
    _, _, model = with_random_params(proto, "cambricon-mlu")
    state = json.loads(write_deployment(model, tmp_path).files["table"].read_text())

    assert "conv.scale" in state
    assert "n_c1.scale" not in state


def test_insert_refuses_what_strip_could_not_write(tmp_path):
    source, target = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(renamed(tiny(), "my "), source)
    words = ["insert", str(source), "--rules", "sophgo-bm1684x", "-o", str(target)]

    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert "'my r1_Relu' has white space" in refused.output
    assert not target.exists()
    assert CliRunner().invoke(main, [*words, "--format", "onnxqat"]).exit_code == 0
    checked = CliRunner().invoke(main, ["check", str(source), "--rules", "sophgo-bm1684x"])
    assert checked.exit_code == 1
    assert "name  'my r1_Relu' has white space" in checked.output
    assert "The table 'sophgo' cannot hold" in checked.output
