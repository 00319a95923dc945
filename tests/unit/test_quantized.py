"""Q/DQ files that another tool edited: read as they are meant, or refused by the tensor's name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import ModelError, PlanError
from onnxqat.formats import EXPORTS
from onnxqat.plan import QuantPlan
from onnxqat.quantized import float_part, load_model
from tests.networks import attention, convnet, quantized, samples
from tests.oracles import run_ort

RULES = [("onnxruntime-cpu", ()), ("sophgo-bm1684x", ("weight.bits=4",)), ("qnn-htp-16", ())]


@pytest.fixture(scope="module")
def written():
    """Return a Q/DQ file: per-axis weights, a group, a narrow range, a quantized output."""
    _, qdq = quantized(convnet(), "onnxruntime-cpu", ("tensor:^r2$.bits=6",))
    return qdq.to_proto()


def saved(proto, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


@pytest.mark.parametrize(("rule", "overrides"), RULES)
@pytest.mark.parametrize("network", [convnet, attention])
def test_an_untouched_file_is_written_as_it_was(network, rule, overrides, tmp_path):
    _, qdq = quantized(network(), rule, overrides)
    qdq.save(tmp_path / "a.onnx")
    load_model(tmp_path / "a.onnx").save(tmp_path / "b.onnx")

    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def as_nodes(proto):
    """Return a model whose initializers are Constant nodes, as other tools write them."""
    proto = copy(proto)
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes += list(proto.graph.node)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    return proto


def test_constant_nodes_are_read_as_initializers(written, tmp_path):
    plain = load_model(saved(written, tmp_path))
    edited = load_model(saved(as_nodes(written), tmp_path))
    x = {"input": samples(convnet(), 8)}

    for made in (float_part, EXPORTS["onnxruntime"], lambda model: model):
        expected, found = made(plain).to_proto(), made(edited).to_proto()
        assert not [n for n in found.graph.node if n.op_type == "Constant"]
        np.testing.assert_array_equal(run_ort(found, x)[0], run_ort(expected, x)[0])


def copy(proto):
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


def node(proto, name):
    return next(n for n in proto.graph.node if n.name == name)


def stored(proto, name):
    return next(t for t in proto.graph.initializer if t.name == name)


def put(proto, name, values):
    stored(proto, name).CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def remove(proto, name):
    proto.graph.node.remove(node(proto, name))


def rename(proto, name):
    node(proto, name).name = "other"


def operand(proto, name, index, tensor):
    node(proto, name).input[index] = tensor


def drop(proto, name, count):
    del node(proto, name).input[-count:]


def own(proto, name, index, values):
    """Give one node an initializer of its own in the place of one that it shares."""
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), "own"))
    node(proto, name).input[index] = "own"


def axis(proto, name, value):
    node(proto, name).attribute[0].i = value


def listed(proto, name):
    proto.graph.initializer.remove(stored(proto, name))
    proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def reader(proto, tensor):
    proto.graph.node.append(helper.make_node("Shape", [tensor], ["s"], name="more"))
    proto.graph.output.append(helper.make_tensor_value_info("s", TensorProto.INT64, [4]))


def twice(proto, name):
    proto.graph.node.append(helper.make_node("Neg", ["input"], ["neg"], name=name))


def plan(proto, old, new):
    (entry,) = (p for p in proto.metadata_props if p.key == "onnxqat.plan")
    assert old in entry.value
    entry.value = entry.value.replace(old, new, 1)


S = np.float32
# what was edited, and the tensor that the message names
EDITS = [
    (lambda p: remove(p, "input/QuantizeLinear"), "input"),
    (lambda p: remove(p, "w1/DequantizeLinear"), "w1"),
    (lambda p: remove(p, "r2/Clip"), "r2"),
    (lambda p: rename(p, "c3/QuantizeLinear"), "c3"),
    (lambda p: rename(p, "r2/Clip"), "r2"),
    (lambda p: drop(p, "input/QuantizeLinear", 1), "input"),
    (lambda p: drop(p, "input/DequantizeLinear", 2), "input"),
    (lambda p: drop(p, "r2/Clip", 1), "r2"),
    (lambda p: operand(p, "input/QuantizeLinear", 1, ""), "input"),
    (lambda p: operand(p, "c3/QuantizeLinear", 1, "r1"), "c3"),
    (lambda p: operand(p, "w2/QuantizeLinear", 0, "w3"), "w2"),
    (lambda p: operand(p, "n_c1", 1, "w1"), "w1"),
    (lambda p: operand(p, "n_c1", 2, "b2"), "b1"),
    (lambda p: listed(p, "w1/scale"), "w1"),
    (lambda p: listed(p, "w1"), "w1"),
    (lambda p: listed(p, "b1"), "b1"),
    (lambda p: put(p, "input/scale", S(0)), "input"),
    (lambda p: put(p, "input/scale", S(-1)), "input"),
    (lambda p: put(p, "input/scale", S(np.nan)), "input"),
    (lambda p: put(p, "input/scale", S(np.inf)), "input"),
    (lambda p: put(p, "input/scale", S([1, 2])), "input"),
    (lambda p: put(p, "input/scale", np.float64(1)), "input"),
    (lambda p: put(p, "w1/scale", S([1, 2, 3])), "w1"),
    (lambda p: put(p, "w1/scale", S(1)), "w1"),
    (lambda p: put(p, "input/zero_point", np.int32(0)), "input"),
    (lambda p: put(p, "input/zero_point", S(0)), "input"),
    (lambda p: put(p, "input/zero_point", np.int16(0)), "input"),
    (lambda p: put(p, "r2/zero_point", np.uint8(64)), "r2"),
    (lambda p: put(p, "w1/zero_point", np.int8([0, 0, 1, 0, 0, 0])), "w1"),
    (lambda p: put(p, "w1/zero_point", np.uint8([0] * 6)), "w1"),
    (lambda p: put(p, "onnxqat/uint8/63", np.uint8(31)), "r2"),
    (lambda p: put(p, "onnxqat/uint8/63", np.uint8([63, 63])), "r2"),
    (lambda p: own(p, "input/DequantizeLinear", 1, S(1)), "input"),
    (lambda p: own(p, "r3/QuantizeLinear", 2, np.uint8(9)), "r3"),
    (lambda p: axis(p, "w1/QuantizeLinear", 1), "w1"),
    (lambda p: axis(p, "w1/DequantizeLinear", 2), "w1"),
    (lambda p: reader(p, "c3/quantized"), "c3"),
    (lambda p: reader(p, "c3/dequantized"), "c3"),
    (lambda p: twice(p, "n_c1"), "n_c1"),
    (lambda p: plan(p, '"axis":0', '"axis":7'), "w1"),
    (lambda p: plan(p, '"bits":8', '"bits":9'), "input"),
    (lambda p: plan(p, '"bits":8', '"bits":7'), "input"),
    (lambda p: plan(p, '"node":"n_c1"', '"node":"n_c9"'), "input"),
    (lambda p: plan(p, '"tensor":"input"', '"tensor":"none"'), "none"),
    (lambda p: plan(p, '"derived_from":["input"', '"derived_from":["none"'), "b1"),
    (lambda p: plan(p, '"derived_from":["input"', '"derived_from":["w2"'), "b1"),
    (lambda p: plan(p, '{"rule"', '{"rules"'), "plan"),
    (lambda p: plan(p, '"points":[', '"points":[['), "plan"),
    (lambda p: plan(p, '"chains":[["n_c1"', '"chains":[["n_c9"'), "n_c9"),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_an_edited_file_is_refused_by_the_name_of_the_tensor(written, number, tmp_path):
    edit, name = EDITS[number]
    proto = copy(written)
    edit(proto)
    with pytest.raises((ModelError, PlanError)) as error:
        load_model(saved(proto, tmp_path))
    text = str(error.value)

    assert name in text
    assert "\n" not in text
    assert "nsert" in text or "Export " in text  # the next step


def test_scales_and_weights_are_those_of_the_nodes(written, tmp_path):
    proto = copy(written)
    put(proto, "input/scale", S(0.5))
    put(proto, "input/zero_point", np.uint8(7))
    put(proto, "w3", np.full((6, 6, 1, 1), 0.25, S))
    model = load_model(saved(proto, tmp_path))
    params = model.params["input"]

    assert (float(params.scale), int(params.zero_point)) == (0.5, 7)
    assert np.all(model.floats.graph.tensors()["w3"].values == 0.25)


def test_a_plan_that_is_not_text_is_refused(written, tmp_path):
    path = saved(written, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"role":"weight"', b'"role":"w\xffight"'))

    assert path.read_bytes() != data
    with pytest.raises(ModelError, match="not UTF-8"):
        load_model(path)
    with pytest.raises(PlanError, match="cannot be read"):
        QuantPlan.from_json("\udcff")
