"""A calibrated model with other widths for its weights, as ``insert`` would make it.

Activations keep their parameters, which were calibrated on the float model and do not depend on the
width of a weight. The parameters of a weight are chosen again from its values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from onnxqat.analysis.advice import apart
from onnxqat.calibration import fit_bias_range, weight_method, weight_range
from onnxqat.errors import ModelError, OptionError, RuleError
from onnxqat.overrides import Override, parse_override
from onnxqat.plan import QuantPlan, QuantPoint, make_plan
from onnxqat.qparams import WIDTHS, QuantParams, QuantSpec, choose_qparams
from onnxqat.quantized import OPSET_OF_16_BITS, QuantizedModel
from onnxqat.rules import HardwareRule, wrong_spec

__all__ = ["Weight", "Widths", "average_bits", "widths_of"]

Choice = Mapping[str, int]  # bits of each weight that has a choice


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A quantized weight.

    Attributes
    ----------
    tensor : str
        Name of the weight.
    node, op_type : str
        Name and operator of the first node that reads it.
    elements : int
        Number of values.
    bits : int
        Width in the model.
    fixed : str
        Why it must keep this width; empty if it has a choice.
    """

    tensor: str
    node: str
    op_type: str
    elements: int
    bits: int
    fixed: str = ""


def average_bits(weights: Iterable[Weight], choice: Choice) -> float:
    """Return the mean width over the elements of all quantized weights.

    Examples
    --------
    >>> kinds = {"node": "n", "op_type": "Conv", "bits": 8}
    >>> a = Weight(tensor="a", elements=300, **kinds)
    >>> b = Weight(tensor="b", elements=100, **kinds)
    >>> average_bits([a, b], {"a": 4})
    5.0
    """
    known = list(weights)
    total = sum(weight.elements for weight in known)
    return sum(w.elements * choice.get(w.tensor, w.bits) for w in known) / total


def widths_of(rule: HardwareRule) -> tuple[int, ...]:
    """Return the weight widths of a rule's chip, the narrowest first.

    Raises
    ------
    OptionError
        The chip has only one.
    """
    if len(rule.weight_bits) > 1:
        return tuple(sorted(rule.weight_bits))
    only = "".join(map(str, rule.weight_bits))
    raise OptionError(
        f"Rule {rule.name}: its chip supports only weights of {only} bits, so there is nothing "
        f"to choose. To study other widths, give them, as in --widths 4,{only}."
    )


class Widths:
    """Makes versions of a model with given widths of its weights.

    A weight keeps its width if an override that names nodes or tensors set it, if it shares its
    parameters with other tensors, or if another tool chose its parameters.

    Parameters
    ----------
    model : QuantizedModel
        Calibrated, not fine-tuned.
    rule : HardwareRule
        The rule that the model was made with.
    widths : iterable of int
        The possible widths.

    Raises
    ------
    ModelError
        The model is fine-tuned, its quantized weights are not those of the rule, or its opset lacks
        a width.
    OptionError
        Fewer than two widths are given, or no weight has a choice.
    PlanError
        The model is not calibrated.
    RuleError
        A weight cannot have one of the widths.
    """

    def __init__(self, model: QuantizedModel, rule: HardwareRule, widths: Iterable[int]) -> None:
        model.check_calibrated()
        self.model, self.rule, self.widths = model, rule, tuple(sorted(set(widths)))
        self._tensors = model.floats.graph.tensors()
        self._given = [parse_override(text) for text in model.plan.overrides]
        self._observer = _observer_of(model)
        self._known: dict[tuple[str, int], QuantParams] = {}
        self.weights = tuple(self._weight(p) for p in model.plan.points if p.role == "weight")
        self.free = tuple(weight for weight in self.weights if not weight.fixed)
        self._check()
        self._plan = model.plan  # with the widest weights scales are smallest: a bias may not fit
        self._plan = self.at(self.uniform(self.widths[-1])).plan

    def uniform(self, bits: int) -> dict[str, int]:
        """Return the choice that gives all weights with a choice the same width."""
        return dict.fromkeys((weight.tensor for weight in self.free), bits)

    def average(self, choice: Choice) -> float:
        """Return the mean width over the elements of all quantized weights."""
        return average_bits(self.weights, choice)

    def at(self, choice: Choice) -> QuantizedModel:
        """Return the model with these widths."""
        points = tuple(_with_bits(point, choice) for point in self._plan.points)
        plan: QuantPlan = msgspec.structs.replace(self._plan, points=points)
        params = dict(self.model.params)
        for point in points:
            if point.tensor in choice and point.role == "weight":
                params[point.tensor] = self._params(point.tensor, point.spec)
        plan = fit_bias_range(plan, params, self._tensors, kept=self.model.taken)
        return self.model.with_params(params, state=self.model.state, plan=plan)

    def overrides(self, choice: Choice) -> tuple[Override, ...]:
        """Return overrides for ``insert`` that give these widths, after the model's own."""
        changed = [w for w in self.free if choice.get(w.tensor, w.bits) != w.bits]
        found = (
            Override(kind="tensor", pattern=re.escape(w.tensor), key="bits", value=choice[w.tensor])
            for w in changed
        )
        return (*self._given, *(apart(override, self._given) for override in found))

    def _weight(self, point: QuantPoint) -> Weight:
        edge = point.consumers[0]
        nodes = {node.name: node for node in self.model.floats.graph.nodes}
        return Weight(
            tensor=point.tensor,
            node=edge.node,
            op_type=nodes[edge.node].op if edge.node in nodes else "",
            elements=self._tensors[point.tensor].values.size,
            bits=point.spec.bits,
            fixed=self._why_fixed(point),
        )

    def _why_fixed(self, point: QuantPoint) -> str:
        if point.group is not None:
            return f"shares the parameters of '{point.group}'"
        if point.parameters in self.model.taken:
            return "its parameters come from another tool"
        for override in self._given:
            named = override.selects_nodes or override.kind == "tensor"
            if named and override.key in ("bits", "spec") and f", {override}" in point.reason:
                return f"override {override}"
        return ""

    def _params(self, tensor: str, spec: QuantSpec) -> QuantParams:
        key = tensor, spec.bits
        if key not in self._known:
            method = weight_method(spec, self._observer)
            low, high = weight_range(self._tensors[tensor].values, spec, method)
            self._known[key] = choose_qparams(low, high, spec)
        return self._known[key]

    def _check(self) -> None:
        name = self.model.name
        if self.model.state == "finetuned":
            raise ModelError(
                f"{name}: is fine-tuned for its present widths. Search in the file that 'onnxqat "
                "insert --data' wrote, insert with the new widths, and fine-tune again."
            )
        self._check_widths()
        if not self.free:
            raise OptionError(f"{name}: no weight may change its width. Insert without --set.")
        narrow = self.uniform(self.widths[0])
        plan = make_plan(self.model.floats.graph, self.rule, self.overrides(narrow))
        found = {p.tensor: p.spec.bits for p in plan.points if p.role == "weight"}
        if found != {w.tensor: narrow.get(w.tensor, w.bits) for w in self.weights}:
            raise ModelError(
                f"{name}: has other quantized weights than rule '{self.rule.name}' makes. Give the "
                "model's own rule by --rules, or insert again."
            )

    def _check_widths(self) -> None:
        given = ", ".join(map(str, self.widths))
        if not set(self.widths) <= set(WIDTHS):
            known = ", ".join(map(str, WIDTHS))
            raise OptionError(f"--widths {given}: not all are possible. Choose from {known}.")
        if len(self.widths) < 2:
            raise OptionError(f"--widths {given}: nothing to choose from. Give two or more.")
        if max(self.widths) > 8 and self.model.floats.graph.opset < OPSET_OF_16_BITS:
            raise ModelError(
                f"{self.model.name}: 16 bits need opset {OPSET_OF_16_BITS}. Insert with "
                "--set weight.bits=16 first."
            )
        for point in self.model.plan.points:
            for bits in self.widths if point.role == "weight" else ():
                wrong = wrong_spec(msgspec.structs.replace(point.spec, bits=bits))
                if wrong is not None:
                    message = f"{self.model.name}: '{point.tensor}' with {bits} bits: {wrong}"
                    raise RuleError(message)


def _with_bits(point: QuantPoint, choice: Choice) -> QuantPoint:
    if point.role != "weight" or point.tensor not in choice:
        return point
    spec = msgspec.structs.replace(point.spec, bits=choice[point.tensor])
    return msgspec.structs.replace(point, spec=spec)


def _observer_of(model: QuantizedModel) -> str:
    """Return the observer that a model was calibrated with."""
    stages = [stage for stage in model.history if stage.name == "calibrate"]
    return str(stages[-1].settings.get("observer", "mse")) if stages else "mse"
