"""Models that onnxruntime has fused: what its own ops write has a type, and so has what follows."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import TrainingError
from onnxqat.evaluation.run import model_session
from onnxqat.model import Model, from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.train.form import training_form
from tests import networks
from tests.oracles import run_ort, sqnr_db

FUSED = {
    "convnet": "FusedConv",
    "attention": "SkipLayerNormalization",
    "upsampling": "FusedConv",
    "answering": None,  # nothing in it is fused on a CPU
}


def fused(network: onnx.ModelProto, path) -> Model:
    """Return a model as onnxruntime saves it after its fusions, prepared."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return prepare(from_proto(onnx.load(path)))


@pytest.mark.parametrize("name", FUSED)
def test_every_value_has_the_type_that_the_runtime_computes(name, tmp_path):
    network = getattr(networks, name)()
    model = fused(network, tmp_path / "fused.onnx")
    proto = model.to_proto()
    names = [n for node in proto.graph.node for n in node.output if n]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    found = dict(zip(names, run_ort(proto, {"input": networks.samples(network, 2)}), strict=True))
    tensors = model.graph.tensors()

    assert FUSED[name] in {n.op for n in model.graph.nodes} | {None}
    assert {n: tensors[n].dtype for n in names} == {n: found[n].dtype for n in names}
    for n in names:
        shape = tensors[n].shape
        assert len(shape) == found[n].ndim
        assert all(s == f for s, f in zip(shape, found[n].shape, strict=True) if isinstance(s, int))


@pytest.mark.parametrize("name", ["convnet", "attention", "upsampling"])
def test_what_is_not_fused_is_quantized_as_before(name, tmp_path):
    network = getattr(networks, name)()
    model = fused(network, tmp_path / "fused.onnx")
    plan = make_plan(model.graph, load_rule("onnxruntime-cpu"))
    points = {p.tensor for p in plan.points if p.role == "activation"}
    _, whole = networks.planned(network, "onnxruntime-cpu")
    alike = {n.outputs[0].name for n in model.graph.nodes if not n.domain}
    expected = {p.tensor for p in whole.points if p.role == "activation"} & alike
    batch = {"input": networks.samples(network, 16)}
    empty = insert_pairs(model, plan, placeholder_params(model, plan), state="uncalibrated")
    quantized = calibrate(empty, [batch])
    outputs = [model_session(m, "qdq").run(None, batch)[0] for m in (model, quantized)]

    assert expected <= points
    assert {s.reason for s in plan.skips if s.op_type.startswith(("Fused", "Skip"))} == {
        "domain 'com.microsoft' is not ONNX's own"
    }
    assert sqnr_db(*outputs) > 20
    assert quantized.floats.to_proto().SerializeToString(
        deterministic=True
    ) == model.to_proto().SerializeToString(deterministic=True)


def test_fine_tuning_names_the_fused_node(tmp_path):
    model = fused(networks.attention(), tmp_path / "fused.onnx")
    plan = make_plan(model.graph, load_rule("onnxruntime-cpu"))
    quantized = insert_pairs(model, plan, placeholder_params(model, plan), state="calibrated")
    with pytest.raises(TrainingError, match=r"FusedMatMul: .* before onnxruntime fused it"):
        training_form(quantized)


def test_weight_is_not_quantized_alone():
    """The type of what an unknown op writes is not known, so it stays float; so does the weight."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "mine": 1]>
        g (float[N,4] x) => (float[N,4] y, float[N,4] z) <float[4,4] w, float[4,4] v> {
        t = mine.Own(x) r = Relu(t) u = mine.Own(r) y = MatMul(u, w) z = MatMul(x, v) }"""
    )
    tensors = [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), n) for n in "wv"]
    model.graph.initializer.extend(tensors)
    graph = prepare(from_proto(model)).graph
    for rule in ("onnxruntime-cpu", "tensorrt", "sophgo-bm1684x"):
        plan = make_plan(graph, load_rule(rule))

        assert {"x", "v"} <= {p.tensor for p in plan.points} <= {"x", "v", "z", "y"}
        assert {s.reason for s in plan.skips if s.op_type in ("Own", "Relu")} == {
            "domain 'mine' is not ONNX's own",
            "the type of 'r' is not known",
        }
