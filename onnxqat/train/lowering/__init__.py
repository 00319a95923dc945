"""Replace nodes of the training form by nodes that have a gradient.

The saved model keeps the original ops. In the training form, a node is (the first that applies):

1. refused, with a reason (`REFUSED`, or a form that its gradient does not support);
2. kept, if `onnxqat.gradients` defines its gradient (`NATIVE`);
3. rewritten into such nodes (`onnxqat.train.lowering.operands`); a recurrent
   layer is unrolled (`onnxqat.train.lowering.recurrent`);
4. replaced by a custom op: the original node as forward pass, and a gradient in ONNX text.

All of them compute the same values as the original node, bit for bit, except GRU, RNN and LSTM with
peepholes, which differ by a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.model import constant
from onnxqat.nodes import is_op
from onnxqat.operators import RECURRENT, SUBGRAPHS
from onnxqat.train.lowering import operands, pointwise, reductions, separable
from onnxqat.train.lowering.convolution import conv_transpose
from onnxqat.train.lowering.gradient import (
    CustomOp,
    Gradient,
    Refusal,
    ShapeUnknown,
    custom_op,
    static_shape,
)
from onnxqat.train.lowering.normalization import NORMALIZATIONS
from onnxqat.train.lowering.pointwise import ceiling, straight
from onnxqat.train.lowering.rearranging import (
    depth_to_space,
    einsum,
    product_with_vector,
    space_to_depth,
)
from onnxqat.train.lowering.recurrent import unrolled
from onnxqat.train.lowering.shapes import fixed_shapes, sample_shapes, with_steps

__all__ = [
    "FIRST_INPUT_ONLY",
    "CustomOp",
    "Refusal",
    "ShapeUnknown",
    "ceiling",
    "fixed_shapes",
    "handing_on",
    "lower",
    "sample_shapes",
    "with_steps",
]

NATIVE = frozenset(
    (
        *("Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Erf"),
        *("Exp", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm"),
        *("GlobalAveragePool", "Identity", "LayerNormalization", "Log", "LogSoftmax", "MatMul"),
        *("Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Pow", "Reciprocal", "Relu", "Reshape"),
        *("ScatterND", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub"),
        *("Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze"),
    )
)
FIRST_INPUT_ONLY = ("Clip", "Pow")  # ops whose other inputs have no correct gradient
RUNTIME_DOMAIN = "com.microsoft"
REFUSED = {
    **dict.fromkeys(SUBGRAPHS, "onnxqat has no gradients for subgraphs"),
    "GridSample": "onnxqat has no gradient for sampling at computed positions",
}
GRADIENTS: dict[str, Callable[[gs.Node], Gradient]] = {
    **dict.fromkeys(reductions.REDUCTIONS, reductions.reduction),
    **{op_type: pointwise.slope_gradient(op_type) for op_type in pointwise.SLOPES},
    **NORMALIZATIONS,
    "ConvTranspose": conv_transpose,
    "CumSum": separable.cumsum,
    "DepthToSpace": depth_to_space,
    "Dropout": pointwise.dropout,
    "Einsum": einsum,
    "GlobalLpPool": reductions.global_pool("ReduceL2"),
    "GlobalMaxPool": reductions.global_pool("ReduceMax"),
    "LpPool": reductions.lp_pool,
    "Mod": pointwise.mod,
    "PRelu": pointwise.prelu,
    "SpaceToDepth": space_to_depth,
    "Where": pointwise.where,
}


def lower(
    node: gs.Node, learned: Sequence[int], *, opset: int, all_reach_loss: bool
) -> tuple[list[gs.Node], list[CustomOp]]:
    """Return the nodes that replace ``node`` in training, and the custom ops among them.

    Parameters
    ----------
    node : gs.Node
        A node between a parameter and an output.
    learned : sequence of int
        The indices of the inputs that need a gradient.
    opset : int
        The opset of the graph.
    all_reach_loss : bool
        Whether every output of the node gets a gradient.

    Raises
    ------
    Refusal
        There is no correct gradient.
    """
    if not is_op(node, node.op):
        fused = "; use the model as it was before onnxruntime fused it"
        cause = fused if node.domain.startswith(RUNTIME_DOMAIN) else ""
        raise Refusal(f"onnxqat has no gradients for the domain '{node.domain}'{cause}")
    if node.op in REFUSED:
        raise Refusal(REFUSED[node.op])
    if node.op in RECURRENT:
        return _unrolled(node, opset)
    rewritten = _rewritten(node, all_reach_loss=all_reach_loss)
    if rewritten is not None:
        return rewritten, []
    if node.op == "LeakyRelu":
        node = pointwise.leaky_relu(node)
    gradient = _gradient(node, opset)
    if gradient is not None:
        op, made = custom_op(node, gradient, learned, opset)
        return [made], [op]
    _check_native(node, learned)
    if node.op == "LayerNormalization":
        _complete(node)
    return [node], []


def handing_on(
    node: gs.Node, learned: Sequence[int], opset: int
) -> tuple[list[gs.Node], list[CustomOp]]:
    """Return the replacement of a Relu or Clip whose mask its point includes, see `ceiling`."""
    op, made = custom_op(node, straight(), learned, opset)
    return [made], [op]


def _unrolled(node: gs.Node, opset: int) -> tuple[list[gs.Node], list[CustomOp]]:
    """Return the nodes of all steps of a recurrent layer, their activations with gradients."""
    nodes: list[gs.Node] = []
    ops: dict[str, CustomOp] = {}  # by op type, because all steps use the same ops
    for made in unrolled(node):
        if made.op not in ("Clip", "LeakyRelu", *pointwise.SLOPES):
            nodes.append(made)
            continue
        stand_in, found = lower(made, [0], opset=opset, all_reach_loss=True)
        if stand_in[0] is not made:
            made.inputs.clear()
            made.outputs.clear()
        nodes += stand_in
        ops |= {op.op_type: op for op in found}
    return nodes, list(ops.values())


def _rewritten(node: gs.Node, *, all_reach_loss: bool) -> list[gs.Node] | None:
    if node.op == "Sum":
        return operands.in_pairs(node, "Add")
    if node.op == "Mean":
        return operands.mean(node)
    if node.op in ("Max", "Min") and len(node.inputs) != 2:
        return operands.in_pairs(node, node.op)
    if node.op == "Split" and not all_reach_loss:
        return operands.slices(node)
    return None


def _gradient(node: gs.Node, opset: int) -> Gradient | None:
    """Return the gradient in ONNX text, or None if there is none."""
    if node.op == "Resize":
        return separable.resize(node, opset)
    if node.op == "Pad" and (node.attrs.get("mode", "constant") != "constant" or node.inputs[3:]):
        return separable.pad(node, opset)
    if node.op == "Gelu" and node.attrs.get("approximate", "none") == "none":
        return None
    if node.op == "Slice" and separable.goes_backwards(node):
        return separable.backward_slice(node, opset)
    if node.op == "Clip":
        return pointwise.clip(node)
    if node.op == "MatMul" and len(node.inputs[1].shape or ()) == 1:
        return product_with_vector(node)
    maker = GRADIENTS.get(node.op)
    return maker(node) if maker else None


def _check_native(node: gs.Node, learned: Sequence[int]) -> None:
    """Refuse a node without a gradient, or without one for the learned inputs."""
    if node.op not in NATIVE:
        raise Refusal("onnxqat has no gradient for it")
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        raise Refusal(f"its pads are not fixed (auto_pad {mode}); export fixed sizes")
    ranks = [len(tensor.shape or ()) for tensor in node.inputs[:2]]
    if node.op == "MatMul" and ranks[0] == 1 and ranks[1] > 2:
        raise Refusal("onnxqat has no gradient for a vector times a batch of matrices")
    if node.op in FIRST_INPUT_ONLY and any(index > 0 for index in learned):
        raise Refusal("onnxqat has a gradient for its first input only")


def _complete(node: gs.Node) -> None:
    """Add the parts of a LayerNormalization that its gradient reads: bias and optional outputs."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        zeros = np.zeros(static_shape(node.inputs[1], "scale"), np.float32)
        node.inputs = [*node.inputs[:2], constant(f"{node.name}/bias", zeros)]
    for suffix in ("mean", "inverse_std")[len(node.outputs) - 1 :]:
        node.outputs.append(gs.Variable(f"{node.name}/{suffix}", np.float32))
