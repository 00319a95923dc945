"""A session of the training graph that reads and writes vectors on a device in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime as ort

from onnxqat.device import Device
from onnxqat.runtime import open_session
from onnxqat.train.resident.arrays import DeviceVector, Layout

__all__ = ["BoundStep", "Places", "Values"]

Values = Mapping[str, ort.OrtValue]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The vectors that a training graph reads and writes.

    Attributes
    ----------
    layout : Layout
        The positions of the parameters, and of their gradients.
    values, gradients : DeviceVector
        The parameters, which are read, and the gradients, which are written.
    numbers : Layout
        The positions of the outputs of shape (): the loss, and the extremes of tensors.
    found : DeviceVector
        These outputs.
    """

    layout: Layout
    values: DeviceVector
    gradients: DeviceVector
    numbers: Layout
    found: DeviceVector

    def bind_parameter(self, binding: Any, name: str) -> None:
        """Bind a parameter to the input of its name."""
        start, shape = self.layout.starts[name], self.layout.shapes[name]
        self.values.bind(binding.bind_input, name, shape, start)

    def bind_output(self, binding: Any, name: str) -> None:
        """Bind an output to its place."""
        if name in self.numbers.starts:
            self.found.bind(binding.bind_output, name, (), self.numbers.starts[name])
            return
        learned = name.removesuffix("_grad")
        start, shape = self.layout.starts[learned], self.layout.shapes[learned]
        self.gradients.bind(binding.bind_output, name, shape, start)


class BoundStep:
    """Computes the loss and the gradients of a batch.

    Parameters
    ----------
    model : onnx.ModelProto
        The training graph.
    places : Places
        The vectors that it reads and writes.
    device : Device
        The device that holds them.
    threads : int
        Number of CPU threads; 0: all cores.

    Attributes
    ----------
    elsewhere : set of str
        The inputs that nodes on the CPU read, or may read, although they lie on a GPU.
    """

    def __init__(
        self, model: onnx.ModelProto, places: Places, device: Device, *, threads: int
    ) -> None:
        self.session = open_session(
            model, optimization="basic", threads=threads, name="the training graph", device=device
        )
        self._places = places
        self._binding = self.session.io_binding()
        names = [v.name for v in self.session.get_inputs() if v.name in places.layout.shapes]
        for name in names:
            places.bind_parameter(self._binding, name)
        for value in self.session.get_outputs():
            places.bind_output(self._binding, value.name)
        read = {name for node in model.graph.node for name in node.input}
        self.elsewhere = read & _read_on_the_cpu(self.session, device)
        self._copied = [name for name in names if name in self.elsewhere]

    def run(self, feeds: Values) -> None:
        """Compute with these data; without an array, with the array of the last run."""
        for name in self._copied:
            self._places.bind_parameter(self._binding, name)  # copies its present value
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, value)
        self.session.run_with_iobinding(self._binding)


def _read_on_the_cpu(session: ort.InferenceSession, device: Device) -> set[str]:
    """Return the inputs that a session on a GPU reads on the CPU.

    Binding such an input copies its values at once: later changes on the GPU are not seen
    (`IOBinding::BindInput` in onnxruntime/core/session/IOBinding.cc).
    """
    names = [value.name for value in session.get_inputs()]
    if device.kind == "cpu":
        return set()
    if not hasattr(session, "get_input_memory_infos"):  # onnxruntime before 1.23: not known
        return set(names)
    places = [info.name.lower() for info in session.get_input_memory_infos()]
    return {
        name
        for name, place in zip(names, places, strict=True)
        if not place.startswith(device.kind) or "pinned" in place  # pinned memory is the CPU's
    }
