"""Run a network in the integers of its chip, and compare it with the fake-quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.ends import TensorReader
from onnxqat.evaluation.integer.build import build_steps
from onnxqat.evaluation.integer.compare import Counts, PointDifference
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.steps import ProductStep, Step, Values
from onnxqat.pairs import integers_name, source_name
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule, load_rule

__all__ = ["IntegerProgram"]

Array = NDArray[Any]


class IntegerProgram:
    """A Q/DQ model in the integer arithmetic of its rule.

    Memory is bounded by the model and the tensors of one batch.

    Parameters
    ----------
    model : QuantizedModel
        Calibrated or fine-tuned.
    rule : HardwareRule, optional
        The rule (default: the bundled rule of the model's plan).
    compared : bool
        Whether `run` compares each tensor with the fake-quantized model, which takes as long again.

    Raises
    ------
    RuleError
        The arithmetic of the rule, or of an op in the model, is not documented.
    PlanError
        The model is not calibrated.
    """

    def __init__(
        self,
        model: QuantizedModel,
        rule: HardwareRule | None = None,
        *,
        threads: int = 0,
        compared: bool = True,
    ) -> None:
        plan = model.plan
        model.check_calibrated()
        params = model.params
        self.steps = build_steps(model, rule or load_rule(plan.rule), threads=threads)
        self.grids = {p.tensor: Grid(params[p.parameters], p.spec) for p in plan.grid_points()}
        self.outputs = [t.name for t in model.floats.graph.outputs]
        self.quantized_outputs = {
            self.outputs[e.index]: p.tensor
            for p in plan.grid_points()
            for e in p.consumers
            if not e.node
        }
        self.reference = _Reference(model, threads) if compared else None
        self.counts: dict[str, Counts] = {}

    def run(self, _: None, inputs: Mapping[str, Array]) -> list[Array]:
        """Return the model's outputs in float; count the differences of this batch."""
        reference = None if self.reference is None else self.reference.run(inputs)
        values = Values(floats=dict(inputs))
        for step in self.steps:
            result = step.run(values)
            values.levels |= result.levels
            values.floats |= result.floats
            if reference is not None:
                self._count(step, reference, values)
        return [self._output(name, values) for name in self.outputs]

    def tensors(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the real values of every tensor for one batch, by name in the float model.

        Tensors inside of a step are not included.
        """
        values = Values(floats=dict(inputs))
        for step in self.steps:
            result = step.run(values)
            values.levels |= result.levels
            values.floats |= result.floats
        known = {t: self.grids[t].dequantize(levels) for t, levels in values.levels.items()}
        return {**values.floats, **known}

    @property
    def points(self) -> tuple[PointDifference, ...]:
        """Differences over all batches, in the order of the program."""
        return tuple(counts.result(tensor) for tensor, counts in self.counts.items())

    def _count(self, step: Step, reference: Values, values: Values) -> None:
        """Run a step on the tensors of the reference, and count its differences."""
        changed = 0
        if isinstance(step, ProductStep):
            sums = step.accumulate(reference)
            alone, changed = step.finish(sums).levels, step.changed_by_bias(sums)
        else:
            alone = step.run(reference).levels
        for tensor, levels in alone.items():
            counts = self.counts.setdefault(tensor, Counts())
            counts.add(reference.levels[tensor], levels, values.levels[tensor])
            counts.bias += changed

    def _output(self, name: str, values: Values) -> Array:
        if name in self.quantized_outputs:
            tensor = self.quantized_outputs[name]
            return self.grids[tensor].dequantize(values.levels[tensor])
        return np.asarray(values.floats[name])


class _Reference:
    """The fake-quantized model, with every tensor that a step reads or writes as an output."""

    def __init__(self, model: QuantizedModel, threads: int) -> None:
        graph = model.floats.graph
        tensors, outputs = graph.tensors(), {t.name for t in graph.outputs}
        self.levels: dict[str, str] = {}
        inputs = {t.name for t in graph.inputs}
        self.floats = {name: name for name in inputs}
        for point in model.plan.grid_points():
            if not isinstance(tensors[point.tensor], gs.Constant):
                params = model.params[point.parameters]
                self.levels[point.tensor] = integers_name(point, params)
                self.floats[point.tensor] = source_name(point, outputs)
        others = (t.name for node in graph.nodes for t in node.outputs if t.name)
        self.floats |= {name: name for name in others if name not in self.floats}
        read = sorted({*self.levels.values(), *self.floats.values()} - inputs)
        self.reader = TensorReader(
            model.to_proto(), read, optimization="none", threads=threads, name=model.name
        )

    def run(self, inputs: Mapping[str, Array]) -> Values:
        """Return every tensor of one batch."""
        found = self.reader.run(inputs) | dict(inputs)
        return Values(
            levels={tensor: found[name] for tensor, name in self.levels.items()},
            floats={tensor: found[name] for tensor, name in self.floats.items()},
        )
