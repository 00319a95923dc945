"""Compare the tensors of two dumps."""

from __future__ import annotations

from pathlib import Path

from onnxqat.analysis import Comparison
from onnxqat.analysis import compare_dumps as run

__all__ = ["compare_dumps"]


def compare_dumps(
    dump: str | Path,
    reference: str | Path,
    *,
    min_cosine: float | None = 0.99,
    min_sqnr: float | None = None,
    max_diff: float | None = None,
) -> Comparison:
    """Return the differences between two dumps, like ``onnxqat compare-dumps``.

    Parameters
    ----------
    dump, reference : str or Path
        The folder of a dump, or a ``.npz`` file of another tool.
    min_cosine, min_sqnr, max_diff : float, optional
        Limits that each tensor must keep: the smallest cosine, the smallest SQNR in dB, and the
        largest difference in the tensor's units. None: no limit.

    Raises
    ------
    OnnxQatError
        A dump cannot be read, or the dumps have different levels or samples, or no common tensor.
    """
    return run(dump, reference, min_cosine=min_cosine, min_sqnr=min_sqnr, max_diff=max_diff)
