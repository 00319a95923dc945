"""Which state is the best, and when to stop looking for a better one."""

from __future__ import annotations

from onnxqat.errors import TrainingError
from onnxqat.evaluate import Evaluation

__all__ = ["figures_of", "score"]

LOSS = "loss"
FALLING = ("max_abs_diff", LOSS)  # the smaller the better


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Return every figure that a state may be chosen by, by its name."""
    others = {
        "agreement": evaluation.agreement,
        "max_abs_diff": evaluation.max_abs_diff,
        LOSS: evaluation.loss,
    }
    return evaluation.metrics | {name: v for name, v in others.items() if v is not None}


def score(evaluation: Evaluation, select: str | None) -> tuple[float, ...]:
    """Return what the best state has most of.

    Parameters
    ----------
    evaluation : Evaluation
        Of the state.
    select : str or None
        A figure's name. None, and where it is equal: accuracy where there are labels, then
        agreement with the teacher.

    Raises
    ------
    TrainingError
        The evaluation has no such figure.
    """
    default = evaluation.metrics.get("top1", 0.0), evaluation.agreement or 0.0
    if select is None:
        return default
    found = figures_of(evaluation)
    if select not in found:
        raise TrainingError(
            f"--select: no figure '{select}' comes of these data. One of {', '.join(found)}."
        )
    return (-found[select] if select in FALLING else found[select], *default)
