"""Format figures for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from onnxqat.evaluation.metrics import figure_text
from onnxqat.evaluation.metrics.figures import FRACTIONS, RATIOS

__all__ = ["decibels_of", "finite", "in_order", "is_share", "named", "primary", "value_text"]

LARGEST = 1e30  # larger numbers are treated as infinite: a picture cannot show them
NONE = "–"  # noqa: RUF001 (an en dash)
# The displayed names of figures, in the order of the tables.
NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "mean_iou": "mean IoU",
    "agreement": "agreement",
    "loss": "loss",
    "max_abs_diff": "largest difference",
}


def finite(value: float | None) -> float | None:
    """Return a number that can be drawn; None for infinity, NaN and None."""
    return value if value is not None and abs(value) <= LARGEST else None


def is_share(figure: str) -> bool:
    """Return whether a figure is a fraction; its name may end with ``:OUTPUT``."""
    return figure.partition(":")[0] in FRACTIONS


def named(figure: str) -> str:
    """Return the displayed name of a figure."""
    return NAMES.get(figure, figure)


def in_order(figures: Iterable[str]) -> list[str]:
    """Return the unique names of figures: known ones first, in the order of the tables."""
    found = dict.fromkeys(figures)
    return [n for n in NAMES if n in found] + [n for n in found if n not in NAMES]


def value_text(figure: str, value: float | None) -> str:
    """Return a figure with its unit, or a dash for None.

    Examples
    --------
    >>> value_text("top1", 0.4612), value_text("loss", 0.25), value_text("loss", None)
    ('46.12 %', '0.25', '–')
    """
    if value is None or math.isnan(value):
        return NONE
    kind = figure.partition(":")[0]
    return figure_text(figure, value) if kind in FRACTIONS | RATIOS else f"{value:.4g}"


def decibels_of(value: float | None, cosine: float | None) -> str:
    """Return an SQNR as text; None is infinity ("exact") if the cosine is 1, and otherwise NaN.

    Examples
    --------
    >>> decibels_of(12.84, 0.97), decibels_of(None, 1.0), decibels_of(None, None)
    ('12.8 dB', 'exact', '–')
    """
    if value is None:
        return "exact" if cosine == 1 else NONE
    return f"{value:.1f} dB"


def primary(figures: Iterable[Mapping[str, float | None]]) -> str | None:
    """Return the most important figure that all models have: accuracies before losses."""
    found = list(figures)
    names = in_order(name for one in found for name in one)
    return next((n for n in names if all(one.get(n) is not None for one in found)), None)
