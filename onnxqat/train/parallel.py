"""Several processes that train one model, each on its share of every step's samples.

``mpirun -n N`` starts them; they meet through mpi4py, the optional extra ``mpi``. All hold the
same parameters, since all apply the same averaged gradient: the MPI standard requires that every
process receives the identical result of an Allreduce.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from numpy.typing import NDArray

from onnxqat.errors import TrainingError

__all__ = ["Workers", "join_workers"]

T = TypeVar("T")
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by the mpirun of MPICH, Intel MPI; of Open MPI


class Workers:
    """The processes that train together; here, this one alone.

    Attributes
    ----------
    rank, size : int
        Which of them this is, from 0, and how many there are. Worker 0 evaluates, writes, speaks.
    """

    rank: int = 0
    size: int = 1

    def average(self, values: NDArray[Any]) -> None:
        """Replace an array by its mean over the workers."""

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

    def leave(self) -> None:
        """End in order. Who ends without it takes the others along, which would wait for ever."""


class _MpiWorkers(Workers):
    """The processes of ``MPI.COMM_WORLD``."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size

    def average(self, values: NDArray[Any]) -> None:
        self.world.Allreduce(self.mpi.IN_PLACE, values, op=self.mpi.SUM)
        values /= self.size

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
