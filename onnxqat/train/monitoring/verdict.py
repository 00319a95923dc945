"""Explain the choice of the kept state: which one it is, why, and what contradicts it."""

from __future__ import annotations

from collections.abc import Sequence

from onnxqat.evaluation import Evaluation
from onnxqat.evaluation.metrics import figure_text
from onnxqat.train.selection import FALLING, LOSS, Selection, figures_of, score

__all__ = ["verdict"]

SHARES = ("top1", "top5", "agreement")
Tried = Sequence[tuple[int, Evaluation]]


def verdict(
    before: Evaluation, tried: Tried, best_epoch: int, selection: Selection
) -> tuple[str, ...]:
    """Return sentences for the user about the choice of the state.

    Parameters
    ----------
    before : Evaluation
        Figures of the start.
    tried : sequence of (int, Evaluation)
        The epochs and their figures.
    best_epoch : int
        The epoch that was kept; 0 is the start.
    selection : Selection
        The figure that chose it.
    """
    notes = [] if best_epoch else [_start_kept(before, tried, selection)]
    other = _other_choice(before, tried, selection)
    return (*notes, *other)


def _start_kept(before: Evaluation, tried: Tried, selection: Selection) -> str:
    kept = "the start was kept, and OUT contains its parameters: "
    if not tried:
        return f"{kept}no epoch was completed"
    figure = before.first.get(selection.figure, selection.figure)
    epoch, best = max(tried, key=lambda one: score(one[1], figure))
    numbers = "; ".join(
        f"{name} {_written(name, value)} at the start, {_written(name, now[name])} after epoch "
        f"{epoch}"
        for now in [figures_of(best)]
        for name, value in figures_of(before).items()
        if name in (figure, LOSS, *SHARES) and name in now
    )
    return f"{kept}no epoch had a better {figure}; the best epoch was {epoch} ({numbers})"


def _other_choice(before: Evaluation, tried: Tried, selection: Selection) -> list[str]:
    """Return a note if loss and accuracy would choose different states."""
    states = [(0, before), *tried]
    share = next((name for name in SHARES if name in figures_of(before)), None)
    if share is None or before.loss is None or selection.figure not in (share, LOSS):
        return []
    by_loss, by_share = (_choice(states, figure) for figure in (LOSS, share))
    found = dict(states)
    if figures_of(found[by_loss])[share] == figures_of(found[by_share])[share]:
        return []
    note = (
        f"loss and {share} disagree: the loss is lowest at {_place(by_loss)} "
        f"({_both(found[by_loss], share)}), {share} highest at {_place(by_share)} "
        f"({_both(found[by_share], share)}); the state is chosen by {selection.figure}: "
        f"{selection.reason}"
    )
    return [note]


def _choice(states: Tried, figure: str) -> int:
    """Return the first epoch with the best value of a figure."""
    return max(states, key=lambda one: score(one[1], figure)[0])[0]


def _place(epoch: int) -> str:
    return f"epoch {epoch}" if epoch else "the start"


def _both(evaluation: Evaluation, share: str) -> str:
    found = figures_of(evaluation)
    return f"loss {_written(LOSS, found[LOSS])}, {share} {_written(share, found[share])}"


def _written(name: str, value: float) -> str:
    return f"{value:.4g}" if name in FALLING else figure_text(name, value)
