"""Groups of parameters with their own rates: ``SELECTOR.KEY=VALUE``, as `--group` takes them.

================  ===============================================================================
SELECTOR          what it covers
================  ===============================================================================
weight            trained tensors of two axes and more
bias              trained tensors of one axis: biases, parameters of normalisation
scale             scales of weights and activations
zero_point        zero_points that move
name:REGEX        what the nodes read whose whole name matches: weight, bias, scales, zero_points
tensor:REGEX      tensors whose whole name matches; the scales of ``t`` are named ``t/scale``, its
                  zero_point ``t/zero_point``
================  ===============================================================================

================  ===============================================================================
KEY               VALUE
================  ===============================================================================
lr                learning rate, in the place of `--lr` or `--scale-lr`
weight_decay      in the place of `--weight-decay`; of scales, which have none otherwise, per unit
                  of their logarithm; zero_points have none
freeze            ``true`` or ``false``: whether it stays as it is
freeze_from       the step, counted from 0, from which on it stays as it is
================  ===============================================================================

Later groups win. A constant that is not trained by itself (see `onnxqat.train.trained`) is where
``tensor:`` gives its whole name: by a rate, or by ``freeze=false``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxqat.errors import TrainingError
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.selectors import matches, parse_assignment
from onnxqat.train.config import Config

__all__ = [
    "ParameterGroup",
    "Rates",
    "asked_for",
    "base_rate",
    "parameter_rates",
    "parse_parameter_group",
]

SELECTORS = ("weight", "bias", "scale", "zero_point", "name:REGEX", "tensor:REGEX")
GRID = ("scale", "zero_point")  # of what is no weight
RATE, FINE_RATE = 2e-3, 5e-4  # of weights, the second where everything has 8 bits or more
KEYS = ("lr", "weight_decay", "freeze", "freeze_from")


@dataclass(kw_only=True)
class Rates:
    """How one parameter is trained.

    Attributes
    ----------
    lr, weight_decay : float
        Learning rate, and decay per step and unit of it.
    freeze_from : int or None
        The step from which on it stays as it is.
    """

    lr: float
    weight_decay: float
    freeze_from: int | None = None

    def frozen(self, step: int) -> bool:
        """Return whether the parameter stays as it is at ``step``, counted from 0."""
        return self.freeze_from is not None and step >= self.freeze_from


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """One field of `Rates` for the parameters that a selector covers."""

    text: str
    kind: str
    pattern: str
    key: str
    value: float | None


def parse_parameter_group(text: str) -> ParameterGroup:
    """Read ``SELECTOR.KEY=VALUE``.

    Raises
    ------
    TrainingError
        Unknown selector or key, a value outside of its range, or an invalid regex.

    Examples
    --------
    >>> parse_parameter_group("bias.freeze=true")
    ParameterGroup(text='bias.freeze=true', kind='bias', pattern='', key='freeze_from', value=0)
    """
    kind, pattern, key, raw = parse_assignment(
        text, SELECTORS, example="bias.lr=0.001", error=TrainingError
    )
    key, value = _field(text, key, raw)
    return ParameterGroup(text=text, kind=kind, pattern=pattern, key=key, value=value)


def _field(text: str, key: str, raw: str) -> tuple[str, float | None]:
    """Return the field of `Rates` that ``KEY=VALUE`` sets, and its value."""
    if key not in KEYS:
        raise TrainingError(f"'{text}': unknown key '{key}'. One of {', '.join(KEYS)}.")
    if key == "freeze":
        if raw not in ("true", "false"):
            raise TrainingError(f"'{text}': freeze takes true or false.")
        return "freeze_from", 0 if raw == "true" else None
    try:
        value = int(raw) if key == "freeze_from" else float(raw)
    except ValueError as error:
        raise TrainingError(f"'{text}': '{raw}' is not a number.") from error
    if not (math.isfinite(value) and value >= 0):
        raise TrainingError(f"'{text}': {key} = {raw}. It is 0 or above.")
    return key, value


def parameter_rates(
    parameters: dict[str, FloatArray],
    roles: Mapping[str, str],
    model: QuantizedModel,
    config: Config,
    *,
    part: bool = False,
) -> dict[str, Rates]:
    """Return how each parameter is trained.

    Parameters
    ----------
    parameters : dict of str to array
        What is trained, by the input's name in the training form.
    roles : mapping of str to str
        Which of them are a ``scale`` or a ``zero_point``.
    model : QuantizedModel
        The Q/DQ model, which says what the nodes read.
    config : Config
        Rates and groups.
    part : bool
        Whether the model is a part of another, in which a group may cover nothing.

    Raises
    ------
    TrainingError
        A group is wrong, or covers nothing.
    """
    every = {n: "bias" if v.ndim <= 1 else "weight" for n, v in parameters.items()} | dict(roles)
    rates, lr = {}, base_rate(config, model)
    for name, role in every.items():
        decay = config.weight_decay if role == "weight" else 0.0
        rates[name] = Rates(lr=config.scale_lr if role in GRID else lr, weight_decay=decay)
    for group in map(parse_parameter_group, config.groups):
        covered = [n for n in _covered(group, every, model) if n in parameters]
        if group.key == "weight_decay":
            covered = [n for n in covered if every[n] != "zero_point"]
        if not covered and not part:
            raise TrainingError(f"'{group.text}' covers nothing that is trained.")
        for name in covered:
            setattr(rates[name], group.key, group.value)
    return rates


def asked_for(config: Config) -> frozenset[str]:
    """Return the tensors that a group names in full, other than to freeze them."""
    groups = [g for g in map(parse_parameter_group, config.groups) if g.kind == "tensor"]
    return frozenset(
        re.sub(r"\\(.)", r"\1", g.pattern)
        for g in groups
        if not (g.key == "freeze_from" and g.value == 0)
    )


def base_rate(config: Config, model: QuantizedModel) -> float:
    """Return the learning rate of weights that have none of their own.

    Where none is given, Adam's is smaller if everything has eight bits or more: the calibrated
    network is then close to the best one, and larger steps lead away from it further than
    training leads back.
    """
    if config.lr is not None:
        return config.lr
    fine = all(point.spec.bits >= 8 for point in model.plan.grid_points())
    return FINE_RATE if fine and config.optimizer != "sgd" else RATE


def _covered(
    group: ParameterGroup, roles: Mapping[str, str], model: QuantizedModel
) -> Iterable[str]:
    if group.kind == "name":
        return _read_by(group.pattern, model)
    if group.kind == "tensor":
        return [n for n in roles if matches(group.pattern, n)]
    return [n for n, role in roles.items() if role == group.kind]


def _read_by(pattern: str, model: QuantizedModel) -> set[str]:
    """Return the tensors that matching nodes read, and the scales and zero_points of these."""
    nodes = {n.name: n for n in model.floats.graph.nodes if matches(pattern, n.name)}
    names: set[Any] = {tensor.name for node in nodes.values() for tensor in node.inputs}
    for point in model.plan.grid_points():
        if any(edge.node in nodes for edge in point.consumers):
            names.update(f"{point.parameters}/{part}" for part in GRID)
    return names
