"""Find normalizations over the last axis, whose output channels can be scaled like a layer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxqat.nodes import is_op
from onnxqat.plan.graph import GraphIndex, Unit
from onnxqat.preparation.editing import constant_values

__all__ = ["Norm", "find_norms"]

KINDS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """The node of a normalization that multiplies each channel by a constant.

    Attributes
    ----------
    name : str
        The name of the normalization, which is that of its last node.
    node : Node
        A LayerNormalization, or the Mul of a normalization written as several nodes.
    constants : tuple of int
        The inputs of ``node`` to divide by the scales: scale and bias of a LayerNormalization. A
        normalization written as several nodes adds its bias in a later node.
    channels : int
        The number of channels.
    """

    name: str
    node: gs.Node
    constants: tuple[int, ...]
    channels: int


def find_norms(graph: gs.Graph) -> list[Norm]:
    """Return the normalizations of a prepared graph whose scale and bias are constants."""
    units = GraphIndex(graph, KINDS).units
    return [norm for unit in units if unit.kind in KINDS and (norm := _norm(unit)) is not None]


def _norm(unit: Unit) -> Norm | None:
    last = unit.nodes[-1]
    node, constants = last, [1, 2] if len(last.inputs) > 2 and last.inputs[2].name else [1]
    if not is_op(last, "LayerNormalization"):
        multiplied = [one for one in unit.nodes if is_op(one, "Mul") and _factor(one) is not None]
        if not multiplied:
            return None
        node = multiplied[-1]
        constants = [i for i in range(2) if constant_values(node.inputs[i]) is not None]
    elif len(last.outputs) > 1 or int(last.attrs.get("axis", -1)) not in (-1, _rank(last) - 1):
        return None
    sizes = [_channels(node.inputs[i]) for i in constants]
    shape = node.outputs[0].shape
    if not sizes or None in sizes or not shape or any(size != shape[-1] for size in sizes):
        return None
    return Norm(name=str(last.name), node=node, constants=tuple(constants), channels=int(shape[-1]))


def _rank(node: gs.Node) -> int:
    return len(node.outputs[0].shape or ())


def _factor(node: gs.Node) -> int | None:
    """Return the number of channels of a Mul's constant factor, or None if it has none."""
    found = [_channels(tensor) for tensor in node.inputs]
    return next((count for count in found if count is not None), None)


def _channels(tensor: gs.Tensor) -> int | None:
    """Return the number of channels (last axis) if a constant has one value for each, else None."""
    values = constant_values(tensor)
    if values is None or values.ndim == 0 or _is_wider(values.shape):
        return None
    return int(values.shape[-1])


def _is_wider(shape: Sequence[int]) -> bool:
    return any(size != 1 for size in shape[:-1])
