"""Float32 vectors on a device, and where in them each parameter lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxqat.device import Device
from onnxqat.qparams import FloatArray

__all__ = ["DeviceVector", "Layout"]

ALIGNMENT = 64  # floats: 256 bytes, as CUDA aligns what it allocates


class Layout:
    """Named float32 arrays, one behind the other, each at a multiple of 256 bytes.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        In order.

    Attributes
    ----------
    starts : dict of str to int
        Where each begins.
    size : int
        Length of the vector; what lies between arrays is 0.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.starts[name] = self.size
            self.size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT

    def joined(self, arrays: Mapping[str, FloatArray]) -> FloatArray:
        """Return the vector of some arrays; one that is left out is 0."""
        vector = np.zeros(self.size, np.float32)
        views = self.views(vector)
        for name in views.keys() & arrays.keys():
            views[name][...] = arrays[name]
        return vector

    def views(self, vector: FloatArray) -> dict[str, FloatArray]:
        """Return each array as a part of a vector in numpy."""
        return {
            name: vector[self.starts[name] :][: math.prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }

    def span(self, names: Iterable[str]) -> tuple[int, int]:
        """Return start and length of arrays that lie side by side."""
        chosen = set(names)
        starts = [start for name, start in self.starts.items() if name in chosen]
        behind = [start for start in (*self.starts.values(), self.size) if start > max(starts)]
        return min(starts), min(behind) - min(starts)


class DeviceVector:
    """A float32 vector of zeros on a device.

    Parameters
    ----------
    device : Device
        Where it lies.
    size : int
        Its length.
    """

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(
            [size], np.float32, device.kind, device.index
        )
        self.set(np.zeros(size, np.float32))

    def set(self, values: FloatArray) -> None:
        """Upload all values."""
        self._value.update_inplace(values)

    def get(self) -> FloatArray:
        """Download all values."""
        return np.array(self._value.numpy())

    def bind(self, bind: Any, name: str, shape: tuple[int, ...], start: int = 0) -> None:
        """Let a session read or write a part of it.

        Parameters
        ----------
        bind : callable
            ``bind_input`` or ``bind_output`` of a session's IO binding.
        name : str
            Of the input or output.
        shape : tuple of int
            Its shape.
        start : int
            Where the part begins.
        """
        address = self._value.data_ptr() + 4 * start
        bind(name, self.device.kind, self.device.index, np.float32, shape, address)
