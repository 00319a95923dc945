"""Choose the loss of a run and the figure that selects its best state, if the user does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from onnxqat.data import Batch, DataSet
from onnxqat.errors import TrainingError
from onnxqat.evaluation.run import model_session
from onnxqat.model import Model
from onnxqat.outputs import Output, Scores, outputs_of
from onnxqat.train.config import Config
from onnxqat.train.losses import Key, Loss, Part, default_loss, pieces, read_loss, variances
from onnxqat.train.selection import LOSS, Selection, selection_of

__all__ = [
    "announcement",
    "chosen_loss",
    "chosen_selection",
    "described_outputs",
    "readable",
]

MEASURED = 64  # samples on which the variance of the teacher's outputs is measured


def described_outputs(model: Model, data: DataSet) -> tuple[Output, ...]:
    """Return descriptions of the outputs; if there are labels, the first contains class scores."""
    first, *others = outputs_of(model.graph)
    if data.has_labels and first.scores is None and len(first.shape or ()) == 2:
        first = replace(first, scores=Scores(kind="logits", axis=1))
    return (first, *others)


def chosen_loss(
    outputs: Sequence[Output], data: DataSet, training: DataSet, reference: Model, config: Config
) -> tuple[Loss, tuple[Part, ...]]:
    """Return the loss and, if it was chosen by default, the part of each output."""
    cross_entropy: Any = {
        "label_smoothing": config.label_smoothing,
        "ignore_index": config.ignore_index,
    }
    if config.loss is None:
        return default_loss(
            outputs,
            labelled=data.has_labels,
            labels=training.label_count(),
            measured=partial(_variances, reference, outputs, training, config),
            **cross_entropy,
        )
    loss = read_loss(config.loss, **cross_entropy)
    if any(term.reads_labels for term in loss.terms) and not data.has_labels:
        raise TrainingError(
            "The loss 'cross-entropy' needs labels, but the data have none. "
            "Name them with --label, or leave --loss out to learn from the float model."
        )
    return loss, ()


def _variances(
    reference: Model,
    outputs: Sequence[Output],
    training: DataSet,
    config: Config,
    wanted: list[Output],
) -> dict[Key, float]:
    """Return the variances of some of the teacher's outputs over `MEASURED` training samples."""
    if not wanted:
        return {}
    session = model_session(reference, "float", threads=config.threads)
    own = [tensor.name for tensor in reference.graph.outputs]
    names = {ours.name: theirs for ours, theirs in zip(outputs, own, strict=True)}
    count = max(min(len(training), MEASURED), config.samples)
    chosen = np.unique(np.linspace(0, len(training) - 1, count).astype(np.int64))

    def measured(batch: Batch) -> dict[Key, Any]:
        values = session.run([names[output.name] for output in wanted], batch.inputs)
        found = zip(wanted, values, strict=True)
        return {k: v for output, array in found for k, v in pieces(output, array).items()}

    return variances(
        measured(batch)
        for batch in training.batches(config.samples, indices=chosen, drop_last=True, full=True)
    )


def readable(loss: Loss, data: DataSet, held_out: DataSet) -> bool:
    """Whether the held-out data have the labels and arrays that a loss reads."""
    read = {term.array for term in loss.terms if term.array}
    read |= {tensor.name for file in loss.graphs.values() for tensor in file.graph.inputs}
    arrays = read & set(data.array_names)
    labels = any(term.reads_labels for term in loss.terms)
    return arrays <= set(held_out.array_names) and (held_out.has_labels or not labels)


def chosen_selection(
    outputs: Sequence[Output], held_out: DataSet, config: Config, loss: Loss, with_loss: bool
) -> Selection:
    """Return the figure that chooses the best state.

    Raises
    ------
    TrainingError
        It is the loss, but the held-out data lack labels or arrays that the loss reads.
    """
    if config.select is not None:
        return Selection(figure=config.select, reason="--select names it")
    chosen = selection_of(
        outputs,
        labelled=held_out.has_labels,
        own_loss=bool(loss.graphs),
        held_out=len(held_out),
    )
    if chosen.figure == LOSS and not with_loss:
        raise TrainingError(
            f"The best state would be chosen by the loss ({chosen.reason}), but the held-out data "
            "lack labels or arrays that it reads. Add them, or choose another figure, such as "
            "--select max_abs_diff."
        )
    return chosen


def announcement(config: Config, parts: Sequence[Part], selection: Selection) -> list[str]:
    """Return lines that name the parts of the loss and the figure that chooses the state."""
    lines = [f"learns from: {part}" for part in parts] or [f"learns from: --loss {config.loss}"]
    return [*lines, f"chooses the best state by {selection.figure}: {selection.reason}"]
