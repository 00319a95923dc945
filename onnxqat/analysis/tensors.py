"""Compute every tensor of a model for one batch, by its name in the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.ends import TensorReader
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.run import Mode
from onnxqat.model import Model
from onnxqat.nodes import is_constant
from onnxqat.pairs import dequantized_name, source_name
from onnxqat.quantized import AnyModel, QuantizedModel, float_part, require_quantized
from onnxqat.rules import HardwareRule

__all__ = ["Run", "run_of"]

Array: TypeAlias = NDArray[Any]
Run: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]


def run_of(
    model: AnyModel, mode: Mode, *, rule: HardwareRule | None = None, threads: int = 0
) -> Run:
    """Return a function that computes all tensors of a model from its inputs, in graph order.

    Quantized tensors are returned as real values. Constants, and values that are not arrays of
    numbers, are left out.

    Parameters
    ----------
    model : Model or QuantizedModel
        The model. The modes ``float`` and ``qdq`` run a float model as it is.
    mode : {"float", "qdq", "integer"}
        How to run the model, see `onnxqat.evaluation.run`.
    rule : HardwareRule, optional
        Rule whose arithmetic ``integer`` uses (default: the bundled rule of the model's plan).

    Raises
    ------
    ModelError
        onnxruntime cannot run the model, or the mode is ``integer`` and the model is float.
    PlanError
        The model is not calibrated.
    RuleError
        ``integer``: the arithmetic of the rule, or of an op, is not documented.
    """
    names = list(dict.fromkeys(_computed(float_part(model).graph)))
    if mode == "integer":
        program = IntegerProgram(require_quantized(model), rule, threads=threads)
        return lambda inputs: _chosen(names, program.tensors(inputs))
    if mode == "qdq" and isinstance(model, QuantizedModel):
        return _run_of_pairs(model, names, threads)
    return _run_of_floats(float_part(model), names, threads)


def _run_of_floats(model: Model, names: list[str], threads: int) -> Run:
    fed = {tensor.name for tensor in model.graph.inputs}
    reader = TensorReader(
        model.to_proto(),
        [name for name in names if name not in fed],
        optimization="basic",
        threads=threads,
        name=model.name,
    )
    return lambda inputs: _chosen(names, {**inputs, **reader.run(inputs)})


def _run_of_pairs(model: QuantizedModel, names: list[str], threads: int) -> Run:
    model.check_calibrated()
    outputs = {tensor.name for tensor in model.floats.graph.outputs}
    fed = {tensor.name for tensor in model.floats.graph.inputs}
    source = {name: name for name in names}
    for point in model.plan.grid_points():
        if point.tensor in source and source_name(point, outputs) == point.tensor:
            source[point.tensor] = dequantized_name(point.tensor)
    reader = TensorReader(
        model.to_proto(),
        [name for name in source.values() if name not in fed],
        optimization="none",
        threads=threads,
        name=model.name,
    )

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = {**inputs, **reader.run(inputs)}
        return _chosen(names, {name: found[kept] for name, kept in source.items()})

    return run


def _computed(graph: gs.Graph) -> Iterator[str]:
    """Yield the names of the graph's inputs and of the nodes' outputs."""
    yield from (tensor.name for tensor in graph.inputs)
    for node in graph.nodes:
        if node.op != "Constant":
            yield from (t.name for t in node.outputs if t.name and not is_constant(t))


def _chosen(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors with these names that are arrays of numbers."""
    return {
        name: values[name]
        for name in names
        if isinstance(values.get(name), np.ndarray) and values[name].dtype.kind in "biuf"
    }
