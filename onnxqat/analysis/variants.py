"""The layers of a quantized model, and variants of it with only some layers quantized.

A layer is a node with a quantized weight, together with the nodes that the chip fuses with it. A
variant has the pairs that ``insert`` makes with overrides that leave nodes float, so that a user of
such an override gets what was measured. The parameters are those of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from onnxqat.errors import ModelError
from onnxqat.nodes import is_op
from onnxqat.operators import RECURRENT, WEIGHTED
from onnxqat.overrides import Override, parse_override
from onnxqat.plan import EmptyPlanError, QuantPlan, QuantPoint, make_plan
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule

__all__ = ["Layer", "Variants", "layers_of"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A node with a quantized weight.

    Attributes
    ----------
    node, op_type : str
        Name and operator of the node.
    weights, inputs : tuple of str
        Names of its quantized weights, and of the quantized activations that it reads.
    nodes : tuple of str
        Names of the node and of the nodes that the chip fuses with it.
    """

    node: str
    op_type: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """Regular expression that matches the names of its nodes."""
        return "|".join(map(re.escape, self.nodes))


class Variants:
    """Makes variants of a model in which only some layers are quantized.

    Parameters
    ----------
    model : QuantizedModel
        The whole model.
    rule : HardwareRule
        The rule that it was made with.

    Raises
    ------
    ModelError
        The model has pairs that the rule does not make.
    """

    def __init__(self, model: QuantizedModel, rule: HardwareRule) -> None:
        self.model, self.rule = model, rule
        # other overrides change or drop single points, which the model's own points reflect already
        given = map(parse_override, model.plan.overrides)
        self._overrides = [o for o in given if o.key == "quantize" and o.selects_nodes]
        self.layers = layers_of(model)
        planned = {p.tensor: set(p.consumers) for p in self._planned(()).points}
        for point in model.plan.points:
            if not set(point.consumers) <= planned.get(point.tensor, set()):
                raise ModelError(
                    f"{model.name}: '{point.tensor}' is quantized where rule '{rule.name}' leaves "
                    "it float. Give the model's own rule by --rules, or insert again."
                )

    def left_float(self, layers: Iterable[Layer]) -> QuantizedModel:
        """Return the model with all layers quantized except these."""
        return self._variant("|".join(layer.pattern for layer in layers))

    def only(self, layers: Iterable[Layer]) -> QuantizedModel:
        """Return the model with only these layers quantized."""
        layers = tuple(layers)
        names = "|".join(layer.pattern for layer in layers)
        if not {n.name for n in self.model.floats.graph.nodes} - {
            n for x in layers for n in x.nodes
        }:
            return self.model
        return self._variant(rf"(?!(?:{names})\Z)[\s\S]*")

    def _planned(self, more: Iterable[Override]) -> QuantPlan:
        return make_plan(self.model.floats.graph, self.rule, [*self._overrides, *more])

    def _variant(self, pattern: str) -> QuantizedModel:
        model = self.model
        override = Override(kind="name", pattern=pattern, key="quantize", value=False)
        try:
            planned = {p.tensor: p for p in self._planned([override]).points}
        except EmptyPlanError:  # the override leaves everything float
            planned = {}

        requantized = model.plan.requantized()
        behind = {p.tensor: p.consumers for p in model.plan.points if p.tensor in requantized}

        def kept(point: QuantPoint) -> QuantPoint:
            readers = planned[point.tensor].consumers if point.tensor in planned else ()
            # the node of a requantization stays, and passes on what it reads
            edges = tuple(
                edge
                for edge in point.consumers
                if not {edge, *behind.get(edge.node, ())}.isdisjoint(readers)
            )
            return msgspec.structs.replace(point, consumers=edges)

        points = tuple(point for point in map(kept, model.plan.points) if point.consumers)
        plan: QuantPlan = msgspec.structs.replace(model.plan, points=points)
        params = {p.parameters: model.params[p.parameters] for p in plan.grid_points()}
        return model.with_params(params, state=model.state, plan=plan)


def layers_of(model: QuantizedModel) -> tuple[Layer, ...]:
    """Return the layers of a quantized model, in the order of its graph."""
    read: dict[tuple[str, str], list[str]] = {}
    for point in model.plan.grid_points():
        for edge in point.consumers:
            read.setdefault((edge.node, point.role), []).append(point.tensor)
    chains = {name: chain for chain in model.plan.chains for name in chain}
    return tuple(
        Layer(
            node=node.name,
            op_type=node.op,
            weights=tuple(read[node.name, "weight"]),
            inputs=tuple(dict.fromkeys(read.get((node.name, "activation"), ()))),
            nodes=chains.get(node.name, (node.name,)),
        )
        for node in model.floats.graph.nodes
        if is_op(node, *WEIGHTED, *RECURRENT) and (node.name, "weight") in read
    )
