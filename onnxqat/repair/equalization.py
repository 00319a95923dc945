"""Cross-layer equalization and related steps: the same function with weights that quantize better.

If the channel ranges of a layer differ much, the scale of the largest channel leaves the others few
integers, in the weight and in the activation behind it. Nagel et al. 2019 (arXiv:1906.04721,
section 4.1) divide each output channel of a layer by a number and multiply the next layer by it.
Apart from rounding, this changes nothing if the function between the layers is positively
homogeneous: f(s * x) = s * f(x) for s > 0.

The steps, in order: replace ReLU6 by Relu where that changes little (`onnxqat.repair.relu6`),
equalize channels, smooth normalizations (`onnxqat.repair.migration`), absorb high biases
(`onnxqat.repair.absorption`), and fit activations to scales that are powers of two
(`onnxqat.repair.fitting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.ends import TensorReader
from onnxqat.errors import ModelError
from onnxqat.model import Model
from onnxqat.plan import Skip
from onnxqat.preparation.distributions import (
    Distribution,
    distributions_of,
    note_distributions,
)
from onnxqat.preparation.statistics import divide_statistics
from onnxqat.qparams import QuantSpec
from onnxqat.repair.absorption import Absorption
from onnxqat.repair.channels import Network, find_channels
from onnxqat.repair.difference import Difference, differences, is_rounding
from onnxqat.repair.fitting import fitting_factors, scales_of
from onnxqat.repair.migration import Migration, migrate
from onnxqat.repair.originals import note_originals
from onnxqat.repair.relu6 import NOTHING, Relu6, Replaced, replaced_relu6
from onnxqat.repair.scales import Spread, find_scales, spreads
from onnxqat.repair.scaling import scale_channels

__all__ = ["Equalized", "equalize", "unevenness"]

# Equalization is advised if it moves the channels of a layer closer to the largest one by at least
# this many octaves, on average.
UNEVEN = 2.0
# Models with more weights get no such advice, because it would take too long: 256 MiB of float32.
MOST_ELEMENTS = 2**26
ESTIMATE = 3  # sweeps over the network that estimate the gain

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """A float model after equalization, and what was done.

    Attributes
    ----------
    model : Model
        The equalized model. It computes the same as the prepared model, except for float rounding
        and the changes listed in ``relu6`` and ``absorption_cost``.
    layers : tuple of str
        Names of the nodes whose weight changed.
    skips : tuple of Skip
        The layers whose output channels keep their scale and the unchanged normalizations, with
        reasons.
    spreads : tuple of Spread
        How unequal the channel ranges of each weight were before and are now.
    differences : tuple of Difference
        The change of each output by equalization and migration, which is float rounding.
    migrations : tuple of Migration
        The smoothed normalizations.
    relu6 : Replaced
        The Clip nodes that were or could be replaced by a Relu, and the change of each output.
    absorbed : tuple of str
        Names of the nodes whose high biases were absorbed.
    absorption_cost : tuple of Difference
        The change of each output by absorption.
    fitted : tuple of str
        Names of the activations that were fitted to powers of two.
    """

    model: Model
    layers: tuple[str, ...]
    skips: tuple[Skip, ...]
    spreads: tuple[Spread, ...]
    differences: tuple[Difference, ...]
    migrations: tuple[Migration, ...] = ()
    relu6: Replaced = NOTHING
    absorbed: tuple[str, ...] = ()
    absorption_cost: tuple[Difference, ...] = ()
    fitted: tuple[str, ...] = ()


def equalize(
    model: Model,
    batches: Iterable[Feeds] | None = None,
    *,
    relu6: Relu6 = "auto",
    activations: Mapping[str, QuantSpec] = MappingProxyType({}),
    threads: int = 0,
) -> Equalized:
    """Return a prepared float model with equalized channel ranges.

    Parameters
    ----------
    model : Model
        A model from `onnxqat.prepare`; it is not changed.
    batches : iterable of mapping of str to array, optional
        Model inputs by name, on which outputs are compared (default: random values). Without data,
        normalizations are not smoothed, ``relu6="auto"`` replaces nothing, and high biases are
        absorbed only if the statistics of a BatchNormalization give their distribution.
    relu6 : {"auto", "keep", "replace"}
        See `onnxqat.repair.relu6`.
    activations : mapping of str to QuantSpec
        How activations will be quantized, by tensor. With data, those whose scales are powers of
        two are fitted to them.

    Raises
    ------
    ModelError
        The outputs changed by more than float32 rounding, or the model does not run.
    """
    feeds = None if batches is None else list(batches)
    start, relus = replaced_relu6(model, feeds, relu6, threads=threads)
    result = start.copy()
    network = find_channels(result.graph)
    scales = find_scales(network)
    measured = spreads(network, scales)
    changed = scale_channels(result.graph, network, scales)
    _divide_remembered(result, network, scales)
    migrations, kept = migrate(result, feeds, threads=threads)
    found: tuple[Difference, ...] = ()
    if changed or migrations:
        found = differences(start, result, feeds, threads=threads)
        _refuse_changes(found, model.name)
    exact = result.copy()
    absorbed = _absorb(result, network, feeds, threads)
    specs = {name: spec for name, spec in activations.items() if spec.power_of_two}
    fitted: tuple[str, ...] = ()
    if feeds and specs:
        fitted = _fit((exact, result) if absorbed else (result,), feeds, specs, threads)
    if absorbed:
        note_originals(exact, result)
    return Equalized(
        model=result,
        layers=changed,
        skips=(*_skips(network, scales), *kept),
        spreads=measured,
        differences=found,
        migrations=migrations,
        relu6=relus,
        absorbed=absorbed,
        absorption_cost=differences(exact, result, feeds, threads=threads) if absorbed else (),
        fitted=fitted,
    )


def unevenness(graph: gs.Graph) -> list[Spread]:
    """Return the layers of a prepared graph for which equalization is advised.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        The graph; it is not changed.

    Returns
    -------
    list of Spread
        The layers whose channels equalization would move closer to the largest one by `UNEVEN`
        octaves or more, on average; the worst first. Empty if the weights have more than
        `MOST_ELEMENTS` elements.
    """
    network = find_channels(graph)
    if sum(one.inputs.size * one.outputs.shape[1] for one in network.layers) > MOST_ELEMENTS:
        return []
    found = spreads(network, find_scales(network, sweeps=ESTIMATE))
    uneven = [one for one in found if one.before - one.after >= UNEVEN]
    return sorted(uneven, key=lambda one: one.after - one.before)


def _divide_remembered(model: Model, network: Network, scales: NDArray[np.float64]) -> None:
    """Divide the stored statistics and distributions by the scales of their channels."""
    divisors = {
        name: scales[ids.reshape(-1)]
        for name, ids in network.tensors.items()
        if ids.ndim > 1 and ids.size == ids.shape[1]
    }
    divide_statistics(model, divisors)
    known = distributions_of(model)
    for name in known.keys() & divisors.keys():
        if known[name].mean.size == divisors[name].size:
            known[name] = Distribution(*(values / divisors[name] for values in known[name]))
    note_distributions(model, known)


def _absorb(
    model: Model, network: Network, batches: Sequence[Feeds] | None, threads: int
) -> tuple[str, ...]:
    """Move high biases into the next layers; return the names of the layers that had them."""
    absorption, known = Absorption(model.graph, network), distributions_of(model)
    unknown = [name for name in absorption.tensors if name not in known]
    smallest = _smallest(model, unknown, batches, threads) if batches and unknown else {}
    amounts = absorption.amounts(known, smallest)
    changed = absorption.apply(amounts)
    for name in known.keys() & amounts.keys():
        known[name] = known[name]._replace(mean=known[name].mean - amounts[name])
    note_distributions(model, known)
    return changed


def _fit(
    models: Sequence[Model],
    batches: Iterable[Feeds],
    specs: Mapping[str, QuantSpec],
    threads: int,
) -> tuple[str, ...]:
    """Fit the activations of the last model, and divide those of all models alike.

    Return the names of the tensors that were divided.
    """
    factors = fitting_factors(models[-1], batches, specs, threads=threads)
    for model in models:
        before, network = model.copy(), find_channels(model.graph)
        scales = scales_of(network, factors)
        scale_channels(model.graph, network, scales)
        _divide_remembered(model, network, scales)
        _refuse_changes(differences(before, model, batches, threads=threads), model.name)
    return tuple(name for name, factor in factors.items() if factor != 1)


def _smallest(
    model: Model, names: Sequence[str], batches: Iterable[Feeds], threads: int
) -> dict[str, NDArray[Any]]:
    """Return the smallest value of each channel (axis 1) of the tensors."""
    proto = model.to_proto()
    reader = TensorReader(proto, names, optimization="basic", threads=threads, name=model.name)
    found: dict[str, NDArray[Any]] = {}
    for feeds in batches:
        for name, values in reader.run(feeds).items():
            least = values.min(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
            found[name] = np.minimum(found.get(name, least), least)
    return found


def _refuse_changes(found: Iterable[Difference], name: str) -> None:
    for one in found:
        if not is_rounding(one):
            raise ModelError(
                f"{name}: equalization changed the outputs by more than float rounding: {one}. "
                "Do not equalize this model."
            )


def _skips(network: Network, scales: NDArray[np.float64]) -> tuple[Skip, ...]:
    """Return the layers whose output channels all keep their scale, with reasons."""
    found = []
    for layer in network.layers:
        channel = int(layer.outputs.flat[0])
        if np.all(scales[layer.outputs] == 1):
            reason = (
                network.sets.fixed_because(channel) or "its channels are already equal, or zero"
            )
            found.append(Skip(layer.node.name, layer.node.op, reason))
    return tuple(found)
