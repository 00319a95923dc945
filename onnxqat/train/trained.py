"""Choose the initializers of a model that are trained.

Trained are the weights and biases of weighted nodes and recurrent layers, parameters of
normalizations and slopes of PRelu, and those constants of an Add, a Mul and similar ops that were
learned: a bias, a LayerScale, a table of positions. Constants that belong to the structure are
trained only if the user names them: a single number (1.0, 0.5, 1 / sqrt(d), an epsilon), and a grid
or strides of anchors, whose values are different multiples of one half.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.nodes import input_role
from onnxqat.operators import Role
from onnxqat.plan import QuantPlan
from onnxqat.qparams import FloatArray
from onnxqat.train.lowering import FIRST_INPUT_ONLY

__all__ = ["is_structure", "trained_initializers"]

PARAMETERS: tuple[Role, ...] = ("factor", "weight", "bias", "scale", "slope", "gate", "peephole")


def trained_initializers(
    graph: gs.Graph, plan: QuantPlan, asked: Collection[str] = ()
) -> list[str]:
    """Return the unique names of the initializers that are trained.

    Parameters
    ----------
    graph : gs.Graph
        The graph of the float model.
    plan : QuantPlan
        The plan of the model.
    asked : collection of str
        Constants that the user wants to train.
    """
    tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
    names = [
        point.tensor
        for point in plan.points
        if point.role == "bias"
        or (point.role == "weight" and not is_structure(tensors[point.tensor].values))
        or any(input_role(nodes[e.node], e.index) in PARAMETERS for e in point.consumers if e.node)
    ]
    for node in graph.nodes:
        names += [t.name for i, t in enumerate(node.inputs) if input_role(node, i) in PARAMETERS]
    names += [name for name in asked if name in tensors]
    # an exponent or a limit has no gradient, even if other nodes read the same constant
    fixed = {t.name for n in graph.nodes if n.op in FIRST_INPUT_ONLY for t in n.inputs[1:]}
    return [n for n in dict.fromkeys(names) if n not in fixed and _is_float(tensors.get(n))]


def is_structure(values: FloatArray) -> bool:
    """Return whether a constant operand of activations belongs to the network's structure."""
    if values.size <= 1:
        return True
    doubled = 2 * values
    return bool(np.all(doubled == np.rint(doubled)) and values.min() != values.max())


def _is_float(tensor: gs.Tensor | None) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and 0 not in tensor.shape
