"""Analytic bias correction: compute the shift by weight rounding from batch statistics.

Nagel et al. 2019 (arXiv:1906.04721), section 4.2.1 and appendix B: with the error eps = W_q - W of
a layer's weight, its output shifts by

::

    E[y_q] - E[y] = eps E[x],    b -> b - eps E[x]      (Conv: eps is summed over its taps)

and E[x] follows from the statistics of the BatchNormalization before it
(`onnxqat.repair.expectations`). No data are read. The shift by rounding activations is ignored.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnxqat.nodes import is_op
from onnxqat.plan import Skip
from onnxqat.preparation.distributions import distributions_of
from onnxqat.qparams import fake_quantize
from onnxqat.quantized import QuantizedModel
from onnxqat.repair.bias_correction import Corrected, find_biases, finished, shift_bias
from onnxqat.repair.channels import find_channels
from onnxqat.repair.expectations import Expectations
from onnxqat.repair.layers import Layer

__all__ = ["correct_biases_analytically"]


def correct_biases_analytically(model: QuantizedModel) -> Corrected:
    """Return a calibrated model whose biases compensate for the rounding of its weights.

    Parameters
    ----------
    model : QuantizedModel
        A calibrated model; it is not changed. Its metadata contain the statistics of its
        BatchNormalizations, see `onnxqat.preparation.distributions`.

    Raises
    ------
    PlanError
        The model is not calibrated.
    """
    model.check_calibrated()
    corrected = replace(model, floats=model.floats.copy())
    graph = corrected.floats.graph
    network = find_channels(graph)
    layers = {str(layer.node.name): layer for layer in network.layers}
    expectations = Expectations(graph, network, distributions_of(corrected.floats))
    depths, skips = find_biases(corrected)
    nodes, done = {node.name: node for node in graph.nodes}, []
    for bias in (one for biases in depths for one in biases):
        shift = _shift(corrected, layers.get(bias.layer), expectations)
        if shift is None:
            reason = "the mean of its input does not follow from a BatchNormalization"
            skips.append(Skip(bias.layer, nodes[bias.layer].op, reason))
            continue
        shift_bias(nodes[bias.node], bias.position, -shift)
        done.append(bias.node)
    return finished(model, corrected, done, skips)


def _shift(
    model: QuantizedModel, layer: Layer | None, expectations: Expectations
) -> NDArray[np.float64] | None:
    """Return the shift of each output channel's mean by rounding the layer's weight, if known."""
    # in a ConvTranspose, the number of taps depends on the position
    if layer is None or is_op(layer.node, "ConvTranspose"):
        return None
    means = expectations.read_by(layer)
    if means is None:
        return None
    weight = layer.node.inputs[1]
    point = next(p for p in model.plan.points if p.tensor == weight.name and p.role == "weight")
    rounded = fake_quantize(weight.values, model.params[point.parameters], point.spec)
    error = layer.matrix(rounded.astype(np.float64) - weight.values).sum(axis=-1)
    return np.asarray(np.einsum("goi,gi->go", error, means).reshape(-1))
