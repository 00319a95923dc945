"""Evaluate a state on the held-out data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnxruntime as ort

from onnxqat.computable import computable
from onnxqat.data import DataSet
from onnxqat.device import CPU, Device
from onnxqat.errors import TrainingError
from onnxqat.evaluation import Evaluation, evaluate
from onnxqat.evaluation.labels import CAUSES
from onnxqat.evaluation.metrics import Metric
from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel
from onnxqat.runtime import open_session
from onnxqat.train.batches import feeds_of
from onnxqat.train.config import Config
from onnxqat.train.engine import fix_batch
from onnxqat.train.losses import Loss, add_loss
from onnxqat.train.selection import with_integer

__all__ = ["Validation", "check_labels"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Evaluates a state on the held-out data.

    Attributes
    ----------
    data : DataSet
        The held-out samples, with the arrays that the loss reads.
    reference : Model
        The float model.
    config : Config
        Batch size and threads.
    loss : Loss
        The training loss.
    teacher : InferenceSession or None
        Computes the float model's tensors that the loss reads.
    with_loss : bool
        Whether the loss is measured; the data then have the labels and arrays that it reads.
    metrics : tuple of Metric
        Further metrics.
    integer : bool
        Whether to evaluate in the chip's integer arithmetic, too.
    whole : bool
        Whether onnxruntime can run all of the model; the reference is the part that it can run.
    device : Device
        Where the models run.
    """

    data: DataSet
    reference: Model
    config: Config
    loss: Loss
    teacher: ort.InferenceSession | None
    with_loss: bool = True
    metrics: tuple[Metric, ...] = ()
    integer: bool = False
    whole: bool = True
    device: Device = CPU

    @property
    def batches(self) -> int:
        """The number of calls of ``progress``."""
        size, count = self.config.samples, len(self.data)
        runs = 2 if self.integer else 1
        return runs * -(-count // size) + (max(count // size, 1) if self.with_loss else 0)

    def __call__(self, model: QuantizedModel, progress: Callable[[], None]) -> Evaluation:
        """Return the figures of a Q/DQ model; ``progress`` is called after each batch."""
        threads = self.config.threads
        if not self.whole:
            model = computable(model).model
        run = partial(
            evaluate,
            model,
            against=self.reference,
            metrics=self.metrics,
            threads=threads,
            device=self.device,
            progress=progress,
        )
        figures = run(self.data.batches(self.config.samples))
        if self.integer:
            found = run(self.data.batches(self.config.samples), mode="integer")
            figures = with_integer(figures, found)
        if not self.with_loss:
            return figures
        return replace(figures, loss=self._mean_loss(model, progress))

    def _mean_loss(self, model: QuantizedModel, progress: Callable[[], None]) -> float:
        """Return the mean loss over the full batches, because a loss can depend on their size.

        If a model's fixed batch is larger than the data, repeated samples fill it.
        """
        size = self.data.fixed_batch or min(self.config.samples, len(self.data))
        proto = add_loss(fix_batch(model.to_proto(), set(), size), self.loss, self.data)
        session = open_session(
            proto,
            optimization="none",
            threads=self.config.threads,
            name=model.name,
            device=self.device,
        )
        wanted = {value.name for value in session.get_inputs()}
        losses: list[float] = []
        for batch in self.data.batches(size, drop_last=len(self.data) >= size, full=True):
            feeds = feeds_of(batch, batch.inputs, self.teacher)
            losses.append(float(session.run(None, {n: feeds[n] for n in wanted})[0]))
            progress()
        return float(np.mean(losses))


def check_labels(start: Evaluation, name: str, *, force: bool) -> None:
    """Log how often the float model is right on the held-out labels, if there are any.

    Parameters
    ----------
    start : Evaluation
        Figures of the start, with the float model as the reference.
    name : str
        The name of the model.
    force : bool
        Whether to use the labels even if the float model almost never predicts them.

    Raises
    ------
    TrainingError
        The labels cannot be those that the model was trained with.
    """
    if "top1" not in start.reference:
        return
    accuracy, sure = start.reference["top1"], start.reference_confidence
    logger.info(
        "The float model is right on %.2f %% of %d held-out labels%s.",
        100 * accuracy,
        start.samples,
        "" if sure is None else f"; its mean confidence is {100 * sure:.2f} %",
    )
    if start.doubt is not None and not force:
        raise TrainingError(
            f"{name}: the float model {start.doubt}. {CAUSES} To train without labels, pass "
            "--label none; to train with these, --force-labels."
        )
