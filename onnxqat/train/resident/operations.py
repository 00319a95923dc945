"""Operations on whole vectors on a device."""

from __future__ import annotations

import onnx

from onnxqat.device import Device
from onnxqat.runtime import open_session
from onnxqat.train.resident.arrays import DeviceVector
from onnxqat.train.resident.graphs import add_graph, copy_graph, mean_graph

__all__ = ["GradientMean", "Operation"]


class Operation:
    """A session that computes one vector from others, element by element."""

    def __init__(self, graph: onnx.ModelProto, device: Device, **vectors: DeviceVector) -> None:
        self._vectors = vectors  # keeps their memory while the session uses it
        self._session = open_session(graph, optimization="basic", device=device)
        self._binding = self._session.io_binding()
        for value in self._session.get_inputs():
            vector = vectors[value.name]
            vector.bind(self._binding.bind_input, value.name, (vector.size,))
        for value in self._session.get_outputs():
            vector = vectors[value.name]
            vector.bind(self._binding.bind_output, value.name, (vector.size,))

    def run(self) -> None:
        """Compute the vector."""
        self._session.run_with_iobinding(self._binding)


class GradientMean:
    """The mean of the gradients of the batches of a step.

    Parameters
    ----------
    device : Device
        The device that holds the gradients.
    gradients : DeviceVector
        The gradients of the last batch; `end` replaces them by the mean.
    batches : int
        The number of batches of a step.
    """

    def __init__(self, device: Device, gradients: DeviceVector, batches: int) -> None:
        self._several = batches > 1
        if not self._several:
            return
        size, total = gradients.size, DeviceVector(device, gradients.size)
        self._begin = Operation(copy_graph(size), device, source=gradients, target=total)
        self._add = Operation(
            add_graph(size), device, total=total, gradient=gradients, target=total
        )
        self._divide = Operation(mean_graph(size, batches), device, total=total, target=gradients)

    def add(self, number: int) -> None:
        """Add the gradients of batch ``number`` of the step, counted from 0."""
        if self._several:
            (self._add if number else self._begin).run()

    def end(self) -> None:
        """Replace the gradients by their mean over the batches of the step."""
        if self._several:
            self._divide.run()
