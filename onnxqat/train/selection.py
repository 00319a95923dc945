"""Choose the figure that selects the best state, and compare states by it."""

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
INTEGER = "integer:"  # prefix of a figure measured in the chip's integer arithmetic
FALLING = ("max_abs_diff", LOSS)  # figures for which smaller is better
WITHOUT_METRIC = ("top1", "top5", "agreement", *FALLING)  # figures of every evaluation
# A share p of n samples has the standard error sqrt(p (1 - p) / n), at most 1 / (2 sqrt(n)). Epochs
# differ by a few points. With fewer than 625 samples the error exceeds two points: too much.
ERROR = 0.02
ENOUGH = 625


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The figure that chooses the best state.

    Attributes
    ----------
    figure : str
        ``top1``, ``agreement``, ``loss`` ...
    reason : str
        Why this figure was chosen.
    """

    figure: str
    reason: str


def selection_of(
    outputs: Sequence[Output], *, labelled: bool, own_loss: bool, held_out: int
) -> Selection:
    """Return the figure that chooses the best state if the user names none.

    Parameters
    ----------
    outputs : sequence of Output
        Outputs of the model.
    labelled : bool
        Whether the held-out data have class labels.
    own_loss : bool
        Whether the loss is computed by an ONNX file of the user.
    held_out : int
        The number of held-out samples.
    """
    if own_loss:
        return Selection(figure=LOSS, reason="the loss is computed by a file")
    if not labelled and len(outputs) > 1:
        return Selection(
            figure=LOSS, reason=f"agreement needs one output, but there are {len(outputs)}"
        )
    if not labelled and outputs[0].scores is None:
        reason = f"agreement needs class scores, but '{outputs[0].name}' has none"
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
    """Return the additional metrics that ``select`` needs.

    Raises
    ------
    DataError
        The user's function does not exist, or importing it raised an error.
    """
    select = None if select is None else select.removeprefix(INTEGER)
    if select is None or select in WITHOUT_METRIC:
        return ()
    if select in BUILT_IN or FUNCTION.fullmatch(select):
        return (read_metric(select),)
    return ()  # the first evaluation shows which figures exist


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Return all figures of an evaluation that can choose a state, by name."""
    others = {
        "agreement": evaluation.agreement,
        "max_abs_diff": evaluation.max_abs_diff,
        LOSS: evaluation.loss,
    }
    found = {name: value for name, value in others.items() if value is not None}
    # in this order; metrics override figures of the same name
    return evaluation.metrics | found | evaluation.metrics


def score(evaluation: Evaluation, select: str | None) -> tuple[float, ...]:
    """Return a sort key; the best state has the largest.

    Parameters
    ----------
    evaluation : Evaluation
        Figures of the state.
    select : str or None
        The name of a figure, or of a metric, whose first figure is used. With None, and for equal
        figures: accuracy (with labels), then agreement with the teacher.

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
            f"--select: these data give no figure '{select}'. Choose one of {', '.join(found)}."
        )
    falling = select.removeprefix(INTEGER) in FALLING
    return (-found[select] if falling else found[select], *default)


def with_integer(figures: Evaluation, integer: Evaluation) -> Evaluation:
    """Return the figures of a state together with those in integer arithmetic."""
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
