from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.deploy import deployed_model
from onnxqat.errors import ModelError
from onnxqat.evaluation import evaluate
from onnxqat.model import Model, from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.preparation.float16 import FLOAT16_KEY, narrow_to_float16, refuse_other_floats
from onnxqat.qparams import quantize
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import convnet, samples
from tests.oracles import max_ulp, run_ort

HALF = TensorProto.FLOAT16


def in_halves(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a network with float16 weights, inputs and outputs."""
    halves = onnx.ModelProto()
    halves.CopyFrom(proto)
    for tensor in halves.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*halves.graph.input, *halves.graph.output):
        value.type.tensor_type.elem_type = HALF
    return halves


def mixed() -> onnx.ModelProto:
    """Return float32 in and out, a float16 Conv, and a Softmax in float32 between two Casts."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 3, 3, 3)).astype(np.float16)
    v = rng.normal(size=(5, 4, 1, 1)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["xh"], to=HALF),
        helper.make_node("Conv", ["xh", "w"], ["c"]),
        helper.make_node("Cast", ["c"], ["cf"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["cf"], ["s"], axis=1),
        helper.make_node("Mul", ["s", "two"], ["m"]),
        helper.make_node("Cast", ["m"], ["mh"], to=HALF),
        helper.make_node("Conv", ["mh", "v"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5, 6, 6])],
        [
            numpy_helper.from_array(w, "w"),
            numpy_helper.from_array(v, "v"),
            numpy_helper.from_array(np.float32(2), "two"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def calibrated(prepared: Model, batch: np.ndarray) -> Model:
    plan = make_plan(prepared.graph, load_rule("sophgo-bm1690"))
    params = placeholder_params(prepared, plan)
    name = prepared.graph.inputs[0].name
    return calibrate(insert_pairs(prepared, plan, params, state="uncalibrated"), [{name: batch}])


def test_the_widened_model_computes_what_the_float16_model_does() -> None:
    source = in_halves(convnet())
    prepared = prepare(from_proto(source))
    widened = prepared.to_proto()

    onnx.checker.check_model(widened, full_check=True)
    kinds = {t.data_type for t in widened.graph.initializer}
    kinds |= {v.type.tensor_type.elem_type for v in (*widened.graph.input, *widened.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    x = samples(convnet(), 8).astype(np.float16)
    expected = run_ort(source, {"input": x})[0]
    found = run_ort(widened, {"input": x.astype(np.float32)})[0]
    step = np.spacing(np.abs(expected).max())  # of float16, at the largest output
    assert np.abs(found - expected.astype(np.float32)).max() <= float(step)


def test_float16_comes_back_exactly() -> None:
    source = in_halves(convnet())
    prepared = prepare(from_proto(source))

    narrowed = narrow_to_float16(prepared, prepared.metadata[FLOAT16_KEY]).to_proto()

    x = samples(convnet(), 8).astype(np.float16)
    assert max_ulp(run_ort(narrowed, {"input": x})[0], run_ort(source, {"input": x})[0]) == 0
    weights = {t.name: numpy_helper.to_array(t) for t in narrowed.graph.initializer}
    for tensor in source.graph.initializer:
        assert np.array_equal(weights[tensor.name], numpy_helper.to_array(tensor))
        assert weights[tensor.name].dtype == np.float16


def test_a_mixed_model_is_mixed_again() -> None:
    source = mixed()
    prepared = prepare(from_proto(source))
    x = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}

    narrowed = narrow_to_float16(prepared, prepared.metadata[FLOAT16_KEY]).to_proto()

    assert [n.op for n in prepared.graph.nodes] == ["Conv", "Softmax", "Mul", "Conv"]
    onnx.checker.check_model(narrowed, full_check=True)
    assert [n.op_type for n in narrowed.graph.node] == [
        *("Cast", "Conv", "Cast", "Softmax", "Mul"),
        *("Cast", "Conv", "Cast"),
    ]
    assert np.array_equal(run_ort(narrowed, x)[0], run_ort(source, x)[0])
    assert narrowed.graph.output[0].name == "y"


def test_strip_gives_a_float16_model_with_the_weights_on_the_grid() -> None:
    source = in_halves(convnet())
    batch = samples(convnet(), 16)
    model = calibrated(prepare(from_proto(source)), batch)

    deployed = deployed_model(model, weights="snapped")

    proto = deployed.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.metadata_props
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float16)"
    params, tensors = model.params, deployed.graph.tensors()
    again = deployed_model(model, weights="tuned").to_proto()
    tuned = {t.name: numpy_helper.to_array(t) for t in again.graph.initializer}
    for point in model.plan.grid_points():
        if point.role == "weight":
            stored = tensors[point.tensor].values
            assert stored.dtype == tuned[point.tensor].dtype == np.float16
            args = params[point.parameters], point.spec
            expected = quantize(tuned[point.tensor].astype(np.float32), *args)
            assert np.array_equal(quantize(stored.astype(np.float32), *args), expected)


@pytest.mark.parametrize("kind", ["DOUBLE", "BFLOAT16"])
def test_other_floats_are_refused_by_name(kind: str) -> None:
    dtype = getattr(TensorProto, kind)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["N", 2])],
        [helper.make_tensor_value_info("y", dtype, ["N", 2])],
        [helper.make_tensor("w", dtype, [2, 2], [1, 2, 3, 4])],
    )
    opsets = [helper.make_opsetid("", 17)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)

    with pytest.raises(ModelError, match=r"m: weight 'w' of node 'fc' is (float64|bfloat16)\."):
        refuse_other_floats(prepare(from_proto(proto)).graph, "m")


def test_float16_beside_subgraphs_is_refused() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float16[2] x, bool t) => (float16[2] y) {
            y = If (t) <then_branch = p () => (float16[2] u) { u = Neg(x) },
                        else_branch = q () => (float16[2] v) { v = Exp(x) }> }"""
    )

    with pytest.raises(ModelError, match="m: is float16 and contains If"):
        prepare(from_proto(proto, name="m"))


def test_the_original_is_a_reference_for_what_was_made_of_it():
    halves = from_proto(in_halves(convnet()))
    floats = prepare(halves)
    x = samples(convnet(), 8)
    found = evaluate(floats, [SimpleNamespace(inputs={"input": x}, labels=None)], against=halves)
    (original,) = run_ort(halves.to_proto(), {"input": x.astype(np.float16)})
    (widened,) = run_ort(floats.to_proto(), {"input": x})

    expected = np.abs(widened.astype(np.float64) - original).max()
    ulp = np.spacing(np.abs(widened).max())  # other threads add in another order
    assert abs(found.max_abs_diff - expected) <= 2 * ulp
