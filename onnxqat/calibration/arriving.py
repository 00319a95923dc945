"""Whether the data reach a network as they did in training.

`onnxqat.preparation.statistics` knows what the first BatchNormalization saw. Of the channels there,
two figures are compared: by how many standard deviations the mean is off (the third quartile, as
a filter that sums to zero does not see the mean of an image), and by what factor the deviation
differs (the median). docs/usage.md says what both are under right and wrong settings.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.data import DataSet
from onnxqat.ends import TensorReader
from onnxqat.errors import ModelError
from onnxqat.preparation.order import sort_nodes
from onnxqat.preparation.statistics import Statistics, statistics_of
from onnxqat.preparation.unused import remove_unused
from onnxqat.quantized import AnyModel, QuantizedModel, float_part

__all__ = ["unlike_training"]

SAMPLES = 64
FEWEST = 8  # of fewer the figures say little
MAX_SHIFT = 0.75
MAX_FACTOR = 2.0


def unlike_training(
    model: AnyModel, data: DataSet, *, batch_size: int | None = None, threads: int = 0
) -> str | None:
    """Return in what the data differ from those a network was trained with, if it is plain.

    Parameters
    ----------
    model : Model
        Float or Q/DQ; its float network is run up to the first BatchNormalization.
    data : DataSet
        Up to 64 samples of it are read, or one batch.

    Returns
    -------
    str or None
        None also where the model remembers nothing, or does not run.
    """
    quantized = isinstance(model, QuantizedModel)  # prepared, so that nothing is left to change
    seen = statistics_of(float_part(model), in_place=quantized)
    if seen is None or len(data) < FEWEST:
        return None
    try:
        reader = _reader(model, seen.tensor, threads)
        size = data.batch_size(batch_size)
        wanted = min(max(SAMPLES // size, 1) * size, len(data))  # full batches
        chosen = np.linspace(0, len(data) - 1, wanted).astype(np.int64)
        batches = data.batches(size, indices=chosen)
        values = [batch.counting(reader.run(batch.inputs)[seen.tensor]) for batch in batches]
    except ModelError:  # is told by whoever needs the whole network to run
        return None
    return _difference(np.concatenate(values), seen)


def _reader(model: AnyModel, tensor: str, threads: int) -> TensorReader:
    """Return what runs the float network as far as a tensor."""
    graph = float_part(model).copy().graph
    tensors = graph.tensors()
    if tensor not in tensors:
        raise ModelError(f"{model.name}: no tensor '{tensor}'. Insert again.")
    graph.outputs = [tensors[tensor]]
    sort_nodes(graph)
    remove_unused(graph)
    read = {t.name for node in graph.nodes for t in node.inputs}
    graph.inputs = [t for t in graph.inputs if t.name in read]
    graph.outputs = []  # the reader adds it: graphsurgeon's need a type, which may not be known
    return TensorReader(gs.export_onnx(graph), [tensor], optimization="basic", threads=threads)


def _difference(values: NDArray[np.float32], seen: Statistics) -> str | None:
    if values.ndim < 2 or values.shape[1] <= max(seen.channels):
        return None
    found = np.moveaxis(values, 1, 0)[list(seen.channels)].reshape(len(seen.channels), -1)
    deviation = np.array(seen.deviation)
    with np.errstate(all="ignore"):
        off = np.abs(found.mean(axis=1, dtype=np.float64) - np.array(seen.mean)) / deviation
        shift = float(np.quantile(off, 0.75))
        ratios = np.log(found.std(axis=1, dtype=np.float64) / deviation)
        factor = float(np.exp(np.median(ratios)))
    if shift <= MAX_SHIFT and 1 / MAX_FACTOR <= factor <= MAX_FACTOR:
        return None
    return (
        f"at '{seen.tensor}' the data have {factor:.3g} times the standard deviation that the "
        f"network saw in training, and their mean is off by {shift:.3g} of it"
    )
