"""What crosses the cuts for a set of samples, as the float and as the quantized network has it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.data import DataSet
from onnxqat.train.blocks.activations import Activations, Rows

__all__ = ["Samples"]

Array = NDArray[Any]
Tensors = dict[str, Rows]


class Samples:
    """The inputs of blocks, for some samples.

    Parameters
    ----------
    data : DataSet
        Read once.
    indices : int64 of shape (n,)
        Which samples of it.
    batch : int
        Samples at a time.
    store : Activations
        Where the tensors are kept.
    progress : callable
        Called after each batch that is read.

    Attributes
    ----------
    quantized, floats : dict of str to Rows
        Tensors by name. Where both networks have the same, it is kept once.
    count : int
        How many rows each one has: samples, or batches where the model is fixed to a batch.
    batch : int
        Rows at a time.
    """

    def __init__(
        self,
        data: DataSet,
        indices: NDArray[np.int64],
        batch: int,
        store: Activations,
        progress: Callable[[], None],
    ) -> None:
        self.store, self.fixed = store, data.fixed_batch is not None
        self.quantized: Tensors = {}
        self.floats: Tensors = {}
        self.constants: dict[str, Array] = {}
        self.count = len(indices) // batch if self.fixed else len(indices)
        self.batch = 1 if self.fixed else batch
        names = data.sample_inputs
        for read in data.batches(batch, indices=indices, full=True):
            inputs = {name: read.inputs[name] for name in names}
            self._append(self.quantized, inputs)
            self.constants = {n: v for n, v in read.inputs.items() if n not in names}
            progress()
        self.floats = dict(self.quantized)

    def _append(self, tensors: Tensors, values: dict[str, Array]) -> None:
        for name, value in values.items():
            rows = value[None] if self.fixed else value
            if name not in tensors:
                tensors[name] = self.store.rows(self.count, rows[0])
            tensors[name].append(rows)

    def take(
        self, tensors: Tensors, names: Iterable[str], indices: NDArray[np.int64]
    ) -> dict[str, Array]:
        """Return a batch of some tensors, and the inputs that all samples share."""
        found = {}
        for name in names:
            if name in self.constants:
                found[name] = self.constants[name]
                continue
            values = tensors[name].take(indices)
            found[name] = values[0] if self.fixed else values
        return found

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each batch, in order; the last one may have fewer."""
        for start in range(0, self.count, self.batch):
            yield np.arange(start, min(start + self.batch, self.count))

    def compute(
        self,
        tensors: Tensors,
        inputs: Collection[str],
        outputs: Collection[str],
        session: ort.InferenceSession,
        progress: Callable[[], None],
    ) -> None:
        """Add the outputs of a block to the tensors of the network that ``session`` is of."""
        for indices in self.batches():
            values = session.run(None, self.take(tensors, inputs, indices))
            self._append(tensors, dict(zip(outputs, values, strict=True)))
            progress()

    def forget(self, needed: Collection[str]) -> None:
        """Give back what no later block reads."""
        for tensors in (self.floats, self.quantized):
            for name in set(tensors) - set(needed):
                self.store.remove(tensors.pop(name))  # again, where both have the same

    def mixed(
        self,
        names: Iterable[str],
        indices: NDArray[np.int64],
        share: float,
        rng: np.random.Generator,
    ) -> dict[str, Array]:
        """Return a batch of a block's inputs, in which some values are the float network's.

        Parameters
        ----------
        share : float
            The probability of each value to be so (QDrop: Wei et al. 2022,
            https://arxiv.org/abs/2203.05740, section 3.3, at the input of the block).
        """
        found = self.take(self.quantized, names, indices)
        for name, values in found.items():
            own = name in self.constants or self.floats[name] is self.quantized[name]
            if own or values.dtype != np.float32 or not share:
                continue
            others = self.take(self.floats, [name], indices)[name]
            draws = rng.integers(0, 256, size=values.shape, dtype=np.uint8)
            np.copyto(values, others, where=draws < round(256 * share))
        return found
