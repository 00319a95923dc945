"""What training did to the quantization: how far scales moved, and what is cut off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.ends import TensorReader
from onnxqat.insert import plan_of, read_params
from onnxqat.model import Model, to_proto
from onnxqat.plan import QuantPoint
from onnxqat.qparams import QuantParams, quantized_range, rounded_levels

__all__ = ["clipped_shares", "scale_drift"]


def scale_drift(start: Model, model: Model) -> dict[str, float]:
    """Return log2 of how far each scale moved from ``start``, by `QuantPoint.parameters`.

    Where there is one scale per channel, it is that of the channel which moved furthest.
    """
    before, drift = read_params(start), {}
    for name, params in read_params(model).items():
        logs = np.log2(params.scale.astype(np.float64) / before[name].scale).reshape(-1)
        drift[name] = float(logs[np.argmax(np.abs(logs))])
    return drift


def clipped_shares(
    model: Model, inputs: Mapping[str, NDArray[Any]], *, threads: int = 0
) -> dict[str, float]:
    """Return which fraction of the values lies beyond the clipping range, by `QuantPoint.tensor`.

    A value is beyond it when its rounded level is not in ``[qmin, qmax]``.

    Parameters
    ----------
    model : Model
        Q/DQ; activations are what it computes for ``inputs``.
    inputs : mapping of str to array
        One batch, by model input.
    threads : int
        0 takes all cores.
    """
    nodes = {n.name: n for n in model.graph.nodes}
    points = plan_of(model).grid_points()
    sources = {p.tensor: nodes[f"{p.tensor}/QuantizeLinear"].inputs[0] for p in points}
    known = dict(inputs)
    known |= {t.name: t.values for t in sources.values() if isinstance(t, gs.Constant)}
    wanted = {t.name for t in sources.values()} - known.keys()
    reader = TensorReader(
        to_proto(model), wanted, optimization="basic", threads=threads, name=model.name
    )
    known |= reader.run(inputs)
    params = read_params(model)
    return {p.tensor: _clipped(known[sources[p.tensor].name], p, params) for p in points}


def _clipped(values: NDArray[Any], point: QuantPoint, params: dict[str, QuantParams]) -> float:
    own = params[point.parameters]
    qmin, qmax = quantized_range(point.spec, signed=own.signed)
    levels = rounded_levels(values, own, point.spec)
    return float(np.mean((levels < qmin) | (levels > qmax)))
