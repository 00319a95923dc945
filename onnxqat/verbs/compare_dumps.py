"""How much two dumps differ."""

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
    """Compare two dumps, as ``onnxqat compare-dumps`` does.

    Parameters
    ----------
    dump, reference : str or Path
        Each the folder of a dump, or a ``.npz`` file of another tool.
    min_cosine, min_sqnr, max_diff : float, optional
        What a tensor passes with: a cosine and an SQNR in dB of at least this, and a difference of
        at most this, in the tensor's units. None asks for nothing.

    Raises
    ------
    OnnxQatError
        One cannot be read, they have other levels or samples, or no tensor in common.
    """
    return run(dump, reference, min_cosine=min_cosine, min_sqnr=min_sqnr, max_diff=max_diff)
