"""Independent oracles: onnxruntime without onnxqat's session settings, and distances in ulp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]


def run_ort(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Run a model in onnxruntime, unfused and on one thread."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[Array] = session.run(None, dict(feeds))
    return outputs


def max_ulp(actual: Array, expected: Array) -> int:
    """Return the largest distance between two arrays, in units in the last place.

    Both arrays have the same shape and float type; +0 and -0 are equal.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    distance = np.abs(_ordinals(actual).astype(object) - _ordinals(expected).astype(object))
    return int(distance.max(initial=0))


def _ordinals(values: Array) -> Array:
    assert np.isfinite(values).all()
    integers = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    return np.where(integers < 0, np.iinfo(integers.dtype).min - integers, integers)


def sqnr_db(expected: Array, actual: Array) -> float:
    """Return the signal-to-quantization-noise ratio in dB."""
    noise = float(np.square(actual.astype(float) - expected).sum())
    signal = float(np.square(expected.astype(float)).sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
