"""Cross-layer equalization, and what goes with it: the same function, by weights that lose less.

A layer whose channels differ much in range loses most of them on the grid of the largest one, and
so does the activation behind it. Nagel et al. 2019 (arXiv:1906.04721, section 4.1) divide each
channel of a layer by a number and multiply the layer behind by it. This changes nothing but
rounding where the function between is positively homogeneous: f(s * x) = s * f(x) for s > 0.

The steps, in order: ReLU6 becomes Relu where that changes little (`onnxqat.repair.relu6`), channels
are equalized, normalizations are smoothed (`onnxqat.repair.migration`), high biases are absorbed
(`onnxqat.repair.absorption`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from onnxqat.repair.absorption import Absorption
from onnxqat.repair.channels import Network, find_channels
from onnxqat.repair.difference import Difference, differences, is_rounding
from onnxqat.repair.migration import Migration, migrate
from onnxqat.repair.originals import note_originals
from onnxqat.repair.relu6 import NOTHING, Relu6, Replaced, replaced_relu6
from onnxqat.repair.scales import Spread, find_scales, spreads
from onnxqat.repair.scaling import scale_channels

__all__ = ["Equalized", "equalize", "unevenness"]

# Octaves that the channels of a layer lie below the largest one more, on average, than equalized.
UNEVEN = 2.0
# Weights of more elements than this take too much memory and time for advice: 256 MiB of float32.
MOST_ELEMENTS = 2**26
ESTIMATE = 3  # sweeps over the network, to see whether it pays

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """A float model after equalization, and what was done.

    Attributes
    ----------
    model : Model
        Computes what the prepared model does, up to float rounding and the costs.
    layers : tuple of str
        Names of the nodes whose weight changed.
    skips : tuple of Skip
        The layers whose output channels keep their scale and the normalizations that are as they
        were, with the reason.
    spreads : tuple of Spread
        How unequal the channel ranges of each weight were and are.
    differences : tuple of Difference
        What equalization and migration did to each output: rounding.
    migrations : tuple of Migration
        The normalizations that were smoothed.
    relu6 : Replaced
        The Clip nodes that a Relu replaced, or might have, and what that does to each output.
    absorbed : tuple of str
        Names of the nodes whose high biases were absorbed.
    absorption_cost : tuple of Difference
        What that did to each output.
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


def equalize(
    model: Model,
    batches: Iterable[Feeds] | None = None,
    *,
    relu6: Relu6 = "auto",
    threads: int = 0,
) -> Equalized:
    """Return a prepared float model with equalized channel ranges.

    Parameters
    ----------
    model : Model
        As `onnxqat.prepare` returns it; not changed.
    batches : iterable of mapping of str to array, optional
        Model inputs by name, on which outputs are compared; random values by default. Without,
        normalizations stay, ReLU6 is not replaced on its own, and high biases are absorbed only
        where BatchNormalizations remember how high.
    relu6 : {"auto", "keep", "replace"}
        See `onnxqat.repair.relu6`.

    Raises
    ------
    ModelError
        Equalization changed the function by more than float32 rounding, or the model does not run.
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
    )


def unevenness(graph: gs.Graph) -> list[Spread]:
    """Return the layers of a prepared graph whose channel ranges call for equalization.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        Not changed.

    Returns
    -------
    list of Spread
        Those whose channels lie, on average, `UNEVEN` octaves or more further below the largest one
        than they would after equalization; the worst first. Empty where the weights have more than
        `MOST_ELEMENTS` elements.
    """
    network = find_channels(graph)
    if sum(one.inputs.size * one.outputs.shape[1] for one in network.layers) > MOST_ELEMENTS:
        return []
    found = spreads(network, find_scales(network, sweeps=ESTIMATE))
    uneven = [one for one in found if one.before - one.after >= UNEVEN]
    return sorted(uneven, key=lambda one: one.after - one.before)


def _divide_remembered(model: Model, network: Network, scales: NDArray[np.float64]) -> None:
    """Divide what the model remembers of its tensors as their channels were."""
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
    """Let layers take high biases of the layers before them; return the names of those."""
    absorption, known = Absorption(model.graph, network), distributions_of(model)
    unknown = [name for name in absorption.tensors if name not in known]
    smallest = _smallest(model, unknown, batches, threads) if batches and unknown else {}
    amounts = absorption.amounts(known, smallest)
    changed = absorption.apply(amounts)
    for name in known.keys() & amounts.keys():
        known[name] = known[name]._replace(mean=known[name].mean - amounts[name])
    note_distributions(model, known)
    return changed


def _smallest(
    model: Model, names: Sequence[str], batches: Iterable[Feeds], threads: int
) -> dict[str, NDArray[Any]]:
    """Return the smallest value of each channel of tensors, whose channels are along axis 1."""
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
                f"{name}: equalization changed more than float rounding does: {one}. "
                "Work without it."
            )


def _skips(network: Network, scales: NDArray[np.float64]) -> tuple[Skip, ...]:
    """Return the layers whose output channels all keep their scale."""
    found = []
    for layer in network.layers:
        channel = int(layer.outputs.flat[0])
        if np.all(scales[layer.outputs] == 1):
            reason = network.sets.fixed_because(channel) or "its channels are equal, or carry none"
            found.append(Skip(layer.node.name, layer.node.op, reason))
    return tuple(found)
