"""Which state is the best, and when to stop looking for a better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxqat.data.function import FUNCTION
from onnxqat.errors import TrainingError
from onnxqat.evaluation import Evaluation
from onnxqat.evaluation.metrics import BUILT_IN, Metric, read_metric
from onnxqat.outputs import Output

__all__ = [
    "FALLING",
    "INTEGER",
    "LOSS",
    "Selection",
    "figures_of",
    "metrics_of",
    "score",
    "selection_of",
    "with_integer",
]

LOSS = "loss"
INTEGER = "integer:"  # before a figure of the network in the integers of its chip
FALLING = ("max_abs_diff", LOSS)  # the smaller the better
WITHOUT_METRIC = ("top1", "top5", "agreement", *FALLING)  # every evaluation has them
# A share p of n samples has the standard error sqrt(p (1 - p) / n), at most 1 / (2 sqrt(n)). Epochs
# differ by some points, and two points are the standard error of 625 samples: fewer cannot tell.
ERROR = 0.02
ENOUGH = 625


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the best state is chosen by.

    Attributes
    ----------
    figure : str
        ``top1``, ``agreement``, ``loss`` ...
    reason : str
        Why.
    """

    figure: str
    reason: str


def selection_of(
    outputs: Sequence[Output], *, labelled: bool, own_loss: bool, held_out: int
) -> Selection:
    """Return what states are told apart by, where the user does not say.

    Parameters
    ----------
    outputs : sequence of Output
        Outputs of the model.
    labelled : bool
        Whether the held-out data have class labels.
    own_loss : bool
        Whether the loss is computed by a file of the user's.
    held_out : int
        How many samples judge a state.
    """
    if own_loss:
        return Selection(figure=LOSS, reason="it is computed by a file")
    if not labelled and len(outputs) > 1:
        return Selection(
            figure=LOSS, reason=f"agreement is of one output, and there are {len(outputs)}"
        )
    if not labelled and outputs[0].scores is None:
        reason = f"agreement is of class scores, and '{outputs[0].name}' holds none"
        return Selection(figure=LOSS, reason=reason)
    figure = "top1" if labelled else "agreement"
    if held_out < ENOUGH:
        error = 50 / held_out**0.5
        return Selection(
            figure=LOSS,
            reason=f"{held_out} held-out samples are too few for {figure}, whose standard error is "
            f"up to {error:.1f} points; from {ENOUGH} samples on it is below {100 * ERROR:g}",
        )
    return Selection(figure=figure, reason=f"{held_out} held-out samples")


def metrics_of(select: str | None) -> tuple[Metric, ...]:
    """Return what has to be measured to choose by ``select``, besides what always is.

    Raises
    ------
    DataError
        There is no such function of the user's, or importing it raised.
    """
    select = None if select is None else select.removeprefix(INTEGER)
    if select is None or select in WITHOUT_METRIC:
        return ()
    if select in BUILT_IN or FUNCTION.fullmatch(select):
        return (read_metric(select),)
    return ()  # the first evaluation says which figures there are


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Return every figure that a state may be chosen by, by its name."""
    others = {
        "agreement": evaluation.agreement,
        "max_abs_diff": evaluation.max_abs_diff,
        LOSS: evaluation.loss,
    }
    found = {name: value for name, value in others.items() if value is not None}
    return evaluation.metrics | found | evaluation.metrics  # in this order; a metric wins


def score(evaluation: Evaluation, select: str | None) -> tuple[float, ...]:
    """Return what the best state has most of.

    Parameters
    ----------
    evaluation : Evaluation
        Figures of the state.
    select : str or None
        A figure's name, or that of a metric, whose first figure counts. None, and where it is
        equal: accuracy where there are labels, then agreement with the teacher.

    Raises
    ------
    TrainingError
        The evaluation has no such figure.
    """
    default = evaluation.metrics.get("top1", 0.0), evaluation.agreement or 0.0
    if select is None:
        return default
    found = figures_of(evaluation)
    select = evaluation.first.get(select, select)
    if select not in found:
        raise TrainingError(
            f"--select: no figure '{select}' comes of these data. One of {', '.join(found)}."
        )
    falling = select.removeprefix(INTEGER) in FALLING
    return (-found[select] if falling else found[select], *default)


def with_integer(figures: Evaluation, integer: Evaluation) -> Evaluation:
    """Return the figures of a state, with those of its network in integers beside them."""
    others = {
        "agreement": integer.agreement,
        "max_abs_diff": integer.max_abs_diff,
    }
    found = integer.metrics | {n: v for n, v in others.items() if v is not None} | integer.metrics
    return replace(
        figures,
        metrics=figures.metrics | {f"{INTEGER}{name}": value for name, value in found.items()},
        first=figures.first | {f"{INTEGER}{m}": f"{INTEGER}{f}" for m, f in integer.first.items()},
    )
