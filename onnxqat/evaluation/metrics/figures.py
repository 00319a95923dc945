"""How figures are written: fractions as percentages, ratios in dB, the user's as they are."""

from __future__ import annotations

import math

__all__ = ["FRACTIONS", "OURS", "RATIOS", "figure_text"]

FRACTIONS = {"top1", "top5", "agreement", "mean_iou", "exact_match", "f1", "map", "map50", "map75"}
RATIOS = {"psnr", "sqnr"}
# Names of figures that a user's function cannot have: others are called so.
OURS = FRACTIONS | RATIOS | {"cosine", "loss", "max_abs_diff"}


def figure_text(name: str, value: float) -> str:
    """Return a figure for people.

    Parameters
    ----------
    name : str
        Its name; behind a ``:`` stands the output that it is of.

    Examples
    --------
    >>> figure_text("top1", 0.5), figure_text("sqnr:boxes", 31.25), figure_text("cosine", 0.9999)
    ('50.00 %', '31.25 dB', '0.9999')
    """
    kind = name.removeprefix("integer:").partition(":")[0]
    if kind in FRACTIONS:
        return f"{100 * value:.2f} %"
    if kind in RATIOS:
        return "exact" if value == math.inf else f"{value:.2f} dB"
    return f"{value:.6g}"
