"""The loss of a run that names none: chosen per output, from what its values mean.

Class scores learn by ``kl``. Everything else learns by ``mse``, divided by the variance of the
teacher's output, so that boxes in pixels and offsets below one weigh alike: the term is the share
of the output's variance that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import TrainingError
from onnxqat.outputs import Output, Scores
from onnxqat.train.losses.terms import Loss, Term, check_options

__all__ = ["Part", "default_loss", "variances"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one output adds to the loss.

    Attributes
    ----------
    output : str
        Its name.
    kind : str or None
        See `KINDS`; None: it is left out.
    weight : float
        What the term is multiplied by.
    reason : str
        Why.
    """

    output: str
    kind: str | None
    weight: float = 1.0
    reason: str

    def __str__(self) -> str:
        """In words."""
        if self.kind is None:
            return f"'{self.output}' left out: {self.reason}"
        weight = "" if self.weight == 1 else f"{self.weight:g}*"
        return f"{weight}{self.kind} of '{self.output}': {self.reason}"


def default_loss(
    outputs: Sequence[Output],
    *,
    labelled: bool,
    measured: Callable[[list[str]], Mapping[str, float]],
    label_smoothing: float | None = None,
    ignore_index: int | None = None,
) -> tuple[Loss, tuple[Part, ...]]:
    """Choose what each output is learned by.

    Parameters
    ----------
    outputs : sequence of Output
        Those of the model.
    labelled : bool
        Whether the data have class labels, which are of the first output.
    measured : callable
        Returns the variance of the teacher's outputs of some names.
    label_smoothing, ignore_index
        See `Loss`.

    Raises
    ------
    TrainingError
        Nothing can be learned from any output.
    """
    parts = [_part(output) for output in outputs]
    if labelled:
        first = Part(output=outputs[0].name, kind="cross-entropy", reason="the labels of the data")
        parts.insert(0, first)
    spreads = measured([p.output for p in parts if p.kind == "mse"])
    parts = [_balanced(p, spreads[p.output]) if p.kind == "mse" else p for p in parts]
    terms = tuple(
        Term(kind=p.kind, weight=p.weight, output=p.output) for p in parts if p.kind is not None
    )
    if not terms:
        raise TrainingError(
            f"Nothing to learn from: {'; '.join(map(str, parts))}. Name a float tensor on the way "
            f"there, as in --loss {_before(outputs)}."
        )
    loss = Loss(terms=terms, graphs={}, label_smoothing=label_smoothing, ignore_index=ignore_index)
    check_options(loss)
    return loss, tuple(parts)


def _before(outputs: Sequence[Output]) -> str:
    """Return a loss of the tensor before the first output that is not float."""
    output = next((o for o in outputs if o.source), None)
    if output is None:
        return "mse:tensor/NAME"
    name = f"tensor/{output.source}"
    name = f'"{name}"' if set(name) & set('+="') or name != name.strip() else name
    return f"{'kl' if output.source_scores else 'mse'}:{name}"


def _part(output: Output) -> Part:
    if not output.learned:
        return Part(output=output.name, kind=None, reason="it holds no float32, so no gradient")
    if output.scores is None:
        return Part(output=output.name, kind="mse", reason="values, not class scores")
    return Part(output=output.name, kind="kl", reason=_described(output.scores, output))


def _described(scores: Scores, output: Output) -> str:
    count = None if output.shape is None else output.shape[scores.axis]
    classes = f"{count} class scores" if isinstance(count, int) else "class scores"
    ends = {"probabilities": "a Softmax", "log-probabilities": "a LogSoftmax"}
    ends |= {"independent": "a Sigmoid", "logits": ""}
    end = ends[scores.kind]
    behind = f" behind {end}" if end else ""
    return f"{classes}{behind} along axis {scores.axis} of its shape"


def _balanced(part: Part, variance: float) -> Part:
    if not variance > 0 or not np.isfinite(variance):
        return Part(
            output=part.output,
            kind=None,
            reason=f"the float model's variance there is {variance:g}, so that it says nothing",
        )
    weight = float(f"{1 / variance:.3g}")
    reason = f"{part.reason}; divided by the float model's variance"
    return Part(output=part.output, kind="mse", weight=weight, reason=reason)


def variances(batches: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Return the variance over all values of each array, over batches of them."""
    counts: dict[str, int] = {}
    means: dict[str, float] = {}
    squares: dict[str, float] = {}  # sums of squared distances from the mean
    for batch in batches:
        for name, array in batch.items():
            values = array.astype(np.float64)
            count, before = values.size, counts.get(name, 0)
            if not count:
                continue
            mean = float(values.mean())
            distance = mean - means.get(name, 0.0)
            total = before + count
            squares[name] = (
                squares.get(name, 0.0)
                + float(np.square(values - mean).sum())
                + distance**2 * before * count / total
            )
            means[name] = means.get(name, 0.0) + distance * count / total
            counts[name] = total
    return {name: squares[name] / counts[name] for name in counts}
