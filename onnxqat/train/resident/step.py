"""Compute the loss and the gradients of a batch on a device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from onnxqat.device import Device
from onnxqat.qparams import FloatArray
from onnxqat.runtime import open_session
from onnxqat.train.engine import HIGHEST, LOWEST, StepGraph
from onnxqat.train.resident.arrays import DeviceVector, Layout
from onnxqat.train.resident.graphs import check_graph

__all__ = ["DeviceStep", "Values"]

Values = Mapping[str, ort.OrtValue]


class DeviceStep:
    """Computes the loss and the gradients of a batch into vectors on a device.

    Parameters
    ----------
    graph : StepGraph
        The graph of the loss and its gradients.
    layout : Layout
        The positions of the parameters and gradients in their vectors.
    values, gradients : DeviceVector
        The parameters, which are read, and the gradients, which are written.
    device : Device
        The device that holds these vectors.
    threads : int
        Number of CPU threads; 0: all cores.

    Attributes
    ----------
    inputs : set of str
        The names of the inputs of the training graph: a batch's arrays and the parameters.
    layout, written : Layout, DeviceVector
        The positions of the gradients, and the vector of gradients.
    check : callable
        Returns the loss of the last batch, and whether every gradient is finite. A step downloads
        nothing else.
    """

    def __init__(
        self,
        graph: StepGraph,
        layout: Layout,
        values: DeviceVector,
        gradients: DeviceVector,
        device: Device,
        *,
        threads: int = 0,
    ) -> None:
        self._session = open_session(
            graph.model,
            optimization="basic",
            threads=threads,
            name="the training graph",
            device=device,
        )
        self.inputs = {value.name for value in self._session.get_inputs()}
        self._observed = graph.observed
        names = ["loss", *(f"{t}{end}" for t in graph.tensors for end in (LOWEST, HIGHEST))]
        self._numbers = Layout(dict.fromkeys(names, ()))
        self._found = DeviceVector(device, self._numbers.size)
        self._binding = self._session.io_binding()
        for name in self.inputs & layout.shapes.keys():
            start, shape = layout.starts[name], layout.shapes[name]
            values.bind(self._binding.bind_input, name, shape, start)
        for name in (value.name for value in self._session.get_outputs()):
            if name in self._numbers.starts:
                self._found.bind(self._binding.bind_output, name, (), self._numbers.starts[name])
            else:
                learned = name.removesuffix("_grad")
                start, shape = layout.starts[learned], layout.shapes[learned]
                gradients.bind(self._binding.bind_output, name, shape, start)
        self.layout, self.written = layout, gradients
        self.check = _Check(self._found, gradients, device).run

    def run(self, feeds: Values) -> tuple[float, bool]:
        """Compute the gradients of one batch.

        Parameters
        ----------
        feeds : mapping of str to OrtValue
            Data, labels and teacher's outputs on the device, by input name.

        Returns
        -------
        loss : float
        finite : bool
            Whether every gradient is finite.
        """
        for name in self.inputs & feeds.keys():
            self._binding.bind_ortvalue_input(name, feeds[name])
        self._session.run_with_iobinding(self._binding)
        return self.check()

    def extremes(self) -> dict[str, tuple[float, float]]:
        """Return smallest and largest value in the last batch, by `TrainingForm.observed`."""
        if not self._observed:
            return {}
        numbers = self._numbers.views(self._found.get())
        return {
            name: (
                min(float(numbers[f"{t}{LOWEST}"]) for t in tensors),
                max(float(numbers[f"{t}{HIGHEST}"]) for t in tensors),
            )
            for name, tensors in self._observed.items()
        }


class _Check:
    """Downloads the loss, and whether all gradients are finite."""

    def __init__(self, loss: DeviceVector, gradients: DeviceVector, device: Device) -> None:
        self._session = open_session(
            check_graph(gradients.size), optimization="basic", name="the check", device=device
        )
        self._numbers: FloatArray = np.zeros(2, np.float32)
        self._binding = self._session.io_binding()
        loss.bind(self._binding.bind_input, "loss", ())
        gradients.bind(self._binding.bind_input, "gradient", (gradients.size,))
        address = self._numbers.ctypes.data
        self._binding.bind_output("numbers", "cpu", 0, np.float32, (2,), address)

    def run(self) -> tuple[float, bool]:
        """Return the loss, and whether all gradients are finite."""
        self._session.run_with_iobinding(self._binding)
        loss, nothing = self._numbers.tolist()
        return loss, nothing == 0
