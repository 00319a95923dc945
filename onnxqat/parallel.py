"""Calibrate or train one model with several processes, each on its share of the samples.

``mpirun -n N`` starts the processes, which communicate through mpi4py (the optional extra ``mpi``).
Sums are computed in order of rank, with any MPI and any number of machines. All processes therefore
have the same parameters, and a single process that accumulates the same batches gets the same.
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
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by mpirun of MPICH, Intel MPI and Open MPI


class Workers:
    """The processes that work together; this base class is a single process.

    Attributes
    ----------
    rank, size : int
        The number of this process, from 0, and the number of processes. Worker 0 evaluates, writes
        files and prints.
    """

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """Return this worker's part of ``count`` items: a contiguous slice, in order of rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def average(self, values: NDArray[Any]) -> None:
        """Replace an array in place by its mean over the workers, summed in order of rank."""

    def widen(self, ranges: NDArray[Any]) -> None:
        """Widen ranges, of shape (n, 2), in place so that they cover the ranges of all workers."""

    def spread(self, values: NDArray[Any]) -> None:
        """Replace an array in place by that of worker 0."""

    def any(self, flag: bool) -> bool:
        """Return whether the flag of any worker is set."""
        return flag

    def first(self, make: Callable[[], T]) -> T:
        """Return to all workers the result of ``make`` on worker 0."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Return the values of all workers in order of rank to worker 0, and [] to the others."""
        return [value]

    def leave(self) -> None:
        """Leave the group in order. A process that exits without calling this aborts the others.

        Otherwise they would wait forever for it.
        """


class _MpiWorkers(Workers):
    """The processes of ``MPI.COMM_WORLD``."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size

    def average(self, values: NDArray[Any]) -> None:
        # Each worker sums one part for all, as in a ring Allreduce. MPI's own Allreduce does not
        # define the order of its sums, which differs by size, machine and version.
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
    """Return the group of workers that this process belongs to, as started by mpirun.

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

        mpi4py.rc.finalize = False  # else it would wait for the others at exit, even after an error
        from mpi4py import MPI
    except ImportError as error:
        raise TrainingError(
            f"mpirun started {started} processes, but mpi4py is not installed. Run pip install "
            "'onnxqat[mpi]'."
        ) from error
    if MPI.COMM_WORLD.size != started:
        raise TrainingError(
            f"mpirun started {started} processes, but mpi4py finds {MPI.COMM_WORLD.size}. Use "
            "the mpirun of the MPI that mpi4py was installed for."
        )
    return _MpiWorkers(MPI)
