"""Find the values that a loss can read; labels, teacher and arrays become inputs of the graph."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxqat.choices import nearest
from onnxqat.data.arrays import Header
from onnxqat.errors import TrainingError
from onnxqat.pairs import dequantized_name

__all__ = [
    "LABELS",
    "TENSOR",
    "Arrays",
    "NoArrays",
    "Value",
    "Values",
    "array_input",
    "array_of",
    "teacher_input",
]

LABELS = "onnxqat/labels"
ARRAY = "onnxqat/data/"
TEACHER = "teacher/"
TENSOR = "tensor/"  # prefix of the name of a tensor that is not an output

Shape = tuple[int | str | None, ...]


def teacher_input(output: str) -> str:
    """Return the name of the input for the teacher's value of ``output``."""
    return f"onnxqat/{TEACHER}{output}"


def array_input(array: str, dtype: str) -> str:
    """Return the name of the input that takes an array of the data as ``dtype``."""
    return f"{ARRAY}{dtype}/{array}"


def array_of(name: str) -> tuple[str, str] | None:
    """Return the array and dtype of an input that reads an array; None for other inputs."""
    if not name.startswith(ARRAY):
        return None
    dtype, _, key = name.removeprefix(ARRAY).partition("/")
    return key, dtype


class Arrays(Protocol):
    """The arrays of the data."""

    @property
    def array_names(self) -> Sequence[str]:
        """The names of the arrays."""

    def array(self, name: str) -> Header:
        """Return the shape and dtype of one sample of an array."""


class NoArrays:
    """Data without named arrays."""

    array_names: Sequence[str] = ()

    def array(self, name: str) -> Header:
        """Raise an error: there are no arrays."""
        raise KeyError(name)


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of the graph: its name, its ONNX element type, and its shape."""

    name: str
    elem_type: int
    shape: Shape
    learned: bool = False


class Values:
    """The values that a loss can read.

    Parameters
    ----------
    graph : onnx.GraphProto
        A training form with types and shapes. Inputs are added to it.
    arrays : Arrays
        Arrays of the data.
    parameters : set of str
        Inputs that are not data.
    """

    def __init__(self, graph: onnx.GraphProto, arrays: Arrays, parameters: Set[str]) -> None:
        self.graph, self._arrays = graph, arrays
        self.outputs = [o.name for o in graph.output]
        self._known = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        for weight in graph.initializer:
            info = helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            self._known.setdefault(weight.name, info)
        self._inputs = {v.name for v in graph.input}
        self._data = self._inputs - parameters
        self._made = {o for n in graph.node for o in n.output} | self._inputs
        self._made |= {weight.name for weight in graph.initializer}
        self._batch = _shape(graph.input[0])[:1]

    def student(self, name: str) -> Value:
        """Return an output of the trained model, or ``tensor/NAME``.

        Raises
        ------
        TrainingError
            There is no such output or tensor.
        """
        if name in self.outputs:
            return self._value(name)
        if not name.startswith(TENSOR):
            tensors = (f"{TENSOR}{n}" for n in sorted(self._made))
            raise TrainingError(
                f"--loss: the model has no output '{name}'. {nearest(name, self.outputs)} "
                f"Among other tensors: {nearest(TENSOR + name, tensors)}"
            )
        tensor = name.removeprefix(TENSOR)
        quantized = dequantized_name(tensor)
        found = quantized if quantized in self._made else tensor
        if found not in self._made:
            raise TrainingError(
                f"--loss: the prepared model has no tensor '{tensor}'. "
                f"{nearest(tensor, sorted(self._made))}"
            )
        return self._value(found)

    def teacher(self, name: str) -> Value:
        """Return the teacher's value of an output or ``tensor/NAME``; see `student`."""
        value = self.student(name)
        source = Value(name=teacher_input(name), elem_type=value.elem_type, shape=value.shape)
        return self._input(source)

    def labels(self, shape: Shape) -> Value:
        """Return the labels of the data."""
        return self._input(Value(name=LABELS, elem_type=TensorProto.INT64, shape=shape))

    def array(self, name: str, elem_type: int, shape: Shape | None = None) -> Value:
        """Return an array of the data, as ``elem_type``.

        Parameters
        ----------
        shape : tuple, optional
            The required shape, with the samples along the first axis.

        Raises
        ------
        TrainingError
            There is no such array, or it has another dtype or shape.
        """
        if name not in self._arrays.array_names:
            raise TrainingError(
                f"--loss: the data have no array '{name}'. "
                f"{nearest(name, self._arrays.array_names)}"
            )
        header = self._arrays.array(name)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
        if not np.can_cast(header.dtype, dtype, "same_kind"):
            raise TrainingError(
                f"--loss: array '{name}' is {header.dtype}, but {dtype} is needed. Convert it."
            )
        found = (*self._batch, *header.shape)
        if shape is not None and not fits(found, shape):
            raise TrainingError(
                f"--loss: array '{name}' has samples of shape {header.shape}, but "
                f"{tuple(shape[1:])} is needed. Name another array."
            )
        source = array_input(name, dtype.name)
        return self._input(Value(name=source, elem_type=elem_type, shape=found))

    def find(self, name: str, elem_type: int) -> Value | None:
        """Return the value that an input of a loss file names, or None.

        The name is looked up in this order: an output, an input or ``tensor/NAME`` of the model;
        ``teacher/`` followed by one of these, for the teacher's value; an array of the data.
        """
        if name in self.outputs or name.startswith(TENSOR):
            return self.student(name)
        if name in self._data:
            return self._value(name)
        if name.startswith(TEACHER):
            return self.teacher(name.removeprefix(TEACHER))
        return self.array(name, elem_type) if name in self._arrays.array_names else None

    def names(self) -> list[str]:
        """Return the names that `find` knows, without inner tensors."""
        taught = [f"{TEACHER}{name}" for name in self.outputs]
        return [*self.outputs, *taught, *self._arrays.array_names]

    def _value(self, name: str) -> Value:
        info = self._known.get(name)
        if info is None or not info.type.tensor_type.HasField("shape"):
            raise TrainingError(f"--loss: the shape of '{name}' is unknown. Choose another tensor.")
        elem_type = info.type.tensor_type.elem_type
        learned = elem_type == TensorProto.FLOAT
        return Value(name=name, elem_type=elem_type, shape=_shape(info), learned=learned)

    def _input(self, value: Value) -> Value:
        if value.name not in self._inputs:
            info = helper.make_tensor_value_info(value.name, value.elem_type, value.shape)
            self.graph.input.append(info)
            self._inputs.add(value.name)
        return value


def fits(shape: Shape, wanted: Shape) -> bool:
    """Return whether two shapes can be equal, given their unknown lengths."""
    return len(shape) == len(wanted) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(shape, wanted, strict=True)
    )


def _shape(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
