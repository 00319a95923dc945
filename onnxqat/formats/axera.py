"""A Q/DQ model and its configuration for Axera's Pulsar2.

Pulsar2 reads an ONNX file with Q/DQ pairs (``"model_type": "QuantONNX"``; AXERA-TECH/QAT.axera
``pulsar2/config.json``, AXERA-TECH/pulsar2-docs-en ``source/``). Activations keep their pairs,
weights become integers followed by DequantizeLinear, biases stay float (``conv_bias_data_type``
FP32). Pulsar2 was reported to crash when a DequantizeLinear feeds the weight input of a MatMul;
such a weight is written as float, rounded to its grid, and its scales are listed as left out. A
node that reads a 16-bit tensor gets a ``layer_configs`` entry with U16. Format-checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written
from onnxqat.formats.json_table import write_json
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.pairs import float_name
from onnxqat.plan import QuantPlan, QuantPoint

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


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, pairs = Found(table.name, graph), _pairs(table)
    for point in plan.grid_points():
        names = (point.tensor, float_name(point.tensor), f"{point.tensor}/integers")
        name = next((n for n in names if n in pairs), None)
        if name is not None:
            _put(found, point, *pairs.pop(name))
        elif point.role == "activation":
            found.missing.append(point.tensor)
    found.put_weights_by_absmax(plan)
    found.unused += pairs
    return found


def _put(
    found: Found, point: QuantPoint, scale: np.ndarray[Any, Any], zero_point: np.ndarray[Any, Any]
) -> None:
    signed = bool(np.issubdtype(zero_point.dtype, np.signedinteger))
    integers = np.issubdtype(zero_point.dtype, np.integer)
    if scale.dtype != np.float32 or not integers or zero_point.size != scale.size:
        raise FormatError(
            f"{found.source}: '{point.tensor}' has no float32 scale and zero_point. Write the "
            "model again."
        )
    found.put(point, scale.ravel(), zero_point.ravel(), signed=signed, name=point.tensor)


def _pairs(table: Table) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return scale and zero_point of each tensor that a Q or DQ node reads."""
    try:
        graph = onnx.load_model_from_string(table.data).graph
        arrays = {t.name: numpy_helper.to_array(_stored(t)) for t in graph.initializer}
    except (DecodeError, ValueError, TypeError, KeyError) as error:
        message = f"{table.name}: not a Q/DQ ONNX file ({' '.join(str(error).split())[:120]})."
        raise FormatError(message) from error
    found = {}
    for node in graph.node:
        known = node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[:1] and node.input[0] in arrays
        )
        if known:
            if len(node.input) < 3 or not arrays.keys() >= set(node.input[1:3]):
                raise FormatError(
                    f"{table.name}: '{node.name[:80]}' has no constant scale. Write the model "
                    "again."
                )
            found[node.input[0]] = (arrays[node.input[1]], arrays[node.input[2]])
    return found


def _stored(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return the tensor; refuse external data, which could point to any path."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        message = f"initializer '{tensor.name}' keeps its data outside of the file"
        raise ValueError(message)
    return tensor


AXERA = Format(
    summary="Q/DQ model and configuration for Axera's Pulsar2",
    files={"table": "axera_qdq.onnx", "config": "pulsar2.json"},
    writer=_write,
    read=_read,
)
