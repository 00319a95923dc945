"""Steps of an integer program: what runs as one, from the integers it reads to those it writes.

A step reads a `Values` and returns what it computed: integers by tensor, and floats by tensor
where a reader takes them unquantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.kernels import Kernel
from onnxqat.evaluation.integer.requantize import Requantizer
from onnxqat.evaluation.integer.rounding import Int64Array
from onnxqat.pairs import dequantized_name
from onnxqat.qparams import Rounding

__all__ = [
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
    """Tensors of one batch: integers where they are quantized, floats where they are not."""

    levels: dict[str, Array] = field(default_factory=dict)
    floats: dict[str, Array] = field(default_factory=dict)


class Step(Protocol):
    """What runs as one."""

    def run(self, values: Values) -> Values:
        """Return what the step writes."""


@dataclass(frozen=True, kw_only=True)
class QuantizeStep:
    """A float tensor to its integers."""

    tensor: str
    grid: Grid
    rounding: Rounding

    def run(self, values: Values) -> Values:
        """Quantize the tensor."""
        x = values.floats[self.tensor]
        return Values(levels={self.tensor: self.grid.quantize(x, self.rounding)})


@dataclass(frozen=True, kw_only=True)
class FloatStep:
    """Nodes in float: integers are dequantized before them.

    Attributes
    ----------
    session : InferenceSession
        Its inputs are named like the tensors, dequantized ones ``t/dequantized``.
    grids : mapping of str to Grid
        The grids of the tensors that enter as integers.
    floats : tuple of str
        Tensors that enter as they are.
    outputs : tuple of str
    """

    session: ort.InferenceSession
    grids: Mapping[str, Grid]
    floats: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: Values) -> Values:
        """Run the nodes in float."""
        feeds = {name: values.floats[name] for name in self.floats}
        feeds |= {
            dequantized_name(name): grid.dequantize(values.levels[name])
            for name, grid in self.grids.items()
        }
        found = self.session.run(list(self.outputs), feeds)
        return Values(floats=dict(zip(self.outputs, found, strict=True)))


@dataclass(frozen=True, kw_only=True)
class TableStep:
    """One output integer for each input integer."""

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
    """Nodes that move values, or choose among them: exact on integers.

    They run in float32 on centered integers, which it holds exactly.
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
    """Where a kernel's result goes.

    Attributes
    ----------
    tensor : str
    grid : Grid
    limits : tuple of int
        What a Relu or a Clip behind the kernel lets through, in integers of the grid.
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
    """A kernel over the levels of its operands; a constant operand stands in it."""

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
    """Sums, and a kernel that divides them."""

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
    """Where sums go that leave as floats: the dequantized accumulator.

    Attributes
    ----------
    tensor : str
    limits : tuple of float
        What a Relu or a Clip behind the kernel lets through.
    """

    tensor: str
    limits: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ProductStep:
    """A convolution or matrix product: exact sums, int32 bias, requantization.

    Attributes
    ----------
    sources : tuple of str
        One tensor, or two where both operands are activations.
    grids : tuple of Grid
        Theirs.
    sums : callable
        Returns the int64 sums of the centered operands.
    bias, bias_error : int64, float64 or None
        Broadcastable to the sums: the bias, and what its rounding added to it.
    scale : float64
        s_x * s_w, broadcastable to the sums.
    requantize : callable or None
        None where the sums leave as floats.
    target : Target or FloatTarget
    """

    sources: tuple[str, ...]
    grids: tuple[Grid, ...]
    sums: Callable[..., Int64Array]
    bias: Int64Array | None
    bias_error: NDArray[np.float64] | None
    scale: NDArray[np.float64]
    requantize: Requantizer | None
    target: Target | FloatTarget

    def run(self, values: Values) -> Values:
        """Sum, add the bias and requantize."""
        return self.finish(self.accumulate(values))

    def finish(self, sums: Int64Array) -> Values:
        """Return what the sums become."""
        if isinstance(self.target, FloatTarget):
            floats = np.clip(sums * self.scale, *self.target.limits).astype(np.float32)
            return Values(floats={self.target.tensor: floats})
        assert self.requantize is not None
        return self.target.write(self.requantize(sums))

    def accumulate(self, values: Values) -> Int64Array:
        """Return the sums with their bias."""
        operands = (
            grid.centered(values.levels[name])
            for name, grid in zip(self.sources, self.grids, strict=True)
        )
        sums = self.sums(*operands)
        return sums if self.bias is None else sums + self.bias

    def changed_by_bias(self, sums: Int64Array) -> int:
        """Return how many outputs the rounding of the bias changes, requantized by M itself."""
        if self.bias_error is None or isinstance(self.target, FloatTarget):
            return 0
        grid = self.target.grid
        factor = self.scale / grid.scale
        low, high = (limit - int(grid.params.zero_point) for limit in self.target.limits)
        rounded = (np.clip(np.rint(s * factor), low, high) for s in (sums, sums - self.bias_error))
        return int(np.count_nonzero(np.subtract(*rounded)))


def limits_of(grid: Grid, ends: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Return the integers between which all of the float ranges ``ends`` let values through."""
    low, high = grid.limits
    for start, stop in ends:
        found = grid.quantize(np.asarray([start, stop], np.float32), "half-even")
        low, high = max(low, int(found[0])), min(high, int(found[1]))
    return low, high
