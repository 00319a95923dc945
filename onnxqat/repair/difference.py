"""Measure the difference between the outputs of two models with the same interface."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.ends import open_ends
from onnxqat.model import Model
from onnxqat.preparation.examples import run_example

__all__ = ["Difference", "differences", "is_rounding"]

# The largest difference that is taken for float32 rounding in a deep network: relative to the
# largest value of an output, and as an SQNR in decibels. Measured on six networks of 10 to 73
# layers: at most 3e-6, and at least 109 dB.
ROUNDING, ROUNDING_DB = 1e-4, 80.0

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of one output between an original and a changed model.

    Attributes
    ----------
    output : str
        The name of the output.
    largest : float
        Largest magnitude of the original model's values, in the output's units.
    max_abs_diff : float
        Largest difference, in the same units; NaN if a value is NaN in only one of the models.
    sqnr_db : float
        ``10 log10(sum(a^2) / sum((a - b)^2))`` in decibels; infinite if nothing differs.
    """

    output: str
    largest: float
    max_abs_diff: float
    sqnr_db: float

    def __str__(self) -> str:
        """Return one line of text."""
        ratio = "equal" if math.isinf(self.sqnr_db) else f"SQNR {self.sqnr_db:.1f} dB"
        return (
            f"'{self.output}': largest difference {self.max_abs_diff:.3g}, largest value "
            f"{self.largest:.3g}, {ratio}"
        )


def is_rounding(one: Difference) -> bool:
    """Return whether a difference is small enough to be float32 rounding."""
    small = one.max_abs_diff <= ROUNDING * one.largest and one.sqnr_db >= ROUNDING_DB
    return small or one.max_abs_diff == 0


class _Sums:
    """The running sums for one output over the batches."""

    def __init__(self) -> None:
        self.largest = self.max_abs_diff = self.signal = self.noise = 0.0

    def add(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        old, new = before.astype(np.float64), after.astype(np.float64)
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        finite = np.isfinite(old)
        apart = np.where(same, 0.0, np.abs(np.where(same, 0, new) - np.where(same, 0, old)))
        self.largest = max(self.largest, float(np.abs(old[finite]).max(initial=0.0)))
        self.max_abs_diff = float(np.max([self.max_abs_diff, apart.max(initial=0.0)]))
        self.signal += float(np.square(old[finite]).sum())
        self.noise += float(np.square(apart).sum())

    def result(self, output: str) -> Difference:
        ratio = math.inf if self.noise == 0 else -math.inf
        if self.noise > 0 and self.signal > 0:
            ratio = 10 * math.log10(self.signal / self.noise)
        return Difference(
            output=output,
            largest=self.largest,
            max_abs_diff=self.max_abs_diff,
            sqnr_db=math.nan if math.isnan(self.noise) else ratio,
        )


def differences(
    before: Model, after: Model, batches: Iterable[Feeds] | None = None, *, threads: int = 0
) -> tuple[Difference, ...]:
    """Return the differences between the floating-point outputs of two models.

    Parameters
    ----------
    before, after : Model
        Two models with the same inputs and outputs.
    batches : iterable of mapping of str to array, optional
        Model inputs by name (default: one batch of seeded random values).

    Raises
    ------
    ModelError
        A model does not run on the batches, or on random values.
    """
    sessions = [
        open_ends(model.to_proto, optimization="basic", threads=threads, name=model.name)
        for model in (before, after)
    ]
    names = sessions[0].names
    if batches is None:
        why = f"{before.name}: the outputs before and after are compared, but the model"
        advice = "Give data to compare them on."
        proto = before.to_proto()
        batches = [run_example(sessions[0].session, proto.graph, why, advice)[0]]
    sums = {name: _Sums() for name in names}
    for feeds in batches:
        old, new = (ends.session.run(list(names), feeds) for ends in sessions)
        for name, a, b in zip(names, old, new, strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.shape == b.shape:
                sums[name].add(a, b)
    return tuple(one.result(name) for name, one in sums.items())
