"""Fix the dynamic lengths of a float model's inputs, as many compilers require."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import ModelError, OptionError
from onnxqat.model import Model
from onnxqat.preparation.folding import fold_shapes
from onnxqat.preparation.shapes import infer_shapes
from onnxqat.runtime import UnknownOpError, open_session

__all__ = ["fix_shapes"]

logger = logging.getLogger(__name__)

Dimension = int | str | None


def fix_shapes(model: Model, batch: int | None, shapes: Mapping[str, Sequence[int]]) -> Model:
    """Return a model whose inputs have these shapes, after running it once on zeros.

    A Shape that these determine becomes a constant: some tools read neither ``start`` nor ``end``.

    Parameters
    ----------
    model : Model
        A float model; it is not changed.
    batch : int or None
        Length for the first axis of each input, if it is dynamic.
    shapes : mapping of str to sequence of int
        Complete shapes of inputs, by name. A named length is fixed wherever its name occurs.

    Raises
    ------
    OptionError
        There is no such input, or the shape contradicts the input's own.
    ModelError
        The model does not run at these shapes.
    """
    fixed = model.copy()
    inputs = {tensor.name: tensor for tensor in fixed.graph.inputs}
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            known = ", ".join(map(repr, inputs))
            raise OptionError(f"--input-shape: there is no input '{name}'. The inputs are {known}.")
        _fix(inputs[name], list(shape), lengths)
    for tensor in inputs.values():
        if batch is not None and tensor.shape:
            _fix(tensor, [batch, *tensor.shape[1:]], lengths)
    for tensor in inputs.values():
        tensor.shape = [lengths.get(n, n) for n in tensor.shape or ()]
    outputs = {tensor.name for tensor in fixed.graph.outputs}
    for name, tensor in fixed.graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name not in inputs:
            free = any(not isinstance(n, int) for n in tensor.shape or ())
            tensor.shape = None if free or name not in outputs else tensor.shape
    infer_shapes(fixed.graph)
    fold_shapes(fixed.graph)
    _run(fixed)
    return fixed


def _fix(tensor: gs.Variable, wanted: list[Dimension], lengths: dict[str, int]) -> None:
    """Set the shape of an input, and record the lengths of its named dimensions."""
    shape: list[Dimension] = list(tensor.shape or ())
    pairs = list(zip(shape, wanted, strict=False))
    differs = any(isinstance(n, int) and n != new for n, new in pairs)
    differs |= any(isinstance(n, str) and lengths.get(n, new) != new for n, new in pairs)
    if len(shape) != len(wanted) or differs:
        said = "x".join(map(str, wanted))
        raise OptionError(
            f"'{tensor.name}': {said} does not fit its shape {'x'.join(map(str, shape))}. Repeat "
            "the fixed lengths, and give equal lengths for equal names."
        )
    lengths |= {n: new for n, new in pairs if isinstance(n, str) and isinstance(new, int)}
    tensor.shape = wanted


def _run(model: Model) -> None:
    """Run a model on zeros, unless it still has dynamic lengths.

    Raises
    ------
    ModelError
        A node does not run, for example a Reshape to the batch size of the export.
    """
    inputs = model.graph.inputs
    if not all(isinstance(n, int) for tensor in inputs for n in tensor.shape or ()):
        return
    zeros = {tensor.name: np.zeros(tensor.shape or (), tensor.dtype) for tensor in inputs}
    try:
        session = open_session(model.to_proto(), optimization="basic", name=model.name)
    except UnknownOpError as error:
        logger.warning("%s The fixed shapes were not tried.", error)
        return
    for tensor, value in zip(model.graph.outputs, session.run(None, zeros), strict=True):
        said = tensor.shape or ()
        if len(said) == np.ndim(value) and any(
            isinstance(n, int) and n != length
            for n, length in zip(said, np.shape(value), strict=True)
        ):
            raise ModelError(
                f"{model.name}: output '{tensor.name}' has the shape {np.shape(value)} for these "
                f"inputs, but the model states {tuple(said)}. Export it with dynamic lengths."
            )
