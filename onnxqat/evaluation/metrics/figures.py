"""Format figures: fractions as percentages, ratios in dB, figures of user functions unchanged."""

from __future__ import annotations

import math

__all__ = ["FRACTIONS", "OURS", "RATIOS", "figure_text"]

FRACTIONS = {"top1", "top5", "agreement", "mean_iou", "exact_match", "f1", "map", "map50", "map75"}
RATIOS = {"psnr", "sqnr"}
# Reserved names, which a user's function cannot return.
OURS = FRACTIONS | RATIOS | {"cosine", "loss", "max_abs_diff"}


def figure_text(name: str, value: float) -> str:
    """Return a figure as text for people.

    Parameters
    ----------
    name : str
        Name of the figure; may end in ``:`` and the name of an output.

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
