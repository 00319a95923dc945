"""Graphs written by real exporters, with random weights from a seed (scripts/drop_weights.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

FOLDER = Path(__file__).parent / "graphs"
EXPORTED = tuple(sorted(path.stem for path in FOLDER.glob("*.onnx")))


def exported(name: str) -> onnx.ModelProto:
    """Return a graph with random weights: normal by the fan-in, and vectors from 0.5 to 1.5."""
    model = onnx.load(FOLDER / f"{name}.onnx")
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.raw_data or tensor.float_data:
            continue
        shape = tuple(tensor.dims)
        fan_in = math.prod(shape[1:])
        values = rng.normal(size=shape) / math.sqrt(fan_in)
        values = values if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return model


def example(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs for one sample: normal floats, indices of 0 and 1."""
    rng = np.random.default_rng(1)
    weights = {t.name for t in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            shape = [d.dim_value or 1 for d in kind.shape.dim]
            drawn = rng.normal(size=shape) if kind.elem_type == 1 else rng.integers(0, 2, shape)
            feeds[value.name] = drawn.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feeds
