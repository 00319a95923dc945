"""Infer shapes that shape inference cannot find because of a dynamic batch or length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from onnxqat.model import Model
from onnxqat.nodes import is_op
from onnxqat.operators import RECURRENT
from onnxqat.preparation.shapes import infer_shapes

__all__ = ["fixed_shapes", "sample_shapes", "with_steps"]

BATCHES = (2, 3)
ANY_LENGTH = 64


def with_steps(model: Model, shapes: Mapping[str, Sequence[int]]) -> Model:
    """Return a model whose recurrent layers have a known number of steps.

    Parameters
    ----------
    model : Model
        It is not changed. A model without a recurrent layer is returned as it is.
    shapes : mapping of str to sequence of int
        A shape for each input; it replaces the dynamic lengths behind the first axis. The dynamic
        lengths of other inputs become 64.
    """
    if not any(is_op(node, *RECURRENT) for node in model.graph.nodes):
        return model
    fixed = model.copy()
    inputs = {tensor.name: tensor for tensor in fixed.graph.inputs}
    for name, tensor in inputs.items():
        if tensor.shape:
            given = shapes.get(name, [ANY_LENGTH] * len(tensor.shape))
            pairs = zip(tensor.shape[1:], given[1:], strict=True)
            rest = (length if isinstance(length, int) else known for length, known in pairs)
            tensor.shape = [tensor.shape[0], *rest]
    free = {}
    for name, tensor in fixed.graph.tensors().items():
        if name not in inputs and not all(isinstance(n, int) for n in tensor.shape or ()):
            free[name], tensor.shape = tensor.shape, None
    infer_shapes(fixed.graph)
    for name, tensor in fixed.graph.tensors().items():
        if tensor.shape is None and name in free:  # shape inference does not know its operator
            tensor.shape = free[name]
    return fixed


def fixed_shapes(model: Model) -> dict[str, list[int | None]]:
    """Return the shape of each value, with None for lengths that depend on the batch.

    Exporters compute the shapes of Reshapes from the batch, which inference cannot follow if the
    batch is dynamic. So shapes are inferred for two batch sizes; equal lengths hold for any batch.
    """
    small, large = (_shapes(model, batch) for batch in BATCHES)
    return {
        name: [a if a == b else None for a, b in zip(shape, large[name], strict=True)]
        for name, shape in small.items()
        if len(shape) == len(large.get(name, ()))
    }


def _shapes(model: Model, batch: int) -> dict[str, list[int | None]]:
    graph = model.copy().graph
    inputs = {tensor.name for tensor in graph.inputs}
    for tensor in graph.tensors().values():
        if tensor.name in inputs and tensor.shape and not isinstance(tensor.shape[0], int):
            tensor.shape = [batch, *tensor.shape[1:]]
        elif isinstance(tensor, gs.Variable) and tensor.name not in inputs:
            tensor.shape = None
    infer_shapes(graph)
    return {
        name: [size if isinstance(size, int) else None for size in tensor.shape]
        for name, tensor in graph.tensors().items()
        if tensor.shape is not None
    }


def sample_shapes(model: Model) -> dict[str, tuple[int | str, ...]]:
    """Return the shapes of the values with one row per sample along the first axis.

    The first length is ``"N"``. For a model with a fixed batch, all values with a known shape are
    returned, and the first length is the fixed one.
    """
    firsts = [tensor.shape[0] for tensor in model.graph.inputs if tensor.shape]
    fixed = all(isinstance(first, int) for first in firsts)
    small, large = (_shapes(model, batch) for batch in BATCHES)
    found: dict[str, tuple[int | str, ...]] = {}
    for name, shape in small.items():
        lengths, others = tuple(shape), tuple(large.get(name, ()))
        if None in lengths or len(others) != len(lengths) or not lengths:
            continue
        if fixed and lengths == others:
            found[name] = lengths  # type: ignore[assignment]
        elif not fixed and (lengths[0], others[0]) == BATCHES and lengths[1:] == others[1:]:
            found[name] = ("N", *lengths[1:])  # type: ignore[arg-type]
    return found
