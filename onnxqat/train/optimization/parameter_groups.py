"""Groups of parameters with their own rates: ``SELECTOR.KEY=VALUE`` in `--group`.

================  ===============================================================================
SELECTOR          the parameters that it matches
================  ===============================================================================
weight            trained tensors of two or more axes
bias              trained tensors of one axis: biases, parameters of normalizations
scale             scales of weights and activations
zero_point        trained zero_points
name:REGEX        weight, bias, scales and zero_points that a node reads whose whole name matches
tensor:REGEX      tensors whose whole name matches; the scales of ``t`` are named ``t/scale``, its
                  zero_point ``t/zero_point``
================  ===============================================================================

================  ===============================================================================
KEY               VALUE
================  ===============================================================================
lr                the learning rate, instead of `--lr` or `--scale-lr`
weight_decay      instead of `--weight-decay`; for scales (which have none by default) per unit of
                  their logarithm; zero_points have none
freeze            ``true`` or ``false``: whether the parameter is frozen
freeze_from       the step, counted from 0, from which the parameter is frozen
================  ===============================================================================

Later groups override earlier ones. A constant that is not trained by default (see
`onnxqat.train.trained`) is trained if ``tensor:`` gives its complete name with a rate or with
``freeze=false``.
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
    "frozen_throughout",
    "parameter_rates",
    "parse_parameter_group",
]

SELECTORS = ("weight", "bias", "scale", "zero_point", "name:REGEX", "tensor:REGEX")
GRID = ("scale", "zero_point")  # the selectors of parameters that are not weights
RATE, FINE_RATE = 2e-3, 5e-4  # of weights; the second if everything has 8 bits or more
KEYS = ("lr", "weight_decay", "freeze", "freeze_from")


@dataclass(kw_only=True)
class Rates:
    """The rates with which one parameter is trained.

    Attributes
    ----------
    lr, weight_decay : float
        The learning rate, and the decay per step and unit of learning rate.
    freeze_from : int or None
        The step from which the parameter is frozen.
    """

    lr: float
    weight_decay: float
    freeze_from: int | None = None

    def frozen(self, step: int) -> bool:
        """Return whether the parameter is frozen at ``step``, counted from 0."""
        return self.freeze_from is not None and step >= self.freeze_from


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """The value of one field of `Rates` for the parameters that a selector matches."""

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
        The selector or key is unknown, the value is out of range, or the regular expression is
        invalid.

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
        raise TrainingError(f"'{text}': unknown key '{key}'. Use one of {', '.join(KEYS)}.")
    if key == "freeze":
        if raw not in ("true", "false"):
            raise TrainingError(f"'{text}': freeze takes true or false.")
        return "freeze_from", 0 if raw == "true" else None
    try:
        value = int(raw) if key == "freeze_from" else float(raw)
    except ValueError as error:
        raise TrainingError(f"'{text}': '{raw}' is not a number.") from error
    if not (math.isfinite(value) and value >= 0):
        raise TrainingError(f"'{text}': {key} = {raw}. Give 0 or more.")
    return key, value


def parameter_rates(
    parameters: dict[str, FloatArray],
    roles: Mapping[str, str],
    model: QuantizedModel,
    config: Config,
    *,
    part: bool = False,
) -> dict[str, Rates]:
    """Return the rates of each parameter.

    Parameters
    ----------
    parameters : dict of str to array
        The trained parameters, by the input's name in the training form.
    roles : mapping of str to str
        The parameters that are a ``scale`` or a ``zero_point``.
    model : QuantizedModel
        The Q/DQ model, from which the inputs of nodes are read.
    config : Config
        The rates and groups.
    part : bool
        Whether the model is a part of another, in which a group may match nothing.

    Raises
    ------
    TrainingError
        A group is wrong, or matches nothing.
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
            raise TrainingError(
                f"'{group.text}' matches no trained parameter. Name one that is trained."
            )
        for name in covered:
            setattr(rates[name], group.key, group.value)
    return rates


def frozen_throughout(
    parameters: dict[str, FloatArray],
    roles: Mapping[str, str],
    model: QuantizedModel,
    config: Config,
) -> frozenset[str]:
    """Return the parameters that are frozen from the first step, see `parameter_rates`."""
    rates = parameter_rates(parameters, roles, model, config, part=True)
    return frozenset(name for name, rate in rates.items() if rate.frozen(0))


def asked_for(config: Config) -> frozenset[str]:
    """Return the tensors whose complete name a group gives, except to freeze them."""
    groups = [g for g in map(parse_parameter_group, config.groups) if g.kind == "tensor"]
    return frozenset(
        re.sub(r"\\(.)", r"\1", g.pattern)
        for g in groups
        if not (g.key == "freeze_from" and g.value == 0)
    )


def base_rate(config: Config, model: QuantizedModel) -> float:
    """Return the learning rate of weights without their own rate.

    The default of Adam is smaller if everything has 8 bits or more: the calibrated network is then
    already close to the best one, and larger steps would lose more than training regains.
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
    """Return the tensors that matching nodes read, and their scales and zero_points."""
    nodes = {n.name: n for n in model.floats.graph.nodes if matches(pattern, n.name)}
    names: set[Any] = {tensor.name for node in nodes.values() for tensor in node.inputs}
    for point in model.plan.grid_points():
        if any(edge.node in nodes for edge in point.consumers):
            names.update(f"{point.parameters}/{part}" for part in GRID)
    return names
