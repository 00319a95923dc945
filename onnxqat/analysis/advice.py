"""What to do about the layers that cost most, as overrides of the rule."""

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

MOST = 5  # layers; where more are bad, leaving some float is not the remedy
ENOUGH = 0.5  # share of the cost that may be left
WIDE = 16


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to change.

    Attributes
    ----------
    layers : tuple of Layer
        The fewest of the worst that leave less than half of the cost when they stay float; where
        `MOST` do not, as many as leave the least. None where none helps.
    cost : float
        Cost of the model with these layers float.
    tried : int
        How many were left float together at most.
    overrides : tuple of Override
        For ``insert``: they get 16 bits where the rule has these, and stay float elsewhere.
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
    """Return what to change.

    Parameters
    ----------
    layers : sequence of LayerFigures
        The worst first.
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
    """Return an override with a selector that none of those has, for a file of them all."""
    pattern, known = override.pattern, {(o.kind, o.pattern) for o in given}
    while (override.kind, pattern) in known:
        pattern = f"(?:{pattern})"
    return msgspec.structs.replace(override, pattern=pattern)


def overrides_file(model: QuantizedModel, advice: Advice) -> str:
    """Return the text of an overrides file: those the model was made with, then the advice.

    Raises
    ------
    RuleError
        No file can say them in their order.
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
