"""Clipping ranges that follow the observed extremes, for parameters on a device.

The device computes the extremes of weights. Numpy computes scales and zero_points from them and
from the extremes of activations, as in training on the CPU; the result is uploaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper

from onnxqat.device import Device
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.runtime import open_session
from onnxqat.train.engine import Flat
from onnxqat.train.form import TrainingForm
from onnxqat.train.optimization.ranges import Ranges
from onnxqat.train.resident.arrays import DeviceVector, Layout

__all__ = ["DeviceRanges"]

OPSET, IR_VERSION = 17, 8


class DeviceRanges:
    """The counterpart of `Ranges` for parameters on a device.

    Parameters
    ----------
    form, model, constant
        See `Ranges`; ``form.observed`` must not be empty.
    layout : Layout
        The positions of the parameters in ``values``.
    values : DeviceVector
        The parameters: weights are read, scales and zero_points are set.
    device : Device
        The device that holds ``values``.
    """

    def __init__(
        self,
        form: TrainingForm,
        model: QuantizedModel,
        constant: float,
        layout: Layout,
        values: DeviceVector,
        device: Device,
    ) -> None:
        sets = form.observed.keys()
        names = [f(n) for n in sets for f in (scale_name, zero_point_name)]
        self._set = [name for name in names if name in layout.shapes]
        # weight whose range is followed -> axis of its range, or None
        self._axes = {
            p.tensor: p.spec.axis
            for p in model.plan.grid_points()
            if p.parameters in sets and p.role == "weight"
        }
        extremes = {
            name: np.zeros(_extremes_shape(layout.shapes[name], axis), np.float32)
            for name, axis in self._axes.items()
        }
        parameters = {name: form.parameters[name] for name in self._set}
        self._mirror = Flat(extremes | parameters)
        self.ranges = Ranges(form, self._mirror, model, constant)
        self.begin, self.see = self.ranges.begin, self.ranges.see
        self._layout, self._values, self._device = layout, values, device
        self._upload = self._opened_upload()
        self._extremes = self._opened_extremes() if self._axes else None

    def _opened_upload(self) -> Callable[[], None]:
        """Return a function that copies scales and zero_points from numpy to the device."""
        nodes = [helper.make_node("Identity", [f"in/{n}"], [f"out/{n}"]) for n in self._set]
        values = [(n, self._layout.shapes[n]) for n in self._set]
        graph = _model(nodes, *([(f"{end}/{n}", s) for n, s in values] for end in ("in", "out")))
        session = open_session(graph, optimization="basic", device=self._device)
        binding = session.io_binding()
        for name, shape in values:
            view = self._mirror.views[name]
            address = view.ctypes.data
            binding.bind_input(f"in/{name}", "cpu", 0, np.float32, shape, address)
            start = self._layout.starts[name]
            self._values.bind(binding.bind_output, f"out/{name}", shape, start)
        return lambda: session.run_with_iobinding(binding)

    def _opened_extremes(self) -> Callable[[], list[FloatArray]]:
        """Return a function that finds the extremes of weights, per index of their axis."""
        nodes, outputs = [], []
        for name, axis in self._axes.items():
            axes = [i for i in range(len(self._layout.shapes[name])) if i != axis]
            for op in ("ReduceMin", "ReduceMax"):
                outputs.append((f"{op}/{name}", None))
                nodes.append(_reduction(op, name, axes))
        inputs = [(name, self._layout.shapes[name]) for name in self._axes]
        session = open_session(
            _model(nodes, inputs, outputs), optimization="basic", device=self._device
        )
        binding = session.io_binding()
        for name, shape in inputs:
            self._values.bind(binding.bind_input, name, shape, self._layout.starts[name])
        for name, _ in outputs:
            binding.bind_output(name, "cpu")

        def run() -> list[FloatArray]:
            session.run_with_iobinding(binding)
            found: list[FloatArray] = binding.copy_outputs_to_cpu()
            return found

        return run

    def step(self, workers: Workers, frozen: Callable[[str], bool]) -> None:
        """Update the ranges, scales and zero_points, see `Ranges.step`."""
        if self._extremes is not None:
            found = iter(self._extremes())
            for name, axis in self._axes.items():
                view = self._mirror.views[name]
                for index in range(2):
                    view[_at(index, axis)] = next(found).reshape(view[_at(index, axis)].shape)
        self.ranges.step(workers, frozen)
        self._upload()

    def restore(self, views: Mapping[str, FloatArray]) -> None:
        """Copy scales and zero_points that a checkpoint restored on the device."""
        for name in self._set:
            self._mirror.views[name][...] = views[name]


def _extremes_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """Return the shape of a weight that has two values per index of its axis."""
    if axis is None:
        return (2,)
    rows = [1] * max(len(shape), 2)
    rows[axis] = shape[axis]
    rows[int(axis == 0)] = 2
    return tuple(rows)


def _at(index: int, axis: int | None) -> tuple[int | slice, ...]:
    """Return the position of the smallest (0) or largest (1) values in such a weight."""
    return (slice(None), index) if axis == 0 else (index,)


def _reduction(op: str, name: str, axes: list[int]) -> onnx.NodeProto:
    output = f"{op}/{name}"
    if not axes:  # a vector with a range for each value
        return helper.make_node("Identity", [name], [output])
    return helper.make_node(op, [name], [output], axes=axes, keepdims=0)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, tuple[int, ...]]],
    outputs: list[tuple[str, tuple[int, ...]]] | list[tuple[str, None]],
) -> onnx.ModelProto:
    given, made = (
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in found]
        for found in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "ranges", given, made)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
