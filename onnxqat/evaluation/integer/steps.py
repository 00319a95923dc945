"""Steps of an integer program. Each step computes the output of one operation of the chip.

A step reads tensors from a `Values` and returns its outputs in a new one: as integers, or as floats
if the output is not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.kernels import Kernel
from onnxqat.evaluation.integer.requantize import Dequantizer, Requantizer
from onnxqat.evaluation.integer.rounding import Int64Array
from onnxqat.pairs import dequantized_name
from onnxqat.rules import Arithmetic

__all__ = [
    "Addend",
    "ElementwiseStep",
    "FloatStep",
    "FloatTarget",
    "MeanStep",
    "MoveStep",
    "ProductStep",
    "QuantizeStep",
    "Step",
    "TableStep",
    "Target",
    "Values",
    "limits_of",
]

Array = NDArray[Any]


@dataclass
class Values:
    """Tensors of one batch by name: integers of quantized tensors, floats of the others."""

    levels: dict[str, Array] = field(default_factory=dict)
    floats: dict[str, Array] = field(default_factory=dict)


class Step(Protocol):
    """One operation of the program."""

    def run(self, values: Values) -> Values:
        """Return the outputs of the step."""


@dataclass(frozen=True, kw_only=True)
class QuantizeStep:
    """Quantizes a float tensor.

    Attributes
    ----------
    halves : bool
        Whether an op in float16 writes the tensor.
    """

    tensor: str
    grid: Grid
    arithmetic: Arithmetic
    halves: bool = False

    def run(self, values: Values) -> Values:
        """Quantize the tensor."""
        x = values.floats[self.tensor]
        try:
            if self.halves:
                levels = self.grid.from_halves(x, self.arithmetic.float_rounding)
            else:
                levels = self.grid.quantize_as(x, self.arithmetic)
            return Values(levels={self.tensor: levels})
        except RuleError as error:
            raise RuleError(f"'{self.tensor}': {error}") from error


@dataclass(frozen=True, kw_only=True)
class FloatStep:
    """Dequantizes integers and runs nodes in float.

    Attributes
    ----------
    session : InferenceSession
        Its inputs have the names of the tensors; a dequantized tensor is ``t/dequantized``.
    grids : mapping of str to Grid
        The grids of the quantized inputs.
    floats : tuple of str
        Names of the other inputs.
    outputs : tuple of str
        Names of the outputs.
    halves : bool
        Whether the values of the integers are float16.
    """

    session: ort.InferenceSession
    grids: Mapping[str, Grid]
    floats: tuple[str, ...]
    outputs: tuple[str, ...]
    halves: bool = False

    def run(self, values: Values) -> Values:
        """Run the nodes in float."""
        feeds = {name: values.floats[name] for name in self.floats}
        for name, grid in self.grids.items():
            read = grid.to_halves if self.halves else grid.dequantize
            feeds[dequantized_name(name)] = read(values.levels[name])
        found = self.session.run(list(self.outputs), feeds)
        return Values(floats=dict(zip(self.outputs, found, strict=True)))


@dataclass(frozen=True, kw_only=True)
class TableStep:
    """Looks up an output integer for each input integer."""

    source: str
    target: str
    lowest: int
    table: Array

    def run(self, values: Values) -> Values:
        """Look the integers up."""
        index = values.levels[self.source].astype(np.int32) - self.lowest
        return Values(levels={self.target: self.table[index]})


@dataclass(frozen=True, kw_only=True)
class MoveStep:
    """Runs nodes that move values or choose among them, which is exact on integers.

    The nodes run in float32 on centered integers; float32 represents these exactly.
    """

    session: ort.InferenceSession
    grids: Mapping[str, Grid]
    outputs: Mapping[str, Grid]
    others: tuple[str, ...]

    def run(self, values: Values) -> Values:
        """Move the integers."""
        feeds: dict[str, Array] = {name: values.floats[name] for name in self.others}
        for name, grid in self.grids.items():
            centered = grid.centered(values.levels[name])
            feeds[dequantized_name(name)] = centered.astype(np.float32)
        found = self.session.run(list(self.outputs), feeds)
        return Values(
            levels={
                name: grid.saturate(array.astype(np.int64))
                for (name, grid), array in zip(self.outputs.items(), found, strict=True)
            }
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """The quantized tensor that a kernel writes.

    Attributes
    ----------
    tensor : str
        Name of the tensor.
    grid : Grid
        Grid of the tensor.
    limits : tuple of int
        Smallest and largest integer that a Relu or Clip after the kernel lets through.
    """

    tensor: str
    grid: Grid
    limits: tuple[int, int]

    def write(self, centered: Int64Array) -> Values:
        """Return the saturated integers."""
        levels = np.clip(self.grid.saturate(centered), *self.limits)
        return Values(levels={self.tensor: levels.astype(self.grid.params.zero_point.dtype)})


@dataclass(frozen=True, kw_only=True)
class ElementwiseStep:
    """Runs a kernel on the integers of its operands; constant operands are stored here."""

    sources: tuple[str, ...]
    constants: Mapping[str, Array]
    kernel: Kernel
    target: Target

    def run(self, values: Values) -> Values:
        """Run the kernel."""
        operands = (
            self.constants[name] if name in self.constants else values.levels[name]
            for name in self.sources
        )
        return self.target.write(self.kernel(*operands))


@dataclass(frozen=True, kw_only=True)
class MeanStep:
    """Computes sums, and runs a kernel that divides them."""

    source: str
    grid: Grid
    sums: Callable[[Array], Int64Array]
    kernel_for: Callable[[Array], Kernel]
    target: Target

    def run(self, values: Values) -> Values:
        """Sum and divide."""
        centered = self.grid.centered(values.levels[self.source])
        return self.target.write(self.kernel_for(centered)(self.sums(centered)))


@dataclass(frozen=True, kw_only=True)
class FloatTarget:
    """The float tensor that dequantized sums are written to.

    Attributes
    ----------
    tensor : str
        Name of the tensor.
    limits : tuple of float
        Smallest and largest value that a Relu or Clip after the kernel lets through.
    dequantize : callable
        Returns the floats of int64 sums.
    """

    tensor: str
    limits: tuple[float, float]
    dequantize: Dequantizer

    def write(self, sums: Int64Array) -> Values:
        """Return the limited floats of sums."""
        floats = np.clip(self.dequantize(sums), *self.limits).astype(np.float32)
        return Values(floats={self.tensor: floats})


@dataclass(frozen=True, kw_only=True)
class Addend:
    """An activation that a product adds to its sums.

    Attributes
    ----------
    source : str
        Name of the tensor.
    grid : Grid
        Grid of the tensor.
    multiplier, shift : int64
        Factors ``multiplier * 2**shift`` that bring it to the scale of the sums, broadcastable.
    """

    source: str
    grid: Grid
    multiplier: Int64Array
    shift: Int64Array

    def sums(self, levels: Array) -> Int64Array:
        """Return what is added to the sums."""
        shifted = self.grid.centered(levels).astype(np.int64) << self.shift
        return np.asarray(shifted * self.multiplier)


@dataclass(frozen=True, kw_only=True)
class ProductStep:
    """A convolution or matrix product: exact sums, int32 bias, requantization.

    Attributes
    ----------
    sources : tuple of str
        Names of the operands that are activations: one or two.
    grids : tuple of Grid
        Grids of the sources.
    sums : callable
        Returns the int64 sums of the centered operands.
    bias, bias_error : int64, float64 or None
        The integer bias and its rounding error, broadcastable to the sums.
    addend : Addend or None
        An activation that is added to the sums.
    scale : float64
        s_x * s_w, broadcastable to the sums.
    requantize : callable or None
        Requantizes the sums; None if the output is float.
    target : Target or FloatTarget
        The output.
    """

    sources: tuple[str, ...]
    grids: tuple[Grid, ...]
    sums: Callable[..., Int64Array]
    bias: Int64Array | None
    bias_error: NDArray[np.float64] | None
    addend: Addend | None
    scale: NDArray[np.float64]
    requantize: Requantizer | None
    target: Target | FloatTarget

    def run(self, values: Values) -> Values:
        """Sum, add the bias and requantize."""
        return self.finish(self.accumulate(values))

    def finish(self, sums: Int64Array) -> Values:
        """Return the output for sums that include the bias."""
        if isinstance(self.target, FloatTarget):
            return self.target.write(sums)
        assert self.requantize is not None
        return self.target.write(self.requantize(sums))

    def accumulate(self, values: Values) -> Int64Array:
        """Return the sums, with the bias and the addend added."""
        operands = (
            grid.centered(values.levels[name])
            for name, grid in zip(self.sources, self.grids, strict=True)
        )
        sums = self.sums(*operands)
        if self.addend is not None:
            sums = sums + self.addend.sums(values.levels[self.addend.source])
        return sums if self.bias is None else sums + self.bias

    def changed_by_bias(self, sums: Int64Array) -> int:
        """Return how many outputs the rounding of the bias changes, with the exact factor M."""
        if self.bias_error is None or isinstance(self.target, FloatTarget):
            return 0
        grid = self.target.grid
        factor = self.scale / grid.scale
        low, high = (limit - int(grid.params.zero_point) for limit in self.target.limits)
        rounded = (np.clip(np.rint(s * factor), low, high) for s in (sums, sums - self.bias_error))
        return int(np.count_nonzero(np.subtract(*rounded)))


def limits_of(grid: Grid, ends: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Return the smallest and the largest integer that lie in all float ranges ``ends``."""
    low, high = grid.limits
    for start, stop in ends:
        found = grid.quantize(np.asarray([start, stop], np.float32), "half-even")
        low, high = max(low, int(found[0])), min(high, int(found[1]))
    return low, high
