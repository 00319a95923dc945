from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxqat.errors import ModelError
from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from tests.oracles import run_ort

ACT = """<domain: "my", opset_import: ["": 17, "my": 1]>
    act <slope: float = 0.25> (p) => (q) {
        c = Constant<value = float {2}>()
        r = Mul(p, c)
        q = LeakyRelu<alpha : float = @slope>(r)
    }"""
OUTER = """<domain: "my", opset_import: ["": 17, "my": 1]>
    outer <steep> (p) => (q) { r = my.act(p) q = my.act<slope : float = @steep>(r) }"""
BRANCH = """y = If (t) <then_branch = p () => (float[2] u) { u = my.act<slope = 0.5>(a) },
                else_branch = q () => (float[2] v) { v = Exp(a) }>"""


def model(body: str, *functions: str, opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}, "my": 1]>
        g (float[2] x, bool t) => (float[2] y) {{ {body} }} {"".join(functions)}"""
    )


def act(x: np.ndarray, slope: float = 0.25) -> np.ndarray:
    return np.where(x >= 0, 2 * x, np.float32(slope) * (2 * x))


@pytest.mark.parametrize(
    ("body", "functions", "nodes", "expected"),
    [
        pytest.param("a = my.act(x) y = my.act(a)", [ACT], 4, lambda x: act(act(x)), id="twice"),
        pytest.param("y = my.act<slope = 0.5>(x)", [ACT], 2, lambda x: act(x, 0.5), id="attribute"),
        pytest.param(
            "y = my.outer<steep = 0.1>(x)", [OUTER, ACT], 4, lambda x: act(act(x), 0.1), id="nested"
        ),
        pytest.param(
            "a = my.act(x)" + BRANCH, [ACT], 3, lambda x: act(act(x), 0.5), id="in-a-branch"
        ),
        pytest.param("y = Neg(x)", [ACT], 1, np.negative, id="not-called"),
    ],
)
def test_functions_are_inlined(body, functions, nodes, expected) -> None:
    proto = model(body, *functions)

    result = prepare(from_proto(proto)).to_proto()

    onnx.checker.check_model(result, full_check=True)
    assert not result.functions
    names = [output for node in result.graph.node for output in node.output]
    assert len(set(names)) == len(names) == nodes
    assert len({node.name for node in result.graph.node}) == nodes
    feeds = {"x": np.float32([1, -2]), "t": np.array(True)}
    assert np.array_equal(run_ort(result, feeds)[0], expected(feeds["x"]))
    assert np.array_equal(run_ort(proto, feeds)[0], expected(feeds["x"]))


def test_everything_else_is_kept() -> None:
    proto = model("a = my.act(x) y = Relu(a)", ACT)
    proto.metadata_props.add(key="license", value="MIT")
    proto.doc_string = "a model"
    proto.graph.node[1].name = proto.graph.node[1].doc_string = "the end"
    proto.functions[0].node[1].metadata_props.add(key="scope", value="layer1")
    model_ = from_proto(proto)
    before = model_.to_proto().SerializeToString(deterministic=True)

    result = prepare(model_).to_proto()

    assert model_.to_proto().SerializeToString(deterministic=True) == before
    assert [(p.key, p.value) for p in result.metadata_props] == [("license", "MIT")]
    assert result.doc_string == "a model"
    assert [n.doc_string for n in result.graph.node] == ["", "", "the end"]
    assert [p.value for p in result.graph.node[0].metadata_props] == ["layer1"]
    assert [v.name for v in (*result.graph.input, *result.graph.output)] == ["x", "t", "y"]


def test_a_function_of_another_opset_is_inlined_where_that_means_the_same() -> None:
    proto = model("y = my.act(x)", ACT.replace("17", "13"))
    x = {"x": np.float32([1, -2]), "t": np.array(True)}

    result = prepare(from_proto(proto)).to_proto()

    assert result.opset_import[0].version == 17
    assert np.array_equal(run_ort(result, x)[0], act(x["x"]))
    softmax = """<domain: "my", opset_import: ["": 11]> soft (p) => (q) { q = Softmax(p) }"""
    with pytest.raises(
        ModelError,
        match=r"function 'my\.soft' has opset 11, but the model 17, and its Softmax differ",
    ):
        prepare(from_proto(model("y = my.soft(x)", softmax)))


def test_functions_that_call_each_other_are_refused() -> None:
    one = """<domain: "my", opset_import: ["": 17, "my": 1]> one (p) => (q) { q = my.two(p) }"""
    two = one.replace("two", "three").replace("one", "two").replace("three", "one")

    with pytest.raises(ModelError, match=r"m: function 'my\.(one|two)' calls itself"):
        prepare(from_proto(model("y = my.one(x)", one, two), name="m"))


def test_calls_that_multiply_beyond_all_measure_are_refused() -> None:
    functions = ['<domain: "my", opset_import: ["": 17]> f0 (p) => (q) { q = Neg(p) }']
    functions += [
        f"""<domain: "my", opset_import: ["": 17, "my": 1]>
        f{i} (p) => (q) {{ r = my.f{i - 1}(p) q = my.f{i - 1}(r) }}"""
        for i in range(1, 64)
    ]

    with pytest.raises(ModelError, match=f"would make {2**63} nodes"):
        prepare(from_proto(model("y = my.f63(x)", *functions)))
