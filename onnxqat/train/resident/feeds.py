"""Batches on a device, with the teacher's outputs; a thread prepares them in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.device import Device
from onnxqat.runtime import explained_memory
from onnxqat.train.batches import Feeds, taught
from onnxqat.train.resident.bound import Values
from onnxqat.train.resident.capture import USING_DEVICE

__all__ = ["AHEAD", "Uploader", "ahead"]

AHEAD = 2  # number of batches uploaded in advance

T = TypeVar("T")


class Uploader:
    """Uploads batches to a device; the teacher's outputs stay on the device.

    Parameters
    ----------
    device : Device
        The device that receives the batches.
    teacher : InferenceSession or None
        The teacher's session on that device; its outputs are added to the batch.
    read : collection of str
        The names of the inputs of the training graph.
    """

    def __init__(
        self, device: Device, teacher: ort.InferenceSession | None, read: Collection[str]
    ) -> None:
        self.device, self.teacher, self.read = device, teacher, set(read)
        self._taught = {value.name for value in teacher.get_inputs()} if teacher else set()

    def __call__(self, feeds: Feeds) -> Values:
        """Return the batch on the device, with the teacher's outputs."""
        wanted = self.read | self._taught
        with USING_DEVICE:
            values = {name: self._uploaded(feeds[name]) for name in wanted & feeds.keys()}
            if self.teacher is not None:
                values |= taught(self.teacher, self._outputs(self.teacher, values))
        return {name: value for name, value in values.items() if name in self.read}

    def _uploaded(self, array: NDArray[Any]) -> ort.OrtValue:
        # on the CPU, onnxruntime uses the array's memory without copying it
        array = np.array(array, order="C")
        with explained_memory("training", self.device):
            return ort.OrtValue.ortvalue_from_numpy(array, self.device.kind, self.device.index)

    def _outputs(self, teacher: ort.InferenceSession, values: Values) -> list[ort.OrtValue]:
        binding = teacher.io_binding()
        for name in self._taught:
            binding.bind_ortvalue_input(name, values[name])
        for output in teacher.get_outputs():
            binding.bind_output(output.name, self.device.kind, self.device.index)
        teacher.run_with_iobinding(binding)
        return list(binding.get_outputs())


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the items of an iterator; a thread computes ``count`` of them in advance."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        waiting: deque[Future[T | object]] = deque()

        def take() -> None:
            waiting.append(pool.submit(next, items, end))

        for _ in range(count):
            take()
        while (item := waiting.popleft().result()) is not end:
            take()
            yield item  # type: ignore[misc]
