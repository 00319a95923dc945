"""Compute the loss and the gradients of a batch on a device."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from onnxqat.device import Device
from onnxqat.errors import ModelError, OnnxQatError
from onnxqat.qparams import FloatArray
from onnxqat.runtime import open_session
from onnxqat.train.engine import HIGHEST, LOWEST, StepGraph
from onnxqat.train.resident.arrays import DeviceVector, Layout
from onnxqat.train.resident.bound import BoundStep, Places, Values
from onnxqat.train.resident.capture import CapturedStep
from onnxqat.train.resident.graphs import check_graph
from onnxqat.train.resident.replayable import obstacle

__all__ = ["DeviceStep"]

logger = logging.getLogger(__name__)


class DeviceStep:
    """Computes the loss and the gradients of a batch into vectors on a device.

    On a GPU, a step is replayed as a CUDA graph if onnxruntime and the graph allow it; otherwise,
    a line in the log says why not.

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
    observed : dict of str to tuple of str
        The tensors that determine a clipping range, by `QuantPoint.parameters`.
    numbers, found : Layout, DeviceVector
        The loss and the extremes of these tensors, with the names of the graph's outputs.
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
        self.inputs = {value.name for value in graph.model.graph.input}
        self.observed = graph.observed
        names = ["loss", *(f"{t}{end}" for t in graph.tensors for end in (LOWEST, HIGHEST))]
        self.numbers = Layout(dict.fromkeys(names, ()))
        self.found = DeviceVector(device, self.numbers.size)
        self.layout, self.written = layout, gradients
        self._model, self._device, self._threads = graph.model, device, threads
        self._places = Places(
            layout=layout,
            values=values,
            gradients=gradients,
            numbers=self.numbers,
            found=self.found,
        )
        self._plain: BoundStep | None = None
        self._captured = self._opened_captured() if device.captures else None
        if self._captured is None:
            self._plain = self._opened(device)
        self.check = _Check(self.found, gradients, device).run

    def _opened(self, device: Device) -> BoundStep:
        return BoundStep(self._model, self._places, device, threads=self._threads)

    def _opened_captured(self) -> CapturedStep | None:
        """Return a step that is replayed as a CUDA graph, or None if onnxruntime refuses it."""
        try:
            if (reason := obstacle(self._model)) is not None:
                raise ModelError(reason)
            step = self._opened(replace(self._device, captured=True))
            return CapturedStep(step, self._device)
        except OnnxQatError as error:
            _tell(error)
            return None

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
        feeds = {name: feeds[name] for name in self.inputs & feeds.keys()}
        if not self._replayed(feeds):
            self._plain = self._plain or self._opened(self._device)
            self._plain.run(feeds)
        return self.check()

    def _replayed(self, feeds: Values) -> bool:
        """Compute by the CUDA graph; return False if there is none for this batch."""
        captured = self._captured
        if captured is None or not captured.fits(feeds):
            return False
        try:
            captured.run(feeds)
        except OnnxQatError as error:
            if captured.recorded:
                raise
            self._captured = None
            _tell(error)
            return False
        return True


def _tell(error: OnnxQatError) -> None:
    said = " ".join(str(error.__cause__ or error).split())[:300]
    logger.warning("Training runs without a CUDA graph: %s", said)


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
