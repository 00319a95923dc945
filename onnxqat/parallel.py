"""Several processes that calibrate or train one model, each on its share of the samples.

``mpirun -n N`` starts them; they meet through mpi4py, the optional extra ``mpi``. What they sum,
they sum in order of rank, whatever MPI it is and however many machines: all hold the same
parameters, and those of one process that takes the same batches one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import TrainingError

__all__ = ["Workers", "join_workers"]

T = TypeVar("T")
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by the mpirun of MPICH, Intel MPI; of Open MPI


class Workers:
    """The processes that work together; here, this one alone.

    Attributes
    ----------
    rank, size : int
        Which of them this is, from 0, and how many there are. Worker 0 evaluates, writes, speaks.
    """

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """Return which of ``count`` things are this worker's: neighbours, in order of rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def average(self, values: NDArray[Any]) -> None:
        """Replace an array by its mean over the workers, summed in order of rank."""

    def widen(self, ranges: NDArray[Any]) -> None:
        """Replace ranges, of shape (n, 2), by those that cover the ranges of all workers."""

    def spread(self, values: NDArray[Any]) -> None:
        """Replace an array by that of worker 0."""

    def any(self, flag: bool) -> bool:
        """Return whether any worker says so."""
        return flag

    def first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` gives worker 0."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Return to worker 0 everybody's value in order of rank, and nothing to the others."""
        return [value]

    def leave(self) -> None:
        """End in order. Who ends without it takes the others along, which would wait for ever."""


class _MpiWorkers(Workers):
    """The processes of ``MPI.COMM_WORLD``."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size

    def average(self, values: NDArray[Any]) -> None:
        # As a ring Allreduce does, each sums one part for all; MPI leaves the order of its sums
        # open, and theirs differs by size, machine and version.
        flat = values.reshape(-1)
        parts = np.zeros((self.size, -(-flat.size // self.size)), values.dtype)
        parts.reshape(-1)[: flat.size] = flat
        mine = np.empty_like(parts)
        self.world.Alltoall(parts, mine)
        total = mine[0]
        for part in mine[1:]:
            total += part
        total /= self.size
        self.world.Allgather(total, parts)
        flat[...] = parts.reshape(-1)[: flat.size]

    def widen(self, ranges: NDArray[Any]) -> None:
        for column, op in ((0, self.mpi.MIN), (1, self.mpi.MAX)):
            ends = ranges[:, column].copy()
            self.world.Allreduce(self.mpi.IN_PLACE, ends, op=op)
            ranges[:, column] = ends

    def spread(self, values: NDArray[Any]) -> None:
        self.world.Bcast(values, root=0)

    def any(self, flag: bool) -> bool:
        return bool(self.world.allreduce(flag, op=self.mpi.LOR))

    def first(self, make: Callable[[], T]) -> T:
        made: T = self.world.bcast(make() if self.rank == 0 else None, root=0)
        return made

    def gather(self, value: T) -> list[T]:
        return self.world.gather(value, root=0) or []

    def leave(self) -> None:
        self.mpi.Finalize()


def join_workers() -> Workers:
    """Return the workers this process is one of, as mpirun started it.

    Raises
    ------
    TrainingError
        mpi4py is not installed, or belongs to another MPI than mpirun.
    """
    started = max(int(os.environ.get(name, "1")) for name in SIZES)
    if started == 1:
        return Workers()
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # at exit it would wait for the others, also after an error
        from mpi4py import MPI
    except ImportError as error:
        raise TrainingError(
            f"mpirun started {started} processes, and mpi4py is not installed. Run pip install "
            "'onnxqat[mpi]'."
        ) from error
    if MPI.COMM_WORLD.size != started:
        raise TrainingError(
            f"mpirun started {started} processes, and mpi4py knows of {MPI.COMM_WORLD.size}. Use "
            "the mpirun of the MPI that mpi4py was installed for."
        )
    return _MpiWorkers(MPI)
