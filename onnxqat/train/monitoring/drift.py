"""Measure how far training moved the scales, and how many values are clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.ends import TensorReader
from onnxqat.pairs import source_name
from onnxqat.plan import QuantPoint
from onnxqat.qparams import QuantParams, quantized_range, rounded_levels
from onnxqat.quantized import QuantizedModel

__all__ = ["clipped_shares", "scale_drift"]


def scale_drift(start: QuantizedModel, model: QuantizedModel) -> dict[str, float]:
    """Return log2 of the ratio of each scale to that of ``start``, by `QuantPoint.parameters`.

    For per-axis scales, it is the ratio of the channel whose scale changed most.
    """
    before, drift = start.params, {}
    for name, params in model.params.items():
        logs = np.log2(params.scale.astype(np.float64) / before[name].scale).reshape(-1)
        drift[name] = float(logs[np.argmax(np.abs(logs))])
    return drift


def clipped_shares(
    model: QuantizedModel, inputs: Mapping[str, NDArray[Any]], *, threads: int = 0
) -> dict[str, float]:
    """Return the fraction of clipped values of each point, by `QuantPoint.tensor`.

    A value is clipped if its rounded level is not in ``[qmin, qmax]``.

    Parameters
    ----------
    model : QuantizedModel
        The Q/DQ model, which computes the activations for ``inputs``.
    inputs : mapping of str to array
        One batch, by model input.
    threads : int
        The number of threads (0: all cores).
    """
    graph, points = model.floats.graph, model.plan.grid_points()
    tensors, outputs = graph.tensors(), {t.name for t in graph.outputs}
    sources = {p.tensor: source_name(p, outputs) for p in points}
    known = dict(inputs)
    known |= {n: tensors[n].values for n in sources if isinstance(tensors[n], gs.Constant)}
    wanted = set(sources.values()) - known.keys()
    reader = TensorReader(
        model.to_proto(), wanted, optimization="basic", threads=threads, name=model.name
    )
    known |= reader.run(inputs)
    params = model.params
    return {p.tensor: _clipped(known[sources[p.tensor]], p, params) for p in points}


def _clipped(values: NDArray[Any], point: QuantPoint, params: Mapping[str, QuantParams]) -> float:
    own = params[point.parameters]
    qmin, qmax = quantized_range(point.spec, signed=own.signed)
    levels = rounded_levels(values, own, point.spec)
    return float(np.mean((levels < qmin) | (levels > qmax)))
