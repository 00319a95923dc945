"""Fit activations to scales that are powers of two.

If a scale must be a power of two, it is up to twice as large as the best scale of the tensor, or
clips. Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1, equations 7 and
8) leaves one number per tensor free: all channels of a tensor can be divided by the same factor.
The ratios of the channels do not change. The factor is chosen so that the best scale of the tensor
becomes a power of two.

A scale is written as 2^(m / 16) with an integer m. A tensor divided by 2^(a / 16), quantized with a
power of two, has the same relative error as the tensor itself with a scale whose m leaves the
remainder a by 16. So the error of each scale is computed once, and each factor a gets the least
error of its scales. Tensors that share channels get the factor with the least sum of errors, each
divided by the sum of the tensor's squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.calibration.observers import Seen, SquaredError
from onnxqat.ends import TensorReader
from onnxqat.model import Model
from onnxqat.qparams import QuantSpec, quantized_range
from onnxqat.repair.channels import Network, find_channels
from onnxqat.repair.scales import free_channels

__all__ = ["fitting_factors", "scales_of"]

STEPS = 16  # factors per octave
OCTAVES = 8  # of scales that are tried; the lowest ones clip most values

Floats = NDArray[np.float64]
Feeds = Mapping[str, NDArray[Any]]


def fitting_factors(
    model: Model, batches: Iterable[Feeds], specs: Mapping[str, QuantSpec], *, threads: int = 0
) -> dict[str, float]:
    """Return the number by which each tensor that a layer reads should be divided.

    Parameters
    ----------
    model : Model
        A prepared float model.
    batches : iterable of mapping of str to array
        Model inputs by name.
    specs : mapping of str to QuantSpec
        How tensors are quantized: per-tensor, with a scale that is a power of two.

    Returns
    -------
    dict of str to float
        The factors by tensor, between 0.7 and 1.42; without tensors that cannot be divided.
    """
    network = find_channels(model.graph)
    groups = _groups(network, specs)
    names = [name for group in groups for name in group]
    if not names:
        return {}
    reader = TensorReader(model.to_proto(), names, optimization="basic", threads=threads)
    seen = {name: Seen(batches=False, histogram=True) for name in names}
    for feeds in batches:
        for name, values in reader.run(feeds).items():
            seen[name].add(values)
    factors: dict[str, float] = {}
    for group in groups:
        errors = sum(_errors(seen[name], specs[name]) for name in group)
        best = int(np.argmin(errors))
        factor = 2.0 ** ((best if best < STEPS // 2 else best - STEPS) / STEPS)
        factors |= dict.fromkeys(group, factor)
    return factors


def scales_of(network: Network, factors: Mapping[str, float]) -> Floats:
    """Return the divisor of each channel number, for `onnxqat.repair.scaling.scale_channels`."""
    roots = network.sets.roots(np.arange(network.sets.count))
    scales = np.ones(roots.size)
    for name, factor in factors.items():
        scales[np.isin(roots, roots[network.tensors[name]])] = factor
    return scales


def _groups(network: Network, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the tensors that layers read and that can be divided; a group shares channels.

    The sets of the network are joined.
    """
    free = free_channels(network)
    read = {str(layer.node.inputs[0].name) for layer in network.layers} & network.tensors.keys()
    tensors = {name: network.tensors[name].reshape(-1) for name in names if name in read}
    for ids in tensors.values():
        network.sets.join(np.broadcast_to(ids[:1], ids.shape), ids)
    found: dict[int, list[str]] = {}
    for name, ids in tensors.items():
        found.setdefault(int(network.sets.roots(ids[:1])[0]), []).append(name)
    return [
        tuple(names) for names in found.values() if all(free[tensors[name]].all() for name in names)
    ]


def _errors(seen: Seen, spec: QuantSpec) -> Floats:
    """Return the least error of each factor, of shape (STEPS,), relative to the tensor's size."""
    top = max(-seen.low, seen.high)
    if not top > 0:
        return np.zeros(STEPS)
    signed = spec.signedness == "signed" or (spec.signedness == "from_range" and seen.low < 0)
    largest = quantized_range(spec, signed=signed)[1]
    # from an octave above the least scale that covers all values
    covering = int(np.ceil(STEPS * np.log2(top / largest)))
    exponents = covering + STEPS - 1 - np.arange(OCTAVES * STEPS)
    ends = (largest * 2.0 ** (exponents / STEPS)).tolist()
    error = SquaredError(seen.histogram, msgspec.structs.replace(spec, power_of_two=False))
    least = np.full(STEPS, np.inf)
    np.minimum.at(
        least, exponents % STEPS, [error.of(-end if signed else 0.0, end) for end in ends]
    )
    edges, counts = seen.histogram.occupied()
    squares = float(counts @ np.square(edges[:-1] + seen.histogram.width / 2))
    return least / squares
