"""Replace a Clip from 0, such as ReLU6, by a Relu, because channels behind a Clip cannot be scaled.

This changes the function where values reach the upper limit. ``auto`` measures the change on data.
If the outputs keep an SQNR of `SMALL_DB`, the change costs less than quantization to 8 bits, whose
noise is about ten times stronger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import Model
from onnxqat.nodes import is_op
from onnxqat.preparation.editing import scalar
from onnxqat.repair.difference import Difference, differences

__all__ = ["NOTHING", "RELU6", "SMALL_DB", "Relu6", "Replaced", "replaced_relu6"]

Relu6: TypeAlias = Literal["auto", "keep", "replace"]
RELU6: tuple[Relu6, ...] = ("auto", "keep", "replace")
SMALL_DB = 40.0

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """The Clip nodes from 0, and whether they were replaced.

    Attributes
    ----------
    nodes : tuple of str
        Names of the Clip nodes that a Relu replaced.
    kept : tuple of str
        Names of the Clip nodes that stayed.
    cost : tuple of Difference
        The change of each output by the replacement; empty if it was not measured.
    """

    nodes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    cost: tuple[Difference, ...] = ()


NOTHING = Replaced()


def replaced_relu6(
    model: Model, batches: Sequence[Feeds] | None, how: Relu6, *, threads: int = 0
) -> tuple[Model, Replaced]:
    """Return a model in which a Relu replaces each Clip from 0 to a finite number, or the model.

    Parameters
    ----------
    model : Model
        The model; it is not changed.
    batches : sequence of mapping of str to array, optional
        Model inputs on which the change is measured (default: random values).
    how : {"auto", "keep", "replace"}
        ``auto`` replaces the Clips if all outputs keep an SQNR of `SMALL_DB` on the data, and
        replaces none without data.
    """
    changed = model.copy()
    names = _replace(changed.graph)
    if not names:
        return model, NOTHING
    if how == "keep" or (how == "auto" and batches is None):
        return model, Replaced(kept=names)
    cost = differences(model, changed, batches, threads=threads)
    if how == "auto" and not _is_small(cost):
        return model, Replaced(kept=names, cost=cost)
    return changed, Replaced(nodes=names, cost=cost)


def _is_small(cost: Iterable[Difference]) -> bool:
    return all(one.sqnr_db >= SMALL_DB for one in cost)


def _replace(graph: gs.Graph) -> tuple[str, ...]:
    replaced = []
    for node in graph.nodes:
        if is_op(node, "Clip") and _cuts_from_zero(node):
            node.op, node.inputs = "Relu", node.inputs[:1]
            replaced.append(str(node.name))
    return tuple(replaced)


def _cuts_from_zero(node: gs.Node) -> bool:
    limits = [scalar(tensor) for tensor in node.inputs[1:3]]
    if len(limits) < 2 or None in limits:
        return False
    return bool(limits[0] == 0 and 0 < limits[1] < np.inf)
