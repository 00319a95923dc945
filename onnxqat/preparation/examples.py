"""Run a model on random inputs, to compare its outputs with another model's."""

from __future__ import annotations

import math

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.runtime import Session

__all__ = ["Feeds", "run_example"]

LENGTHS = (1, 8, 64, 256)  # lengths tried for dynamic dimensions

MAX_ELEMENTS = 2**27  # the most elements of a random input

Feeds = dict[str, NDArray[np.generic]]


def run_example(
    session: Session, graph: onnx.GraphProto, why: str, advice: str
) -> tuple[Feeds, list[NDArray[np.generic]]]:
    """Return random inputs that the model accepts, and its outputs.

    Parameters
    ----------
    session : Session
        A session of the model.
    graph : onnx.GraphProto
        The model's graph.
    why, advice : str
        The beginning and the end of an error message.

    Raises
    ------
    ModelError
        The model fails with every tried length, or an input is too large or has no type.
    """
    reason = ""
    for length in LENGTHS:
        feeds = _random_inputs(graph, length, why, advice)
        try:
            return feeds, session.run(None, feeds)
        except Exception as error:  # the bindings raise a class per status code
            reason = str(error).splitlines()[0]
    raise ModelError(f"{why} does not run on random inputs ({reason}). {advice}")


def _random_inputs(graph: onnx.GraphProto, length: int, why: str, advice: str) -> Feeds:
    """Return seeded values for every input that is not an initializer; integers are 0 or 1."""
    rng = np.random.default_rng(0)
    initializers = {t.name for t in graph.initializer}
    feeds: Feeds = {}
    for value in graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else length for d in kind.shape.dim]
        if not kind.elem_type or math.prod(shape) > MAX_ELEMENTS:
            raise ModelError(
                f"{why} cannot be compared on random inputs: none can be made for '{value.name}' "
                f"of shape {shape}. {advice}"
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        drawn = rng.normal(size=shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name] = drawn.astype(dtype)
    return feeds
