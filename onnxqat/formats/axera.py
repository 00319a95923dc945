"""A Q/DQ model for Axera's Pulsar2.

Pulsar2 reads an ONNX file with Q/DQ pairs (``"model_type": "QuantONNX"``; AXERA-TECH/QAT.axera
``pulsar2/config.json``, AXERA-TECH/pulsar2-docs-en ``source/``). Activations keep their pairs,
weights become integers followed by DequantizeLinear, biases stay float (``conv_bias_data_type``
FP32). Pulsar2 was reported to crash when a DequantizeLinear feeds the weight input of a MatMul;
such a weight is written as float, rounded to its grid, and its scales are listed as left out.
Proof: format only. `onnxqat.handoff.axera` writes the configuration.
"""

from __future__ import annotations

from onnxqat.formats.format import Calibrated, Format, Written
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
        files={"table": exported.SerializeToString(deterministic=True)},
        left_out=left_out | source.left_out("biases"),
    )


AXERA = Format(
    summary="Q/DQ model for Axera's Pulsar2",
    files={"table": "axera_qdq.onnx"},
    writer=_write,
    read=read_qdq,
)
