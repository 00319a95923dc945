"""The regularizer of learned roundings as a graph on a device, see `onnxqat.train.adaround`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxqat.device import Device
from onnxqat.runtime import open_session
from onnxqat.train.adaround import GAMMA, ZETA
from onnxqat.train.blocks.rounding import LearnedRounding
from onnxqat.train.resident.arrays import DeviceVector, Layout
from onnxqat.train.resident.graphs import GraphBuilder

__all__ = ["DevicePressure", "pressure_graph"]


class DevicePressure:
    """Adds the gradient of the regularizer to gradients on a device.

    Parameters
    ----------
    rounding : LearnedRounding
        The roundings of the block, and the regularizer's weight and beta at each step.
    layout : Layout
        The positions of the variables and of their gradients.
    values, gradients : DeviceVector
        The variables, and their gradients, which are changed.
    device : Device
        The device that holds them.
    """

    def __init__(
        self,
        rounding: LearnedRounding,
        layout: Layout,
        values: DeviceVector,
        gradients: DeviceVector,
        device: Device,
    ) -> None:
        self._rounding = rounding
        sizes = {name: rounding.values[name].size for name in rounding.moving}
        if not sizes:
            return
        graph = pressure_graph(sizes)
        self._session = open_session(
            graph, optimization="basic", name="the regularizer", device=device
        )
        self._binding = self._session.io_binding()
        for name, size in sizes.items():
            start = layout.starts[name]
            values.bind(self._binding.bind_input, name, (size,), start)
            gradients.bind(self._binding.bind_input, f"{name}/gradient", (size,), start)
            gradients.bind(self._binding.bind_output, f"{name}/sum", (size,), start)

    def press(self, number: int) -> None:
        """Add the gradient of the regularizer at step ``number``."""
        pressure = self._rounding.pressure(number)
        if pressure is None or not self._rounding.moving:
            return
        weight, beta = pressure
        numbers = {"factor": -2 * beta * weight, "exponent": beta - 1}
        for name, value in numbers.items():
            self._binding.bind_cpu_input(name, np.asarray(value, np.float32))
        self._session.run_with_iobinding(self._binding)


def pressure_graph(sizes: Mapping[str, int]) -> onnx.ModelProto:
    """Return ``<name>/sum = <name>/gradient + weight * regularizer_gradient(<name>, beta)``.

    Parameters
    ----------
    sizes : mapping of str to int
        The numbers of elements of the variables, by name.

    The inputs ``factor`` and ``exponent`` are ``-2 * beta * weight`` and ``beta - 1``.
    """
    b = GraphBuilder()
    factor, exponent = b.input("factor"), b.input("exponent")
    for name, size in sizes.items():
        half = b.op("Tanh", b.op("Mul", b.input(name, size), 0.5))
        sigmoid = b.op("Mul", b.op("Add", half, 1.0), 0.5)
        raised = b.op("Add", b.op("Mul", sigmoid, float(ZETA - GAMMA)), float(GAMMA))
        h = b.op("Clip", raised, 0.0, 1.0)
        between = b.op("And", b.op("Greater", h, 0.0), b.op("Less", h, 1.0))
        bell = b.op("Mul", sigmoid, b.op("Sub", 1.0, sigmoid))
        slope = b.op("Where", between, b.op("Mul", bell, float(ZETA - GAMMA)), 0.0)
        side = b.op("Sub", b.op("Mul", h, 2.0), 1.0)
        power = b.op("Mul", b.op("Pow", b.op("Abs", side), exponent), b.op("Sign", side))
        each = b.op("Mul", b.op("Mul", power, slope), b.op("Div", factor, float(size)))
        b.op("Add", b.input(f"{name}/gradient", size), each, output=f"{name}/sum")
        b.output(f"{name}/sum", size)
    return b.model()
