"""Float32 vectors on a device, and the position of each parameter in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxqat.device import Device
from onnxqat.qparams import FloatArray
from onnxqat.runtime import explained_memory

__all__ = ["DeviceVector", "Layout"]

ALIGNMENT = 64  # floats: 256 bytes, as CUDA aligns what it allocates


class Layout:
    """Positions of named float32 arrays in one vector, each at a multiple of 256 bytes.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The shapes of the arrays, in their order in the vector.

    Attributes
    ----------
    starts : dict of str to int
        The index of the first element of each array.
    size : int
        Length of the vector; the gaps between arrays are 0.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.starts[name] = self.size
            self.size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT

    def joined(self, arrays: Mapping[str, FloatArray]) -> FloatArray:
        """Return the vector with the given arrays; missing arrays are 0."""
        vector = np.zeros(self.size, np.float32)
        views = self.views(vector)
        for name in views.keys() & arrays.keys():
            views[name][...] = arrays[name]
        return vector

    def views(self, vector: FloatArray) -> dict[str, FloatArray]:
        """Return a view of each array in a numpy vector."""
        return {
            name: vector[self.starts[name] :][: math.prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }

    def span(self, names: Iterable[str]) -> tuple[int, int]:
        """Return start and length of arrays that are adjacent in the vector."""
        chosen = set(names)
        starts = [start for name, start in self.starts.items() if name in chosen]
        behind = [start for start in (*self.starts.values(), self.size) if start > max(starts)]
        return min(starts), min(behind) - min(starts)


class DeviceVector:
    """A float32 vector of zeros on a device.

    Parameters
    ----------
    device : Device
        The device that holds the vector.
    size : int
        The length of the vector.
    """

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size
        with explained_memory("training", device):
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
        """Bind a part of the vector to an input or output of a session.

        Parameters
        ----------
        bind : callable
            ``bind_input`` or ``bind_output`` of a session's IO binding.
        name : str
            The name of the input or output.
        shape : tuple of int
            The shape of the input or output.
        start : int
            The index of the part's first element.
        """
        address = self._value.data_ptr() + 4 * start
        bind(name, self.device.kind, self.device.index, np.float32, shape, address)
