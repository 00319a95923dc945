"""Batches on a device, with the teacher's outputs; made ahead by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.device import Device
from onnxqat.train.batches import Feeds, taught
from onnxqat.train.resident.step import Values

__all__ = ["Uploader", "ahead"]

T = TypeVar("T")


class Uploader:
    """Bring batches to a device; what the teacher makes of them stays there.

    Parameters
    ----------
    device : Device
        Where to.
    teacher : InferenceSession or None
        On that device; its outputs join the batch.
    read : collection of str
        What the training graph reads.
    """

    def __init__(
        self, device: Device, teacher: ort.InferenceSession | None, read: Collection[str]
    ) -> None:
        self.device, self.teacher, self.read = device, teacher, set(read)
        self._taught = {value.name for value in teacher.get_inputs()} if teacher else set()

    def __call__(self, feeds: Feeds) -> Values:
        """Return the batch on the device, with the teacher's outputs."""
        wanted = self.read | self._taught
        values = {name: self._uploaded(feeds[name]) for name in wanted & feeds.keys()}
        if self.teacher is not None:
            values |= taught(self.teacher, self._outputs(self.teacher, values))
        return {name: value for name, value in values.items() if name in self.read}

    def _uploaded(self, array: NDArray[Any]) -> ort.OrtValue:
        # of an array on the CPU, onnxruntime takes the memory itself
        array = np.array(array, order="C")
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
    """Yield what an iterator gives, of which a thread takes ``count`` ahead."""
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
