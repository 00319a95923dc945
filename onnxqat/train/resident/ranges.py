"""Clipping ranges that follow the observed extremes, on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxqat.calibration import weight_range
from onnxqat.device import Device
from onnxqat.errors import TrainingError
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.runtime import Session, open_session
from onnxqat.train.engine import HIGHEST, LOWEST, Flat
from onnxqat.train.form import TrainingForm
from onnxqat.train.optimization.ranges import Ranges
from onnxqat.train.resident.arrays import DeviceVector, Layout
from onnxqat.train.resident.range_graphs import Followed, ranges_graph, seen_graph
from onnxqat.train.resident.step import DeviceStep

__all__ = ["DeviceRanges"]

Run = Callable[[], None]
WEIGHT = "weight/"  # in front of the names of inputs


class DeviceRanges:
    """The counterpart of `Ranges` for parameters on a device.

    A step downloads two numbers: whether all ranges are finite, and the smallest scale.

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
        self._host = Ranges(form, Flat(form.parameters), model, constant)
        self._constant = constant
        self._layout, self._values, self._device = layout, values, device
        observed = [name for name, tensors in form.observed.items() if tensors]
        self._tensors = {name: form.observed[name] for name in observed}
        self._rows = [list(self._host.points).index(name) for name in observed]
        self._followed = {name: self._described(name) for name in self._host.points}
        count = len(observed)
        self._low, self._high, self._seen_low, self._seen_high = (
            DeviceVector(device, max(count, 1)) for _ in range(4)
        )
        self._numbers = np.zeros(2, np.float32)
        self._moves: dict[tuple[str, ...], Run] = {}
        self._looks: dict[int, tuple[DeviceStep, Run]] = {}
        self.restore(self._host.averages)

    def _described(self, name: str) -> Followed:
        points = self._host.points[name]
        row = list(self._tensors).index(name) if name in self._tensors else None
        weights = [point.tensor for point in points if point.role == "weight"]
        if len(weights) == len(points):
            weights = weights[:1]  # as in `Ranges`
        elif row is None:  # of activations that no step observes
            weights = []
        return Followed(
            name=name,
            spec=points[0].spec,
            row=row,
            weights={f"{WEIGHT}{w}": self._layout.shapes[w] for w in weights},
            moves_zero_point=zero_point_name(name) in self._layout.shapes,
        )

    def begin(self) -> None:
        """Reset the observed ranges at the beginning of a step."""
        everything = np.full(self._low.size, np.inf, np.float32)
        self._seen_low.set(everything)
        self._seen_high.set(-everything)

    def see(self, step: DeviceStep) -> None:
        """Add the smallest and the largest value of each tensor in the last batch of a step."""
        if not self._rows:
            return
        if id(step) not in self._looks:
            self._looks[id(step)] = (step, self._opened_look(step))
        self._looks[id(step)][1]()

    def _opened_look(self, step: DeviceStep) -> Run:
        """Return a function that reads the extremes that a step has computed."""
        most = max(len(tensors) for tensors in self._tensors.values())
        places = [np.full((len(self._rows), most), -1, np.int64) for _ in range(2)]
        for row, name in enumerate(self._tensors):
            for column, tensor in enumerate(step.observed.get(name, ())):
                for at, end in zip(places, (LOWEST, HIGHEST), strict=True):
                    at[row, column] = step.numbers.starts[f"{tensor}{end}"]
        session = open_session(
            seen_graph(step.numbers.size, places), optimization="basic", device=self._device
        )
        binding = session.io_binding()
        step.found.bind(binding.bind_input, "found", (step.numbers.size,))
        for name, vector in (("low", self._seen_low), ("high", self._seen_high)):
            vector.bind(binding.bind_input, name, (vector.size,))
            vector.bind(binding.bind_output, f"{name}_out", (vector.size,))
        return lambda: session.run_with_iobinding(binding)

    def step(self, workers: Workers, frozen: Callable[[str], bool]) -> None:
        """Move the ranges, and set scales and zero_points accordingly, see `Ranges.step`."""
        if workers.size > 1 and self._rows:
            seen = np.stack([self._seen_low.get(), self._seen_high.get()], axis=1)
            workers.widen(seen)
            self._seen_low.set(seen[:, 0].copy())
            self._seen_high.set(seen[:, 1].copy())
        moving = tuple(name for name in self._followed if self._moves_now(name, frozen))
        if not moving:
            return
        if moving not in self._moves:
            self._moves[moving] = self._opened_move(moving)
        self._moves[moving]()
        zero, smallest = self._numbers.tolist()
        if zero != 0 or not smallest > 0:
            self._refuse(moving)

    def _moves_now(self, name: str, frozen: Callable[[str], bool]) -> bool:
        if frozen(scale_name(name)):
            return False
        return bool(self._constant) if name in self._tensors else bool(self._followed[name].weights)

    def _opened_move(self, moving: tuple[str, ...]) -> Run:
        """Return a function that moves these ranges."""
        found = [self._followed[name] for name in moving]
        graph = ranges_graph(found, len(self._rows), self._constant)
        session = open_session(graph, optimization="basic", name="the ranges", device=self._device)
        binding = session.io_binding()
        self._bind(session, binding)
        address = self._numbers.ctypes.data
        binding.bind_output("numbers", "cpu", 0, np.float32, (2,), address)
        return lambda: session.run_with_iobinding(binding)

    def _bind(self, session: Session, binding: Any) -> None:
        """Bind vectors, weights, scales and zero_points to a graph of `ranges_graph`."""
        vectors = {
            "low": self._low,
            "high": self._high,
            "seen_low": self._seen_low,
            "seen_high": self._seen_high,
        }
        for value in session.get_inputs():
            if (vector := vectors.get(value.name)) is not None:
                vector.bind(binding.bind_input, value.name, (vector.size,))
            else:
                place = self._layout.starts[value.name.removeprefix(WEIGHT)]
                self._values.bind(binding.bind_input, value.name, tuple(value.shape), place)
        for value in session.get_outputs():
            if (vector := vectors.get(value.name.removesuffix("_out"))) is not None:
                vector.bind(binding.bind_output, value.name, (vector.size,))
            elif value.name != "numbers":
                place = self._layout.starts[value.name]
                self._values.bind(binding.bind_output, value.name, tuple(value.shape), place)

    def _refuse(self, moving: tuple[str, ...]) -> None:
        """Raise the error of `Ranges` for the first range that has no scale."""
        averages, weights = self.averages(), self._layout.views(self._values.get())
        for row, (name, points) in zip(averages, self._host.points.items(), strict=True):
            if name not in moving:
                continue
            low, high = row
            if name not in self._tensors:
                low, high = weight_range(weights[points[0].tensor], points[0].spec, "minmax")
            self._host.assign(name, points[0], low, high)
        raise TrainingError("A clipping range is not finite. Try a smaller --lr.")

    def averages(self) -> FloatArray:
        """Return `Ranges.averages`, downloaded from the device."""
        if self._rows:
            for column, vector in enumerate((self._low, self._high)):
                self._host.averages[self._rows, column] = vector.get()
        return self._host.averages

    def restore(self, averages: FloatArray) -> None:
        """Set the ranges of the activations, in the form of `Ranges.averages`."""
        self._host.averages[...] = averages
        if self._rows:
            for column, vector in enumerate((self._low, self._high)):
                vector.set(self._host.averages[self._rows, column])
