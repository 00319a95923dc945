"""A Q/DQ model and its configuration for Axera's Pulsar2.

Pulsar2 reads an ONNX file with Q/DQ pairs (``"model_type": "QuantONNX"``; AXERA-TECH/QAT.axera
``pulsar2/config.json``, AXERA-TECH/pulsar2-docs-en ``source/``). Activations keep their pairs,
weights become integers followed by DequantizeLinear, biases stay float (``conv_bias_data_type``
FP32). Pulsar2 was reported to crash when a DequantizeLinear feeds the weight input of a MatMul;
such a weight is written as float, rounded to its grid, and its scales are listed as left out. A
node that reads a 16-bit tensor gets a ``layer_configs`` entry with U16. Proof: format only.
"""

from __future__ import annotations

from typing import Any

from onnxqat.formats.format import Calibrated, Format, Written
from onnxqat.formats.json_table import write_json
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.formats.qdq_table import read_qdq

__all__ = ["AXERA"]


def _in_matmul(source: Calibrated) -> set[str]:
    """Return the names of the weights that a MatMul reads."""
    ops = {node.name: node.op for node in source.graph.nodes}
    return {
        p.tensor
        for p, _ in source.points("weight")
        if any(ops[edge.node] == "MatMul" for edge in p.consumers)
    }


def _write(source: Calibrated) -> Written:
    floats = _in_matmul(source)
    exported = integer_model(source.model, biases=False, float_weights=floats).to_proto()
    left_out = {"weight scales": tuple(sorted(floats))} if floats else {}
    return Written(
        files={
            "table": exported.SerializeToString(deterministic=True),
            "config": write_json(_config(source)),
        },
        left_out=left_out | source.left_out("biases"),
    )


def _config(source: Calibrated) -> dict[str, Any]:
    wide = {
        edge.node
        for point, _ in source.points("activation")
        for edge in point.consumers
        if point.spec.bits == 16 and edge.node
    }
    quant: dict[str, Any] = {
        "input_configs": [{"tensor_name": "DEFAULT"}],
        "conv_bias_data_type": "FP32",
        "calibration_method": "MinMax",
    }
    if wide:
        names = [n.name for n in source.graph.nodes if n.name in wide]
        quant["layer_configs"] = [{"layer_name": name, "data_type": "U16"} for name in names]
    return {
        "model_type": "QuantONNX",
        "npu_mode": "NPU1",
        "quant": quant,
        "compiler": {"check": 2},
    }


AXERA = Format(
    summary="Q/DQ model and configuration for Axera's Pulsar2",
    files={"table": "axera_qdq.onnx", "config": "pulsar2.json"},
    writer=_write,
    read=read_qdq,
)
