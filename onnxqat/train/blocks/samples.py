"""The tensors of samples at the cuts, in the float and in the quantized network."""

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
        The data, which are read once.
    indices : int64 of shape (n,)
        The indices of the samples.
    batch : int
        Samples per batch.
    store : Activations
        Stores the tensors.
    progress : callable
        Called after reading each batch.

    Attributes
    ----------
    quantized, floats : dict of str to Rows
        Tensors by name. A tensor that is equal in both networks is stored once.
    count : int
        The number of rows of each tensor: samples, or batches if the model's batch is fixed.
    batch : int
        Rows per batch.
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
        """Return a batch of some tensors, with the inputs that all samples share."""
        found = {}
        for name in names:
            if name in self.constants:
                found[name] = self.constants[name]
                continue
            values = tensors[name].take(indices)
            found[name] = values[0] if self.fixed else values
        return found

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each batch, in order; the last batch can be smaller."""
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
        """Compute the outputs of a block and add them to the tensors of the session's network."""
        for indices in self.batches():
            values = session.run(None, self.take(tensors, inputs, indices))
            self._append(tensors, dict(zip(outputs, values, strict=True)))
            progress()

    def forget(self, needed: Collection[str]) -> None:
        """Free the tensors that no later block reads."""
        for tensors in (self.floats, self.quantized):
            for name in set(tensors) - set(needed):
                # called twice for tensors that both networks share
                self.store.remove(tensors.pop(name))

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
            The probability of each value to come from the float network (QDrop: Wei et al. 2022,
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
