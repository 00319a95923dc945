"""Choose a default loss: for each output, by the meaning of its values.

- The first output uses cross-entropy, if the data have labels of most of its classes. Training on
  labels of few classes would make the network forget the others.
- Class scores use ``kl``.
- All other outputs use ``mse``, divided by twice the variance of the teacher's output. This is the
  KL divergence of two normal distributions of that variance, so that boxes in pixels, offsets below
  one and class scores have similar weights. If a Concat joins parts of very different variance,
  such as boxes and scores, each part is divided by its own variance, and the parts are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import TrainingError
from onnxqat.outputs import Joined, Output, Scores
from onnxqat.train.losses.terms import Balance, Loss, Term, check_options

__all__ = ["Key", "Part", "default_loss", "pieces", "variances"]

Array = NDArray[Any]
Key = tuple[str, Joined | None, int]  # an output, its parts, and the index of one part

# The share of the classes that the labels must cover. MobileNetV1, trained on images of 150 of its
# 1,000 classes, reaches 35.1 % with their labels and 41.4 % without.
COVERED = 0.5
UNLIKE = 100.0  # parts whose variances differ by a larger factor have different units


@dataclass(frozen=True, kw_only=True)
class Part:
    """The term of one output in the loss.

    Attributes
    ----------
    output : str
        The name of the output.
    kind : str or None
        The kind of loss, see `KINDS`; None: the output is left out.
    weight : float
        The factor of the term.
    reason : str
        Why the kind was chosen.
    balance : Balance or None
        Weights of the parts of the output.
    """

    output: str
    kind: str | None
    weight: float = 1.0
    reason: str
    balance: Balance | None = None

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
    measured: Callable[[list[Output]], Mapping[Key, float]],
    labels: int | None = None,
    label_smoothing: float | None = None,
    ignore_index: int | None = None,
) -> tuple[Loss, tuple[Part, ...]]:
    """Choose the term of each output.

    Parameters
    ----------
    outputs : sequence of Output
        The outputs of the model.
    labelled : bool
        Whether the data have class labels, which belong to the first output.
    measured : callable
        Returns the variances of some of the teacher's outputs, and of their parts, see `pieces`.
    labels : int, optional
        The number of different labels in the data, if known.
    label_smoothing, ignore_index
        See `Loss`.

    Raises
    ------
    TrainingError
        No output can be learned from.
    """
    parts = [_part(output) for output in outputs]
    if labelled:
        parts.insert(0, _by_labels(outputs[0], labels))
    by_name = {output.name: output for output in outputs}
    spreads = measured([by_name[p.output] for p in parts if p.kind == "mse"])
    parts = [_balanced(p, by_name[p.output], spreads) if p.kind == "mse" else p for p in parts]
    terms = tuple(
        Term(kind=p.kind, weight=p.weight, output=p.output, balance=p.balance)
        for p in parts
        if p.kind is not None
    )
    if not terms:
        raise TrainingError(
            f"Nothing to learn from: {'; '.join(map(str, parts))}. Name a float tensor before the "
            f"outputs, as in --loss {_before(outputs)}."
        )
    loss = Loss(terms=terms, graphs={}, label_smoothing=label_smoothing, ignore_index=ignore_index)
    check_options(loss)
    return loss, tuple(parts)


def _before(outputs: Sequence[Output]) -> str:
    """Return the text of a loss on the float tensor before the first output."""
    output = next((o for o in outputs if o.source), None)
    if output is None:
        return "mse:tensor/NAME"
    name = f"tensor/{output.source}"
    name = f'"{name}"' if set(name) & set('+="') or name != name.strip() else name
    return f"{'kl' if output.source_scores else 'mse'}:{name}"


def _by_labels(output: Output, labels: int | None) -> Part:
    """Return the term of the first output, with labels if they cover most classes."""
    axis = None if output.scores is None else output.scores.axis
    classes = None if axis is None or output.shape is None else output.shape[axis]
    if labels is None or not isinstance(classes, int) or labels >= COVERED * classes:
        return Part(output=output.name, kind="cross-entropy", reason="the labels of the data")
    reason = (
        f"the labels cover only {labels} of its {classes} classes, and training on them would make "
        "the model forget the others (to use them, pass --loss cross-entropy+kl)"
    )
    return Part(output=output.name, kind=None, reason=reason)


def _part(output: Output) -> Part:
    if not output.learned:
        return Part(
            output=output.name, kind=None, reason="it is not float32, so it has no gradient"
        )
    if output.scores is None:
        return Part(output=output.name, kind="mse", reason="values, not class scores")
    return Part(output=output.name, kind="kl", reason=_described(output.scores, output))


def _described(scores: Scores, output: Output) -> str:
    count = None if output.shape is None else output.shape[scores.axis]
    classes = f"{count} class scores" if isinstance(count, int) and count > 1 else "class scores"
    ends = {
        "probabilities": " behind a Softmax",
        "log-probabilities": " behind a LogSoftmax",
        "independent": " behind a Sigmoid, independent of each other",
        "logits": "",
    }
    axis = "" if scores.kind == "independent" else f" along axis {scores.axis} of its shape"
    doubt = f" (if not, pass --loss mse:{output.name})" if scores.kind == "logits" else ""
    return f"{classes}{ends[scores.kind]}{axis}{doubt}"


def _balanced(part: Part, output: Output, spreads: Mapping[Key, float]) -> Part:
    """Divide a term by the variance of its output, or by those of the output's parts."""
    variance = spreads[output.name, None, 0]
    if not variance > 0 or not np.isfinite(variance):
        reason = f"the float model's variance there is {variance:g}, so nothing can be learned"
        return replace(part, kind=None, reason=reason)
    apart = max(
        output.joined, key=lambda one: _ratio(_of_parts(output, one, spreads)), default=None
    )
    if apart is None or _ratio(_of_parts(output, apart, spreads)) <= UNLIKE:
        reason = f"{part.reason}; divided by twice the float model's variance"
        return replace(part, weight=_rounded(0.5 / variance), reason=reason)
    length, sizes = sum(apart.sizes), apart.sizes
    found = zip(sizes, _of_parts(output, apart, spreads), strict=True)
    # the mean is over the part instead of the whole output
    weights = tuple(_rounded(0.5 * length / size / one) if one > 0 else 0.0 for size, one in found)
    reason = (
        f"{part.reason}; its parts of {', '.join(map(str, sizes))} along axis {apart.axis} each "
        "divided by twice the float model's variance"
    )
    balance = Balance(axis=apart.axis, sizes=sizes, weights=weights)
    return replace(part, reason=reason, balance=balance)


def _of_parts(output: Output, joined: Joined, spreads: Mapping[Key, float]) -> list[float]:
    return [spreads[output.name, joined, i] for i in range(len(joined.sizes))]


def _ratio(found: Sequence[float]) -> float:
    """Return the ratio of the largest to the smallest positive variance."""
    some = [one for one in found if one > 0]
    return max(some) / min(some) if some else 0.0


def _rounded(weight: float) -> float:
    return float(f"{weight:.3g}")


def pieces(output: Output, values: Array) -> dict[Key, Array]:
    """Return the values of an output and of each of its parts."""
    found: dict[Key, Array] = {(output.name, None, 0): values}
    fitting = (one for one in output.joined if values.shape[one.axis] == sum(one.sizes))
    for joined in fitting:
        ends = np.cumsum(joined.sizes)[:-1]
        for i, part in enumerate(np.split(values, ends, axis=joined.axis)):
            found[output.name, joined, i] = part
    return found


def variances(batches: Iterable[Mapping[Key, Array]]) -> dict[Key, float]:
    """Return the variance of each array over all values of all batches."""
    counts: dict[Key, int] = {}
    means: dict[Key, float] = {}
    squares: dict[Key, float] = {}  # sums of squared distances from the mean
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
