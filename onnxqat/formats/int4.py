"""Store weights of at most 4 bits two to a byte, as ONNX's INT4 and UINT4 (opset 21).

https://onnx.ai/onnx/technical/int4.html. DequantizeLinear takes these types since opset 21. The
values are those of the int8 export; only the storage changes.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxqat.errors import FormatError
from onnxqat.model import Model
from onnxqat.pairs import node_name
from onnxqat.plan import QuantPlan
from onnxqat.preparation.opset import upgrade_opset

__all__ = ["with_int4_weights"]

OPSET_OF_INT4 = 21


def with_int4_weights(exported: Model, plan: QuantPlan) -> Model:
    """Return the export with all weights of at most 4 bits stored as INT4 or UINT4.

    Parameters
    ----------
    exported : Model
        Its int8 or uint8 weights feed DequantizeLinear nodes, see `onnxqat.formats.EXPORTS`.
    plan : QuantPlan
        Plan of the Q/DQ model that was exported.

    Raises
    ------
    FormatError
        No weight has 4 bits or fewer.
    ModelError
        The model cannot be upgraded to opset 21 without changing its outputs.
    """
    weights = (p for p in plan.grid_points() if p.role == "weight" and p.spec.bits <= 4)
    narrow = {node_name(point.tensor, "DequantizeLinear") for point in weights}
    result = upgrade_opset(exported, OPSET_OF_INT4).copy()
    pairs = [n for n in result.graph.nodes if n.name in narrow]
    stored = [node for node in pairs if isinstance(node.inputs[0], gs.Constant)]
    if not stored:
        raise FormatError(
            f"{exported.name}: no weight has 4 bits or fewer. Insert with --set weight.bits=4, or "
            "export without --int4."
        )
    for node in stored:
        node.inputs[0], node.inputs[2] = (_packed(node.inputs[i]) for i in (0, 2))
    return result


def _packed(tensor: gs.Constant) -> gs.Constant:
    values = np.asarray(tensor.values)
    signed = values.dtype == np.int8
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    name = f"{tensor.name}/int4"
    proto = onnx.helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())
    return gs.Constant(name, LazyValues(proto))
