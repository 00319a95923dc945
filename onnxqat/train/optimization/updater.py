"""One step of gradient descent: weights move relative to their size, scales in the log domain.

``w -= rate * unit * direction``, where Adam's directions are about 1 and ``unit`` is the root mean
square of the weight's output channel. A network that reads raw 0..255 pixels, and one whose folded
channels differ by orders of magnitude, can then use the same rate. ``s *= exp(-rate * direction)``
keeps scales positive. A zero_point moves in units of its quantized range, so that the same rate
suits both ends of a clipping range; the forward pass rounds it.

If the chip's scales are powers of two, a latent scale moves in this way, and the scale is the power
of two nearest to it (trained quantization thresholds: Jain et al. 2020,
https://arxiv.org/abs/1903.08066, section 3; the paper rounds up from a threshold between two
powers, here training starts at a power).

Weight decay is decoupled, ``w *= 1 - rate * decay`` (AdamW: Loshchilov and Hutter 2019,
https://arxiv.org/abs/1711.05101, algorithm 2); only for ``adam`` it is added to the gradients of
weights. The decay of a scale, ``s *= exp(-rate * decay)``, narrows its clipping range (pact:
https://arxiv.org/abs/1805.06085, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from onnxqat.nodes import channel_axis
from onnxqat.pairs import parameters_of, scale_name
from onnxqat.plan import QuantPlan
from onnxqat.qparams import FloatArray, QuantParams, nearest_power_of_two, quantized_range
from onnxqat.quantized import QuantizedModel
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat
from onnxqat.train.form import TrainingForm
from onnxqat.train.optimization.optimizers import Adam, Optimizer, Sgd, clip
from onnxqat.train.optimization.parameter_groups import Rates, base_rate, parameter_rates

__all__ = ["Updater"]


class Updater:
    """Apply one step to weights and scales.

    Parameters
    ----------
    form : TrainingForm
        The training form, which distinguishes scales from weights.
    values, gradients : Flat
        The parameters to change, and their gradients, which are overwritten.
    model : QuantizedModel
        The Q/DQ model: the plan and the grids.
    config : Config
        The rates and the optimizer.
    part : bool
        Whether the model is a part of another, see `parameter_rates`.
    still : collection of str
        Parameters that are not changed.

    Attributes
    ----------
    lr : float
        The learning rate of weights without their own rate.
    latents : dict of str to float32 array
        The latent scales of scales that are powers of two, by name.
    """

    def __init__(
        self,
        form: TrainingForm,
        values: Flat,
        gradients: Flat,
        model: QuantizedModel,
        config: Config,
        *,
        part: bool = False,
        still: Collection[str] = (),
    ) -> None:
        self.values, self.gradients, self.config = values, gradients, config
        plan, params = model.plan, model.params
        self.roles = form.roles
        self.weights = [n for n in gradients.views if n not in self.roles]
        self.scales = self._named("scale")
        self.zero_points = self._named("zero_point")
        self.lr = base_rate(config, model)
        self.rates = self._rates(form, model, part=part)
        for name in self.rates.keys() & set(still):
            self.rates[name].freeze_from = 0
        self.limits = _limits(plan, params)
        self.factors = _scale_gradient_factors(plan, params, self.limits, model)
        self.units = self._units(plan, model)
        powers = {scale_name(p.parameters) for p in plan.grid_points() if p.spec.power_of_two}
        self.floors = _floors(plan, self.limits)
        self.latents = {n: values.views[n].copy() for n in self.scales if n in powers}
        self.optimizer = self._optimizer(gradients.buffer.size)

    def _named(self, role: str) -> list[str]:
        return [n for n in self.gradients.views if self.roles.get(n) == role]

    def _rates(self, form: TrainingForm, model: QuantizedModel, *, part: bool) -> dict[str, Rates]:
        """Return the rates of all learned parameters, and of scales that follow observed ranges."""
        moved = dict(self.gradients.views)
        moved |= {n: self.values.views[n] for n in (scale_name(name) for name in form.observed)}
        roles = {n: role for n, role in self.roles.items() if n in moved}
        return parameter_rates(moved, roles, model, self.config, part=part)

    def _optimizer(self, size: int) -> Optimizer:
        if self.config.optimizer == "sgd":
            return Sgd(size, momentum=self.config.momentum, nesterov=self.config.nesterov)
        return Adam(size)

    def _units(self, plan: QuantPlan, model: QuantizedModel) -> dict[str, FloatArray | float]:
        """Return the unit of Adam's steps for each weight: its root mean square.

        The unit is computed per output channel, even when the whole weight shares one scale:
        depthwise channels differ by orders of magnitude, and one unit would swamp the small ones.
        """
        if self.config.optimizer == "sgd":
            return dict.fromkeys(self.weights, 1.0)
        axes = _channel_axes(plan, model)
        return {n: _rms(self.values.views[n], axes.get(n)) for n in self.weights}

    def step(self, factor: float, step: int) -> None:
        """Move all parameters with ``factor`` times their learning rates; ``step`` is from 0."""
        self._prepare_gradients(step)
        self.optimizer.direct(self.gradients.buffer)
        for name, direction in self.gradients.views.items():
            rates = self.rates[name]
            if not rates.frozen(step):
                self._move(name, factor * rates.lr, direction, rates.weight_decay)

    def _move(self, name: str, rate: float, direction: FloatArray, decay: float) -> None:
        value = self.values.views[name]
        if name in self.units:
            if decay and self.config.optimizer != "adam":
                value *= np.float32(1 - rate * decay)
            value -= np.asarray(rate * self.units[name], np.float32) * direction
        elif name in self.zero_points:
            low, high = self.limits[parameters_of(name)]
            value -= np.float32(rate * (high - low)) * direction
            np.clip(value, low, high, out=value)
        else:
            moved = self.latents.get(name, value)
            moved *= np.exp(-np.float32(rate) * (direction + np.float32(decay)))
            np.maximum(moved, self.floors[name], out=moved)
            if name in self.latents:
                value[...] = nearest_power_of_two(moved)

    def frozen(self, name: str, step: int) -> bool:
        """Return whether a scale that follows observed ranges is frozen at ``step``."""
        return self.rates[name].frozen(step)

    def _prepare_gradients(self, step: int) -> None:
        """Convert the gradients to the form that the optimizer uses."""
        gradients = self.gradients.views
        for name in self.scales:  # into the log domain, with the LSQ factor
            factor = self.factors[parameters_of(name)]
            gradients[name] *= self.values.views[name] * factor
        for name in self.zero_points:  # into units of the quantized range
            parameters = parameters_of(name)
            low, high = self.limits[parameters]
            gradients[name] *= np.float32(high - low) * self.factors[parameters]
        for name, gradient in gradients.items():
            rates = self.rates[name]
            if rates.frozen(step):
                gradient[...] = 0
            elif rates.weight_decay and self.config.optimizer == "adam" and name in self.units:
                gradient += np.float32(rates.weight_decay) * self.values.views[name]
        clip(self.gradients.buffer, norm=self.config.clip_norm, value=self.config.clip_value)


def _channel_axes(plan: QuantPlan, model: QuantizedModel) -> dict[str, int | None]:
    """Return the axis of the output channels of weights, by tensor (None for vectors)."""
    nodes, tensors = (
        {node.name: node for node in model.floats.graph.nodes},
        model.floats.graph.tensors(),
    )
    edges = [(p.tensor, p.consumers[0]) for p in plan.points if p.role == "weight"]
    return {
        tensor: channel_axis(nodes[edge.node], edge.index, len(tensors[tensor].shape))
        for tensor, edge in edges
        if edge.node
    }


def _limits(plan: QuantPlan, params: Mapping[str, QuantParams]) -> dict[str, tuple[int, int]]:
    """Return the quantized range, by the name of the parameters."""
    return {
        p.parameters: quantized_range(p.spec, signed=params[p.parameters].signed)
        for p in plan.grid_points()
    }


def _floors(plan: QuantPlan, limits: dict[str, tuple[int, int]]) -> dict[str, np.float32]:
    """Return the smallest scale that the rule allows, by the name of the scale."""
    floors: dict[str, np.float32] = {}
    for point in plan.grid_points():
        low, high = limits[point.parameters]
        levels = high if point.spec.symmetric else high - low
        smallest = max(point.spec.min_range / levels, point.spec.min_scale)
        floors[scale_name(point.parameters)] = np.float32(smallest)
    return floors


def _rms(values: FloatArray, axis: int | None) -> FloatArray:
    """Return the root mean square, per channel if ``axis`` is given; it is never zero."""
    squared = np.square(values, dtype=np.float64)
    whole = np.asarray(np.mean(squared))
    axes = tuple(i for i in range(values.ndim) if i != axis)
    means = whole if axis is None else np.mean(squared, axis=axes, keepdims=True)
    floor = 1e-3 * math.sqrt(float(whole)) or 1e-6
    root: FloatArray = np.maximum(np.sqrt(means), floor).astype(np.float32)
    return root


def _scale_gradient_factors(
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    limits: dict[str, tuple[int, int]],
    model: QuantizedModel,
) -> dict[str, np.float32]:
    """Return g = 1 / sqrt(N * Qp) for each scale (LSQ, section 2.2).

    N is the number of elements that share one scale: in one channel of a weight, or in one sample
    of an activation. Qp is qmax - zero_point.
    """
    tensors = model.floats.graph.tensors()
    factors: dict[str, np.float32] = {}
    for point in plan.grid_points():
        shape = [d if isinstance(d, int) else 1 for d in tensors[point.tensor].shape or ()]
        count = math.prod(shape[1:] if point.role == "activation" else shape)
        count //= params[point.parameters].scale.size
        levels = limits[point.parameters][1] - int(np.max(params[point.parameters].zero_point))
        factor = np.float32(1 / math.sqrt(max(count, 1) * max(levels, 1)))
        factors[point.parameters] = min(factor, factors.get(point.parameters, factor))
    return factors
