"""One step of the optimizer as a graph on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np

from onnxqat.device import Device
from onnxqat.pairs import parameters_of
from onnxqat.qparams import FloatArray
from onnxqat.runtime import open_session
from onnxqat.train.optimization.optimizers import Adam
from onnxqat.train.optimization.updater import Updater
from onnxqat.train.resident.arrays import DeviceVector, Layout
from onnxqat.train.resident.graphs import Role, Segment, update_graph

__all__ = ["DeviceUpdater", "layout_of"]

Key = tuple[str, bool, float, float, int | None]


def layout_of(updater: Updater, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return a layout in which parameters with the same update rule are adjacent.

    Parameters
    ----------
    updater : Updater
        Has the role and the rates of each parameter.
    shapes : mapping of str to tuple of int
        The shapes of all parameters; those without a gradient come last in the layout.
    """
    learned = [n for n in shapes if n in updater.gradients.views]
    ordered = sorted(learned, key=lambda name: str(_key(updater, name)))
    others = [n for n in shapes if n not in updater.gradients.views]
    return Layout({name: shapes[name] for name in (*ordered, *others)})


def _key(updater: Updater, name: str) -> Key:
    """Return the values that parameters with the same update rule have in common."""
    rates = updater.rates[name]
    latent = name in updater.latents
    role = updater.roles.get(name, "weight")
    return role, latent, rates.lr, rates.weight_decay, rates.freeze_from


def _segments(updater: Updater, layout: Layout) -> Iterator[Segment]:
    """Yield the segments that training changes: all but those frozen from the first step."""
    learned = [n for n in layout.shapes if n in updater.gradients.views]
    for (role, latent, lr, decay, freeze_from), group in groupby(
        learned, key=lambda name: _key(updater, name)
    ):
        if freeze_from == 0:
            continue
        names = tuple(group)
        start, length = layout.span(names)
        roles: dict[str, Role] = {"scale": "scale", "zero_point": "zero_point"}
        yield Segment(
            role=roles.get(role, "weight"),
            names=names,
            lr=lr,
            decay=decay,
            freeze_from=freeze_from,
            latent=latent,
            start=start,
            length=length,
        )


class DeviceUpdater:
    """Updates parameters on a device, as `Updater` does in numpy.

    Parameters
    ----------
    updater : Updater
        The rates, units, factors and limits; they are only read.
    layout : Layout
        The result of `layout_of`.
    values, gradients : DeviceVector
        The parameters to change, and their gradients.
    device : Device
        The device that holds them.

    Attributes
    ----------
    state : dict of str to DeviceVector
        The state of the optimizer, by the names of `Optimizer.buffers`, and ``latent`` if scales
        are powers of two.
    steps : int
        Number of steps so far.
    """

    def __init__(
        self,
        updater: Updater,
        layout: Layout,
        values: DeviceVector,
        gradients: DeviceVector,
        device: Device,
    ) -> None:
        self.plan, self.layout, self.device, self.steps = updater, layout, device, 0
        names = [*updater.optimizer.buffers, *(["latent"] if updater.latents else [])]
        self.state = {name: DeviceVector(device, layout.size) for name in names}
        if updater.latents:
            self.state["latent"].set(layout.joined(updater.latents))
        self.segments = list(_segments(updater, layout))
        self._constants: list[DeviceVector] = []  # keeps their memory while the session uses it
        self._numbers: dict[str, Any] = {}
        if self.segments:
            self._open(values, gradients)

    def _open(self, values: DeviceVector, gradients: DeviceVector) -> None:
        graph = update_graph(self.segments, self.plan.config)
        self._session = open_session(
            graph, optimization="basic", name="the optimizer", device=self.device
        )
        self._binding = self._session.io_binding()
        read = {value.name for value in self._session.get_inputs()}
        vectors = self.state | {"gradient": gradients, "value": values}
        for i, segment in enumerate(self.segments):
            shape = (segment.length,)
            for name, vector in vectors.items():
                if f"{i}/{name}" in read:
                    vector.bind(self._binding.bind_input, f"{i}/{name}", shape, segment.start)
            for name, constant in self._constants_of(segment):
                if f"{i}/{name}" in read:
                    vector = DeviceVector(self.device, segment.length)
                    vector.set(constant)
                    vector.bind(self._binding.bind_input, f"{i}/{name}", shape)
                    self._constants.append(vector)
        for value in self._session.get_outputs():
            i, name = value.name.removesuffix("_out").split("/")
            segment = self.segments[int(i)]
            shape, vector = (segment.length,), vectors[name]
            vector.bind(self._binding.bind_output, value.name, shape, segment.start)
        self._read = read

    def _constants_of(self, segment: Segment) -> Iterator[tuple[str, FloatArray]]:
        """Yield the constant vectors of a segment."""
        plan = self.plan
        layout = Layout({name: self.layout.shapes[name] for name in segment.names})

        def spread(values: Mapping[str, Any]) -> FloatArray:
            return layout.joined(
                {
                    name: np.broadcast_to(np.asarray(value, np.float32), layout.shapes[name])
                    for name, value in values.items()
                }
            )

        if segment.role == "weight":
            yield "unit", spread({name: plan.units[name] for name in segment.names})
            return
        sets = {name: parameters_of(name) for name in segment.names}
        factors = {name: plan.factors[found] for name, found in sets.items()}
        if segment.role == "scale":
            yield "factor", spread(factors)
            yield "floor", spread({name: plan.floors[name] for name in segment.names})
            return
        ends = {name: plan.limits[found] for name, found in sets.items()}
        levels = {name: high - low for name, (low, high) in ends.items()}
        pulls = {name: np.float32(levels[name]) * factor for name, factor in factors.items()}
        yield "factor", spread(pulls)
        yield "range", spread(levels)
        yield "low", spread({name: low for name, (low, _) in ends.items()})
        yield "high", spread({name: high for name, (_, high) in ends.items()})

    def step(self, factor: float, step: int) -> None:
        """Update every parameter at ``factor`` times its learning rate; ``step`` counts from 0."""
        self.steps += 1
        if not self.segments:
            return
        numbers: dict[str, Any] = {}
        for i, segment in enumerate(self.segments):
            moving = segment.freeze_from is None or step < segment.freeze_from
            rate = factor * segment.lr if moving else 0.0
            numbers[f"{i}/moving"] = np.asarray(moving)
            numbers[f"{i}/rate"] = np.asarray(rate, np.float32)
            numbers[f"{i}/keep"] = np.asarray(1 - rate * segment.decay, np.float32)
        usual = Adam(0)
        for name, beta in (("mean", usual.beta1), ("square", usual.beta2)):
            correction = np.asarray(1 / (1 - beta**self.steps), np.float32)
            numbers[f"{name}_correction"] = correction
        self._numbers = numbers
        for name in numbers.keys() & self._read:
            self._binding.bind_cpu_input(name, numbers[name])
        self._session.run_with_iobinding(self._binding)
