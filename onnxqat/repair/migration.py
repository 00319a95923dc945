"""Migration: move the different ranges of a normalization's channels into the MatMuls behind it.

Xiao et al. 2023 (SmoothQuant, arXiv:2211.10438), equations 3 and 4: with the activation X behind
the normalization, the weight W of a MatMul, an input channel j and alpha between 0 and 1,

::

    Y = (X diag(s)^-1) (diag(s) W)
    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Dividing the scale and bias of a LayerNormalization by s gives X diag(s)^-1. In transformers, a few
of these channels are far larger than all others, so that a common scale leaves the others few
integers.

The best alpha depends on the network. Each normalization gets the alpha of `STRENGTHS` with the
smallest error of the products behind it, quantized at 8 bits per-tensor on rows of the data. If no
alpha reduces the error, the normalization is not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.ends import TensorReader
from onnxqat.model import Model
from onnxqat.nodes import is_op
from onnxqat.operators import MATRIX_PRODUCTS
from onnxqat.plan import Skip
from onnxqat.qparams import QuantSpec, choose_qparams, fake_quantize
from onnxqat.repair.channels import Network, find_channels
from onnxqat.repair.layers import Layer
from onnxqat.repair.norms import Norm, find_norms
from onnxqat.repair.scaling import scale_channels
from onnxqat.repair.sets import Ids

__all__ = ["Migration", "migrate"]

STRENGTHS = (0.25, 0.5, 0.75)  # the values of alpha that are tried
ROWS = 256  # rows of an activation on which errors are compared
# A channel whose range, relative to the largest, is below this is taken for zero.
DEAD = 2.0**-16
WEIGHT = QuantSpec(bits=8, symmetric=True)
ACTIVATION = QuantSpec(bits=8, symmetric=False)

Feeds = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Migration:
    """The migration of one normalization.

    Attributes
    ----------
    norm : str
        The name of the normalization's last node.
    alpha : float
        The chosen alpha.
    before, after : float
        Mean squared error of the products behind it at 8 bits, relative to their mean square.
    """

    norm: str
    alpha: float
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """A normalization, and the layers that read only its channels."""

    norm: Norm
    ids: Ids
    readers: tuple[Layer, ...]


class _Activation:
    """Sampled rows of a tensor, and the largest magnitude of each column."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.float32]] = []
        self.largest = np.zeros(1, np.float32)

    def add(self, values: NDArray[np.float32], count: int, rng: np.random.Generator) -> None:
        rows = values.reshape(-1, values.shape[-1])
        self.largest = np.maximum(self.largest, np.abs(rows).max(axis=0))
        self.rows.append(rows[rng.permutation(len(rows))[:count]])


def migrate(
    model: Model, batches: Sequence[Feeds] | None, *, threads: int = 0
) -> tuple[tuple[Migration, ...], tuple[Skip, ...]]:
    """Smooth the normalizations of a prepared float model in place.

    Parameters
    ----------
    model : Model
        The model; it is changed, but computes the same up to float rounding.
    batches : sequence of mapping of str to array, optional
        Model inputs by name. Without them, nothing is changed.

    Returns
    -------
    tuple of Migration, tuple of Skip
        The smoothed normalizations, and the unchanged ones with reasons.
    """
    norms = find_norms(model.graph)
    network = find_channels(model.graph, norms)
    groups, skips = _groups(network)
    if not batches:
        reason = "its activations are unknown. Give data"
        return (), (*skips, *(_skip(group.norm, reason) for group in groups))
    seen = _activations(model, groups, batches, threads)
    scales = np.ones(network.sets.count)
    done = []
    for group in groups:
        migration, found = _chosen(group, seen)
        if migration is None:
            skips.append(
                _skip(group.norm, "no alpha reduces the error: its channels differ little")
            )
            continue
        scales[group.ids] = found
        done.append(migration)
    roots = network.sets.roots(np.arange(network.sets.count))
    scale_channels(model.graph, network, scales[roots])
    return tuple(done), tuple(skips)


def _skip(norm: Norm, reason: str) -> Skip:
    return Skip(norm.name, norm.node.op, reason)


def _groups(network: Network) -> tuple[list[_Group], list[Skip]]:
    """Return the normalizations that can be scaled, and the others with reasons."""
    roots = network.sets.roots(np.arange(network.sets.count))
    writers = [roots[ids] for _, ids in network.norms]
    writers += [roots[layer.outputs].reshape(-1) for layer in network.layers]
    counts = np.bincount(np.concatenate(writers), minlength=roots.size) if writers else roots
    groups, skips = [], []
    for norm, ids in network.norms:
        mine = roots[ids]
        readers = tuple(one for one in network.layers if np.isin(roots[one.inputs], mine).any())
        reasons = [network.sets.fixed_because(int(channel)) for channel in mine]
        reason = next((one for one in reasons if one is not None), None)
        if reason is None and (np.any(counts[mine] > 1) or not np.array_equal(mine, ids)):
            reason = "it shares its channels with another layer"
        if reason is None and not _are_products(readers, mine):
            reason = "it is not read by a MatMul over its channels only"
        if reason is None:
            groups.append(_Group(norm=norm, ids=ids, readers=readers))
        else:
            skips.append(_skip(norm, reason))
    return groups, skips


def _are_products(readers: Iterable[Layer], channels: Ids) -> bool:
    """Whether there are readers, and all are matrix products over exactly these channels."""
    found = [
        is_op(one.node, *MATRIX_PRODUCTS) and np.array_equal(one.inputs.reshape(-1), channels)
        for one in readers
    ]
    return bool(found) and all(found)


def _activations(
    model: Model, groups: Iterable[_Group], batches: Sequence[Feeds], threads: int
) -> dict[str, _Activation]:
    """Return rows and ranges of the tensors that the layers read."""
    names = {_read(layer).name for group in groups for layer in group.readers}
    seen = {str(name): _Activation() for name in sorted(names)}
    if not seen:
        return seen
    proto = model.to_proto()
    reader = TensorReader(proto, seen, optimization="basic", threads=threads, name=model.name)
    rng = np.random.default_rng(0)
    for feeds in batches:
        for name, values in reader.run(feeds).items():
            seen[name].add(values, -(-ROWS // len(batches)), rng)
    return seen


def _read(layer: Layer) -> gs.Tensor:
    return layer.node.inputs[0]


def _chosen(group: _Group, seen: Mapping[str, _Activation]) -> tuple[Migration | None, Floats]:
    """Return the migration with the best of `STRENGTHS` and its scales; None if none is better."""
    products = []
    for layer in group.readers:
        activation = seen[str(_read(layer).name)]
        matrix = layer.matrix(layer.node.inputs[1].values)[0, :, :, 0].T.astype(np.float64)
        products.append((np.concatenate(activation.rows).astype(np.float64), matrix))
    inputs = np.max([seen[str(_read(layer).name)].largest for layer in group.readers], axis=0)
    weights = np.max([np.abs(matrix).max(axis=1) for _, matrix in products], axis=0)
    nothing = np.ones(inputs.size)
    if not np.isfinite(inputs).all():
        return None, nothing
    before = _error(products, nothing)
    errors = {alpha: _error(products, _scales(inputs, weights, alpha)) for alpha in STRENGTHS}
    alpha = min(errors, key=errors.__getitem__)
    if errors[alpha] >= before:
        return None, nothing
    migration = Migration(norm=group.norm.name, alpha=alpha, before=before, after=errors[alpha])
    return migration, _scales(inputs, weights, alpha)


def _scales(inputs: NDArray[Any], weights: NDArray[Any], alpha: float) -> Floats:
    """Return s_j of equation 4, and 1 for zero channels."""
    alive = (inputs > DEAD * inputs.max()) & (weights > DEAD * weights.max())
    scales = np.ones(inputs.size)
    scales[alive] = inputs[alive].astype(np.float64) ** alpha / weights[alive] ** (1 - alpha)
    return scales


def _error(products: Iterable[tuple[Floats, Floats]], scales: Floats) -> float:
    """Return the mean squared error of the quantized products, relative to their mean square."""
    noise = signal = 0.0
    for rows, matrix in products:
        exact = rows @ matrix
        rounded = _rounded(rows / scales, ACTIVATION) @ _rounded(matrix * scales[:, None], WEIGHT)
        noise += float(np.square(rounded - exact).sum())
        signal += float(np.square(exact).sum())
    return noise / signal if signal else 0.0


def _rounded(values: Floats, spec: QuantSpec) -> Floats:
    """Return fake-quantized values, with the clipping range from their extremes."""
    narrow = values.astype(np.float32)
    low, high = np.asarray(narrow.min()), np.asarray(narrow.max())
    return fake_quantize(narrow, choose_qparams(low, high, spec), spec).astype(np.float64)
