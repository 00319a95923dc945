"""Read the parameters of a plan from a Q/DQ ONNX file, where a compiler takes one as its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxqat.errors import FormatError
from onnxqat.formats.format import Found, Table
from onnxqat.pairs import float_name
from onnxqat.plan import QuantPlan, QuantPoint

__all__ = ["read_qdq"]

ZeroPoints = Callable[[QuantPoint, NDArray[Any]], NDArray[Any]]


def read_qdq(
    table: Table,
    graph: gs.Graph,
    plan: QuantPlan,
    *,
    as_planned: ZeroPoints = lambda _point, zero_point: zero_point,
) -> Found:
    """Return the parameters that the pairs of a Q/DQ file hold.

    A weight without a pair gets the scale that compilers compute; an activation without one is
    listed as missing.

    Parameters
    ----------
    as_planned : function
        (point, zero_point of the file) -> the zero_point of the plan, if the format writes another.

    Raises
    ------
    FormatError
        The file is not such a model.
    """
    found, pairs = Found(table.name, graph), _pairs(table)
    for point in plan.grid_points():
        names = (point.tensor, float_name(point.tensor), f"{point.tensor}/integers")
        name = next((n for n in names if n in pairs), None)
        if name is not None:
            scale, zero_point = pairs.pop(name)
            _check(found, point, scale, zero_point)
            signed = bool(np.issubdtype(zero_point.dtype, np.signedinteger))
            zero_point = as_planned(point, zero_point.ravel())
            found.put(point, scale.ravel(), zero_point, signed=signed, name=point.tensor)
        elif point.role == "activation":
            found.missing.append(point.tensor)
    found.put_weights_by_absmax(plan)
    found.unused += pairs
    return found


def _check(found: Found, point: QuantPoint, scale: NDArray[Any], zero_point: NDArray[Any]) -> None:
    integers = np.issubdtype(zero_point.dtype, np.integer)
    if scale.dtype != np.float32 or not integers or zero_point.size != scale.size:
        raise FormatError(
            f"{found.source}: '{point.tensor}' has no float32 scale and zero_point. Write the "
            "model again."
        )


def _pairs(table: Table) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return scale and zero_point of each tensor that a Q or DQ node reads."""
    try:
        graph = onnx.load_model_from_string(table.data).graph
        arrays = {t.name: numpy_helper.to_array(_stored(t)) for t in graph.initializer}
    except (DecodeError, ValueError, TypeError, KeyError) as error:
        message = (
            f"{table.name}: not a Q/DQ ONNX file ({' '.join(str(error).split())[:120]}). Give one."
        )
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
    # biases, whose scales follow from those of the other tensors
    return {name: pair for name, pair in found.items() if pair[1].dtype != np.int32}


def _stored(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return the tensor; refuse external data, which could point to any path."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        message = f"initializer '{tensor.name}' keeps its data outside of the file"
        raise ValueError(message)
    return tensor
