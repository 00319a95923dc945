"""Check whether the data reach a network with the same statistics as in training.

`onnxqat.preparation.statistics` reads the mean and deviation that the first BatchNormalization saw
in training. Two figures compare its channels with the data: by how many standard deviations the
means differ (third quartile of the channels, because a filter that sums to zero does not depend on
the mean of an image), and by what factor the deviations differ (median of the channels).
docs/usage.md has both figures for right and wrong settings.
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
FEWEST = 8  # with fewer samples the figures are too noisy
MAX_SHIFT = 0.75
MAX_FACTOR = 2.0


def unlike_training(
    model: AnyModel, data: DataSet, *, batch_size: int | None = None, threads: int = 0
) -> str | None:
    """Return how the data differ from the training data of a network, if they clearly do.

    Parameters
    ----------
    model : Model
        Float or Q/DQ; its float network is run up to the first BatchNormalization.
    data : DataSet
        The data. At most 64 samples are read, or one batch.

    Returns
    -------
    str or None
        The difference. None if there is no clear difference, if the model has no statistics, or if
        it does not run.
    """
    quantized = isinstance(model, QuantizedModel)  # its float network is prepared already
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
    except ModelError:  # the caller runs the whole network and reports the error
        return None
    return _difference(np.concatenate(values), seen)


def _reader(model: AnyModel, tensor: str, threads: int) -> TensorReader:
    """Return a reader that runs the float network up to a tensor."""
    graph = float_part(model).copy().graph
    tensors = graph.tensors()
    if tensor not in tensors:
        raise ModelError(f"{model.name}: no tensor '{tensor}'. Insert again.")
    graph.outputs = [tensors[tensor]]
    sort_nodes(graph)
    remove_unused(graph)
    read = {t.name for node in graph.nodes for t in node.inputs}
    graph.inputs = [t for t in graph.inputs if t.name in read]
    graph.outputs = []  # the reader adds it; graphsurgeon would need its type, perhaps unknown
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
        f"network saw in training, and their mean is off by {shift:.3g} standard deviations"
    )
