"""Shapes that a free batch hides from shape inference."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.model import Model
from onnxqat.preparation.shapes import infer_shapes

__all__ = ["fixed_shapes"]

BATCHES = (2, 3)


def fixed_shapes(model: Model) -> dict[str, list[int | None]]:
    """Return the shape of each value, None for a length that depends on the batch.

    An exporter computes the shapes of its Reshapes from the batch, and inference gives up where
    that has no number. The shapes are inferred for two batches; what is the same holds for any.
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
