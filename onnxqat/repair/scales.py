"""Compute the scales of cross-layer equalization.

Nagel et al. 2019 (arXiv:1906.04721), section 4.1: if output channel i of the first weight has the
range r1_i, and input channel i of the second weight has the range r2_i, the scale

::

    s_i = sqrt(r1_i * r2_i) / r2_i                                      (equation 11)
    W1 -> W1 / s,  b1 -> b1 / s,  W2 -> W2 * s                          (equations 7 and 8)

makes both ranges equal to sqrt(r1_i * r2_i). All pairs are equalized in order, repeatedly, until
the scales no longer change. A range is the largest magnitude, because weights are quantized
symmetrically.

If several layers write channels that share a scale (the branches of an Add), r1_i is the largest of
their ranges, each relative to the largest range of its layer, so that layers with small and with
large weights count equally. The same applies to r2_i if several layers read the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxqat.preparation.editing import constant_values
from onnxqat.repair.channels import Network
from onnxqat.repair.layers import Layer
from onnxqat.repair.sets import ChannelSets, Ids

__all__ = ["Spread", "find_scales", "free_channels", "spreads"]

Floats = NDArray[np.float64]

MAX_SWEEPS = 200
CONVERGED = 1e-3  # octaves: stop when all scales change by less than 0.07 %
# A channel whose range, relative to the largest, is below this is taken for zero.
DEAD = 2.0**-16


class Spread(NamedTuple):
    """How far the channels of a weight lie below its largest one: the mean, in octaves.

    Only channels that equalization can scale count; ``after`` is the value after equalization.
    """

    node: str
    before: float
    after: float


class _Port(NamedTuple):
    """The input or the output side of a layer, and the layer's number."""

    layer: int
    ids: Ids  # channel numbers, of shape (groups, channels of a group)
    axis: int  # axis of the layer's matrix over which the maximum is taken


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Channels that are equalized together, with the layers that write and read them."""

    writers: tuple[_Port, ...]
    readers: tuple[_Port, ...]


def find_scales(network: Network, *, sweeps: int = MAX_SWEEPS) -> Floats:
    """Return the scale of each channel number, by which the channel is to be divided.

    Parameters
    ----------
    sweeps : int
        The most sweeps over all pairs.

    Returns
    -------
    array of shape (channel numbers,), float64
        The scales; 1 for channels that must not be scaled.
    """
    roots = network.sets.roots(np.arange(network.sets.count))
    free = free_channels(network)
    scales = np.ones(roots.size + 1)  # the last one belongs to all fixed channels
    numbers = np.where(free, roots, roots.size)
    ports = [(numbers[layer.inputs], numbers[layer.outputs]) for layer in network.layers]
    magnitudes = {  # only of the layers that are needed: weights can be large
        number: _magnitudes(network.layers[number])
        for number, sides in enumerate(ports)
        if any((ids != roots.size).any() for ids in sides)
    }
    groups = list(_groups(ports, roots.size))
    for _ in range(sweeps):
        changes = [_equalize(group, magnitudes, ports, scales) for group in groups]
        if max(changes, default=0.0) < CONVERGED:
            break
    return np.asarray(scales[numbers])


def free_channels(network: Network) -> NDArray[np.bool_]:
    """Return for each channel number whether the channel can be scaled."""
    roots = network.sets.roots(np.arange(network.sets.count))
    free = np.zeros(roots.size, bool)
    for channel in np.unique(roots).tolist():
        free[channel] = network.sets.fixed_because(channel) is None
    for side in ("inputs", "outputs"):
        seen = np.zeros(roots.size, bool)
        for layer in network.layers:
            seen[roots[getattr(layer, side)]] = True
        free &= seen
    return np.asarray(free[roots])


def spreads(network: Network, scales: Floats) -> tuple[Spread, ...]:
    """Return the spread of each weight that has scaled channels, in graph order."""
    found = []
    for layer in network.layers:
        inputs, outputs = scales[layer.inputs], scales[layer.outputs]
        moving = (outputs != 1, inputs != 1)
        if any(side.any() for side in moving):
            before = _magnitudes(layer)
            after = before * inputs[:, None, :] / outputs[:, :, None]
            name = str(layer.node.name)
            found.append(Spread(name, _octaves(before, moving), _octaves(after, moving)))
    return tuple(found)


def _octaves(magnitudes: NDArray[Any], moving: Sequence[NDArray[np.bool_]]) -> float:
    top = magnitudes.max()
    ranges = [magnitudes.max(axis=axis)[side] for axis, side in zip((2, 1), moving, strict=True)]
    alive = np.concatenate(ranges)
    alive = alive[alive > DEAD * top]
    return float(np.log2(top / alive).mean()) if alive.size else 0.0


def _magnitudes(layer: Layer) -> NDArray[np.float32]:
    """Return the largest magnitude over the taps, of shape (groups, outputs, inputs)."""
    weight = constant_values(layer.node.inputs[1])
    assert weight is not None  # true for each layer of a `Network`
    return np.asarray(np.abs(layer.matrix(weight)).max(axis=-1), np.float32)


def _groups(ports: Sequence[tuple[Ids, Ids]], fixed: int) -> Iterator[_Group]:
    """Yield the channels that are equalized together, in the order of the layers."""
    together = ChannelSets()
    together.new(fixed + 1)
    for sides in ports:
        for ids in sides:
            moving = ids[ids != fixed]
            together.join(np.broadcast_to(moving[:1], moving.shape), moving)
    writers: dict[int, list[_Port]] = {}
    readers: dict[int, list[_Port]] = {}
    for number, (inputs, outputs) in enumerate(ports):
        for ids, axis, found in ((outputs, 2, writers), (inputs, 1, readers)):
            moving = ids[ids != fixed]
            if moving.size:
                key = int(together.roots(moving[:1])[0])
                found.setdefault(key, []).append(_Port(number, ids, axis))
    for key, ones in writers.items():
        yield _Group(writers=tuple(ones), readers=tuple(readers[key]))


def _equalize(
    group: _Group,
    magnitudes: Mapping[int, NDArray[np.float32]],
    ports: Sequence[tuple[Ids, Ids]],
    scales: Floats,
) -> float:
    """Multiply the scales of a group; return the largest change, in octaves."""

    def ranges(port: _Port) -> NDArray[np.float32]:
        inputs, outputs = (scales[ids].astype(np.float32) for ids in ports[port.layer])
        scaled = magnitudes[port.layer] * inputs[:, None, :] / outputs[:, :, None]
        return np.asarray(scaled.max(axis=port.axis))

    first = _combined([(p.ids, ranges(p)) for p in group.writers], scales.size)
    second = _combined([(p.ids, ranges(p)) for p in group.readers], scales.size)
    alive = (first > DEAD * first.max()) & (second > DEAD * second.max())
    alive[-1] = False
    factors = np.sqrt(first[alive] / second[alive])
    scales[alive] *= factors
    return float(np.abs(np.log2(factors)).max(initial=0.0))


def _combined(sides: Sequence[tuple[Ids, NDArray[np.float32]]], count: int) -> Floats:
    """Return the combined range of each channel over the layers that write (or read) it."""
    largest = np.array([max(float(ranges.max()), np.finfo(np.float32).tiny) for _, ranges in sides])
    size = float(np.exp(np.log(largest).mean()))
    combined = np.zeros(count)
    for (ids, ranges), top in zip(sides, largest, strict=True):
        np.maximum.at(combined, ids.reshape(-1), ranges.reshape(-1).astype(np.float64) / top * size)
    return combined
