"""Advice for the layers that cost most: overrides of the rule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from onnxqat.analysis.points import PointFigures
from onnxqat.analysis.sensitivity import LayerFigures, Probe
from onnxqat.analysis.variants import Layer, Variants
from onnxqat.overrides import Override, overrides_text, parse_override
from onnxqat.quantized import QuantizedModel

__all__ = ["MOST", "Advice", "advise", "apart", "overrides_file"]

MOST = 5  # layers; if more are bad, leaving layers float is not the remedy
ENOUGH = 0.5  # fraction of the cost that may remain
WIDE = 16


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Overrides that reduce the cost of quantization.

    Attributes
    ----------
    layers : tuple of Layer
        The worst layers, as few as halve the cost when they stay float. If `MOST` layers do not
        halve it, the number of worst layers with the least cost. Empty if none helps.
    cost : float
        Cost of the model with these layers float.
    tried : int
        Largest number of layers that were left float together.
    overrides : tuple of Override
        Overrides for ``insert``: the layers get 16 bits if the rule has them, else stay float.
    """

    layers: tuple[Layer, ...]
    cost: float
    tried: int
    overrides: tuple[Override, ...]


def advise(
    variants: Variants,
    layers: Sequence[LayerFigures],
    points: Sequence[PointFigures],
    probe: Probe,
    *,
    cost: float,
) -> Advice:
    """Return overrides for the worst layers.

    Parameters
    ----------
    layers : sequence of LayerFigures
        Figures of the layers, worst first.
    cost : float
        Cost of the whole model.
    """
    tried: list[Layer] = []
    chosen, left = 0, cost
    for one in layers[:MOST]:
        if not left > ENOUGH * cost:
            break
        tried.append(one.layer)
        found = one.left_float if len(tried) == 1 else probe(variants.left_float(tried))
        if found < left:
            chosen, left = len(tried), found
    figures = {point.tensor: point for point in points}
    given = [parse_override(text) for text in variants.model.plan.overrides]
    overrides = [o for layer in tried[:chosen] for o in _overrides(variants, layer, figures)]
    overrides = [apart(o, given) for o in overrides]
    return Advice(
        layers=tuple(tried[:chosen]),
        cost=left,
        tried=len(tried),
        overrides=tuple(dict.fromkeys(overrides)),
    )


def apart(override: Override, given: Sequence[Override]) -> Override:
    """Return the override with a selector that is unique, so that one file can hold them all."""
    pattern, known = override.pattern, {(o.kind, o.pattern) for o in given}
    while (override.kind, pattern) in known:
        pattern = f"(?:{pattern})"
    return msgspec.structs.replace(override, pattern=pattern)


def overrides_file(model: QuantizedModel, advice: Advice) -> str:
    """Return the text of an overrides file: the model's own overrides, then the advice.

    Raises
    ------
    RuleError
        A file cannot hold the overrides in this order.
    """
    given = [parse_override(text) for text in model.plan.overrides]
    return overrides_text([*given, *advice.overrides])


def _overrides(
    variants: Variants,
    layer: Layer,
    figures: Mapping[str, PointFigures],
) -> list[Override]:
    rule = variants.rule
    if WIDE in rule.activation_bits:
        if WIDE in rule.weight_bits:
            return [Override(kind="name", pattern=re.escape(layer.node), key="bits", value=WIDE)]
        bits = {point.tensor: point.spec.bits for point in variants.model.plan.grid_points()}
        inputs = [name for name in layer.inputs if bits[name] < WIDE]
        weight = min(figures[name].alone_sqnr for name in layer.weights)
        if inputs and min(figures[name].alone_sqnr for name in inputs) < weight:
            return [
                Override(kind="tensor", pattern=re.escape(name), key="bits", value=WIDE)
                for name in inputs
            ]
    return [Override(kind="name", pattern=layer.pattern, key="quantize", value=False)]
