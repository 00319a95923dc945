"""Replay a training step as one CUDA graph.

The first run of a session that captures records all its kernels; each later run replays them with
one call. A replay reads and writes the memory of the first run. Parameters and gradients never
move; each batch is copied, on the device, to the arrays of the first batch.
"""

from __future__ import annotations

from threading import Lock

import onnxruntime as ort
from onnx import helper

from onnxqat.device import Device
from onnxqat.errors import ModelError
from onnxqat.runtime import explained_memory, open_session
from onnxqat.train.resident.bound import BoundStep, Values

__all__ = ["USING_DEVICE", "CapturedStep"]

OPSET, IR_VERSION = 17, 8
# While one thread records, CUDA refuses what other threads allocate or copy
# (https://docs.nvidia.com/cuda/cuda-runtime-api, cudaStreamCaptureModeGlobal).
USING_DEVICE = Lock()


class CapturedStep:
    """Computes the loss and the gradients of batches of one shape.

    Parameters
    ----------
    step : BoundStep
        A step whose session captures.
    device : Device
        The device that holds its arrays.

    Attributes
    ----------
    recorded : bool
        Whether the first run has succeeded.

    Raises
    ------
    ModelError
        An input is read on the CPU, so a replay would not see its changes.
    """

    def __init__(self, step: BoundStep, device: Device) -> None:
        if step.elsewhere:
            raise ModelError(f"'{min(step.elsewhere)}' is, or may be, read on the CPU")
        self._step, self._device, self.recorded = step, device, False
        self._fixed: Values = {}

    def fits(self, feeds: Values) -> bool:
        """Return whether a batch has the shapes of the first batch."""
        shapes = {name: value.shape() for name, value in self._fixed.items()}
        return not shapes or shapes == {name: value.shape() for name, value in feeds.items()}

    def run(self, feeds: Values) -> None:
        """Compute with these data."""
        if self.recorded:
            self._copy(feeds)
            self._step.run({})
            return
        with USING_DEVICE:
            self._fixed = {name: self._like(value) for name, value in feeds.items()}
            self._open_copy()
            self._copy(feeds)
            self._step.run(self._fixed)
        self.recorded = True

    def _like(self, value: ort.OrtValue) -> ort.OrtValue:
        """Return an array of the same type and shape on the device."""
        dtype = helper.tensor_dtype_to_np_dtype(value.element_type())
        place = (self._device.kind, self._device.index)
        with explained_memory("training", self._device):
            return ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), dtype, *place)

    def _open_copy(self) -> None:
        """Open a session that copies a batch to the arrays of the first batch."""
        nodes, ends = [], []
        for name, value in self._fixed.items():
            nodes.append(helper.make_node("Identity", [name], [f"{name}_out"]))
            ends.append((name, value.element_type(), value.shape()))
        inputs = [helper.make_tensor_value_info(*end) for end in ends]
        outputs = [helper.make_tensor_value_info(f"{name}_out", *end) for name, *end in ends]
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            helper.make_graph(nodes, "copy", inputs, outputs),
            opset_imports=opsets,
            ir_version=IR_VERSION,
        )
        self._session = open_session(model, optimization="basic", device=self._device)
        self._binding = self._session.io_binding()
        for name, value in self._fixed.items():
            self._binding.bind_ortvalue_output(f"{name}_out", value)

    def _copy(self, feeds: Values) -> None:
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, value)
        self._session.run_with_iobinding(self._binding)
