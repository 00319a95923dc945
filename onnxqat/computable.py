"""Reduce a model to the part that onnxruntime can run, which ends before ops that it lacks.

Its outputs are the tensors that the missing ops would read. Calibration, training and evaluation
use this part; written files keep the whole graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import msgspec
import onnx_graphsurgeon as gs

from onnxqat.ends import open_ends
from onnxqat.errors import ModelError
from onnxqat.model import Model
from onnxqat.plan import Edge, QuantPoint
from onnxqat.preparation.order import sort_nodes
from onnxqat.preparation.shapes import infer_shapes
from onnxqat.preparation.unused import remove_unused
from onnxqat.quantized import AnyModel, QuantizedModel, float_part

__all__ = ["Computable", "computable"]

M = TypeVar("M", bound=AnyModel)


@dataclass(frozen=True, kw_only=True)
class Computable(Generic[M]):
    """The part of a model that onnxruntime can run.

    Attributes
    ----------
    model : Model or QuantizedModel
        That part; the model itself if onnxruntime can run all of it.
    lost : tuple of str
        The outputs that onnxruntime cannot compute.
    ops : tuple of str
        The types of the ops that onnxruntime lacks.
    first_lost : bool
        Whether the first output, which is compared with labels, is lost.
    """

    model: M
    lost: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    first_lost: bool = False

    @property
    def note(self) -> str:
        """One line that says which tensors replace the lost outputs."""
        ends = [tensor.name for tensor in float_part(self.model).graph.outputs]
        return (
            f"onnxruntime has no {', '.join(self.ops)}: outputs {_listed(self.lost)} are not "
            f"computed, and are replaced by {_listed(ends)}"
        )


def computable(model: M) -> Computable[M]:
    """Return the part of a float or Q/DQ model that onnxruntime can run.

    Its outputs are the model's outputs that can be computed, then the tensors that missing ops
    read. In a Q/DQ model these tensors are quantized if the plan quantizes them for the ops.

    Raises
    ------
    ModelError
        A point of the plan lies behind a missing op, or nothing before the op can be computed.
    """
    floats = float_part(model)
    ends = open_ends(floats.to_proto, optimization="none", threads=1, name=model.name)
    if not ends.lost:
        return Computable(model=model)
    rest = floats.copy()
    tensors = rest.graph.tensors()
    if any(tensors[name].dtype is None for name in ends.names):
        infer_shapes(rest.graph)
    rest.graph.outputs = [tensors[name] for name in ends.names]
    sort_nodes(rest.graph)
    remove_unused(rest.graph)
    made = _with_pairs(rest, model) if isinstance(model, QuantizedModel) else rest
    first_lost = floats.graph.outputs[0].name in ends.lost
    return Computable(model=cast("M", made), lost=ends.lost, ops=ends.ops, first_lost=first_lost)


def _with_pairs(rest: Model, model: QuantizedModel) -> QuantizedModel:
    """Return a part of a float model as a quantized one, with the points that lie in that part."""
    plan = model.plan
    names, tensors = {node.name for node in rest.graph.nodes}, rest.graph.tensors()
    for point in plan.points:
        if point.tensor not in tensors:
            raise ModelError(
                f"{model.name}: '{point.tensor}' is quantized behind an op that onnxruntime lacks. "
                "Keep it float, or export without the op."
            )
    points = tuple(_moved(point, names, rest.graph) for point in plan.points)
    kept = msgspec.structs.replace(plan, points=points)
    return model.with_params(model.params, state=model.state, plan=kept, floats=rest)


def _moved(point: QuantPoint, names: set[str], graph: gs.Graph) -> QuantPoint:
    """Return a point in which an output replaces the readers that are not in the part."""
    ends = [tensor.name for tensor in graph.outputs]
    readers = [edge for edge in point.consumers if edge.node in names]
    read = any(edge.node not in names for edge in point.consumers)
    if read and point.tensor in ends:
        readers.append(Edge(node="", index=ends.index(point.tensor)))
    return msgspec.structs.replace(point, consumers=tuple(readers))


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
