"""The fine-tuning loop: batches in, a Q/DQ model with tuned weights and scales out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.calibrate import fit_bias_range
from onnxqat.data import DataSet, augment, split
from onnxqat.errors import DataError, TrainingError
from onnxqat.evaluate import Evaluation, evaluate
from onnxqat.evaluate.run import model_session
from onnxqat.insert import (
    SOURCE_KEY,
    plan_of,
    read_params,
    state_of,
    strip,
    weights_hash,
    with_params,
)
from onnxqat.model import Model
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat, StepSession
from onnxqat.train.form import TrainingForm, training_form
from onnxqat.train.losses import LABELS, parse_loss, teacher_input
from onnxqat.train.optimizers import cosine_rate
from onnxqat.train.updater import Updater

__all__ = ["DivergedError", "Finetuned", "Progress", "finetune"]

logger = logging.getLogger(__name__)

# Fewer samples than this many steps' worth are shown again, up to MAX_EPOCHS times.
TARGET_STEPS = 2000
MAX_EPOCHS = 10
# The mean loss of the last steps is compared with that of as many at the start. Those change
# nothing: they measure the loss to compare with, and fill Adam's means.
GUARD_STEPS = 20
RISE, STANDARD_ERRORS = 1.5, 4.0  # a rise is one by this factor, and beyond the noise
MAX_BACKOFFS = 3


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running fine-tuning stands; passed to the caller after every step and epoch.

    Attributes
    ----------
    step, steps, epoch, epochs : int
        Done and in all; counted from 1.
    loss : float
        Mean over the last steps.
    validation : Evaluation or None
        After an epoch.
    note : str
        Something the user should read.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    validation: Evaluation | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """The outcome.

    Attributes
    ----------
    model : Model
        The best state by the validation metric; the start itself if nothing was better.
    before, after : Evaluation
        On the held-out data.
    epochs : int
        How many were run.
    best_epoch : int
        The one the model is of; 0 is the start.
    seconds : float
        Wall time of training, without loading.
    notes : tuple of str
        What was done about a rising loss.
    """

    model: Model
    before: Evaluation
    after: Evaluation
    epochs: int
    best_epoch: int
    seconds: float
    notes: tuple[str, ...] = ()


class DivergedError(TrainingError):
    """The loss became infinite or NaN; ``best`` is the last good state."""

    def __init__(self, message: str, best: Model) -> None:
        super().__init__(message)
        self.best = best


def finetune(
    model: Model,
    data: DataSet,
    *,
    validation: DataSet | None = None,
    teacher: Model | None = None,
    config: Config = Config(),  # noqa: B008 (frozen)
    report: Callable[[Progress], None] = lambda _: None,
) -> Finetuned:
    """Fine-tune weights and scales with the quantization in the loop.

    Parameters
    ----------
    model : Model
        Calibrated, or fine-tuned before. It is not changed.
    data : DataSet
        Training samples.
    validation : DataSet, optional
        Chooses the best state. A seeded slice of ``data`` is held out for it otherwise.
    teacher : Model, optional
        Float model to distil from; of a calibrated file it is the file itself.
    config : Config
        Hyper-parameters.
    report : callable
        Told about every step and epoch.

    Raises
    ------
    TrainingError
        Nothing to teach, too few samples, or a gradient that does not exist.
    DivergedError
        The loss left the finite numbers.
    """
    return _Run(model, data, validation, teacher, config, report).run()


def _teacher_of(model: Model, teacher: Model | None) -> Model:
    if teacher is not None:
        return teacher
    floats = strip(model)
    if weights_hash(floats.graph) != model.metadata.get(SOURCE_KEY):
        raise TrainingError(
            f"{model.name}: its weights are not those of the float model any more, so that it "
            "cannot teach itself. Pass the float model with --teacher."
        )
    return floats


@dataclass
class _Run:
    """One fine-tuning."""

    model: Model
    data: DataSet
    validation: DataSet | None
    teacher: Model | None
    config: Config
    report: Callable[[Progress], None]
    notes: list[str] = field(default_factory=list)

    def run(self) -> Finetuned:
        config = self.config
        if state_of(self.model) == "uncalibrated":
            raise TrainingError(f"{self.model.name}: is not calibrated. Calibrate it first.")
        self._check_batch()
        self._divide()
        terms = self._loss_terms()
        self.reference = _teacher_of(self.model, self.teacher)
        teaching = any(term != "cross-entropy" for term in terms)
        self.teaching = model_session(self.reference, "float") if teaching else None
        self.form = training_form(self.model, learn_scales=config.method == "lsq")
        self.session = StepSession(
            self.form, terms, batch_size=config.batch_size, threads=config.threads
        )
        started = time.monotonic()
        self.before = self._validate(self.model)
        self.best, self.best_epoch, self.best_figures = self.model, 0, self.before
        rate = 1.0
        while not self._train(rate):
            rate /= 4
        return Finetuned(
            model=self.best,
            before=self.before,
            after=self.best_figures,
            epochs=self.epochs,
            best_epoch=self.best_epoch,
            seconds=time.monotonic() - started,
            notes=tuple(self.notes),
        )

    def _check_batch(self) -> None:
        for tensor in self.model.graph.inputs:
            length = tensor.shape[0] if tensor.shape else None
            if isinstance(length, int) and length != self.config.batch_size:
                raise TrainingError(
                    f"Input '{tensor.name}' takes {length} samples at a time, and batches have "
                    f"{self.config.batch_size}. Pass --batch-size {length}, or export the model "
                    "with a free first axis."
                )

    def _divide(self) -> None:
        """Settle what is trained on, what is held out, and for how long."""
        count, config = len(self.data), self.config
        self.indices = np.arange(count)
        self.held_out = self.validation
        if self.held_out is None:
            self.indices, kept = split(count, config.validation, config.seed)
            self.held_out = self.data.subset(kept)
        self.steps_per_epoch = len(self.indices) // config.batch_size
        if self.steps_per_epoch == 0 or len(self.held_out) == 0:
            raise TrainingError(
                f"{count} samples are too few for batches of {config.batch_size} and a held-out "
                "slice. Give more data or a smaller --batch-size."
            )
        wanted = math.ceil(TARGET_STEPS / self.steps_per_epoch)
        self.epochs = config.epochs or min(wanted, MAX_EPOCHS)

    def _loss_terms(self) -> tuple[str, ...]:
        default = "cross-entropy+kl" if self.data.has_labels else "kl"
        terms = parse_loss(self.config.loss or default)
        if "cross-entropy" in terms and not self.data.has_labels:
            raise TrainingError(
                "The loss 'cross-entropy' needs labels, and the data have none. "
                "Name them with --label, or distil with --loss kl."
            )
        return terms

    def _train(self, rate: float) -> bool:
        """Run all epochs; return False when a smaller rate is to be tried from the start."""
        session, config = self.session, self.config
        steps = self.epochs * self.steps_per_epoch
        self.guard_steps = min(GUARD_STEPS, steps // 10)
        warmup = max(1, round(config.warmup * steps))
        for name, value in self.form.parameters.items():
            if name in session.values.views:
                session.values.views[name][...] = value
        updater = Updater(self.form, session.values, session.gradients, self.model, config)
        rng = np.random.default_rng(config.seed)
        losses: list[float] = []
        for epoch in range(1, self.epochs + 1):
            for feeds in self._feeds(rng):
                loss = session.run(feeds)
                self._check_finite(loss, len(losses) + 1)
                losses.append(loss)
                if self._rising(losses):
                    return not self._back_off(rate)
                updater.step(rate * self._rate(len(losses) - 1, steps, warmup))
                self._tell(losses, epoch, steps)
            self._keep_best(epoch)
            self._tell(losses, epoch, steps, self.figures)
        return True

    def _rate(self, step: int, steps: int, warmup: int) -> float:
        """Return the factor of the learning rate: none for the first steps, then the schedule."""
        first = self.guard_steps
        return cosine_rate(step - first, steps - first, warmup) if step >= first else 0.0

    def _feeds(self, rng: np.random.Generator) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the feeds of one epoch in a fresh random order."""
        order = rng.permutation(self.indices)
        for batch in self.data.batches(self.config.batch_size, indices=order, drop_last=True):
            feeds = {
                name: augment(value, self.config.augment, rng) if self.config.augment else value
                for name, value in batch.inputs.items()
            }
            if self.teaching is not None:
                outputs = self.teaching.run(None, feeds)
                names = (o.name for o in self.teaching.get_outputs())
                feeds |= {teacher_input(n): o for n, o in zip(names, outputs, strict=True)}
            if batch.labels is not None:
                self._check_labels(batch.labels)
                feeds[LABELS] = batch.labels
            yield feeds

    def _check_labels(self, labels: NDArray[np.int64]) -> None:
        shape = list(self.model.graph.outputs[0].shape or ())
        classes = shape[1] if len(shape) > 1 else None
        if isinstance(classes, int) and labels.max(initial=0) >= classes:
            raise DataError(
                f"A label is {labels.max()}; the model has {classes} classes, 0 to "
                f"{classes - 1}. Check the labels, or distil with --loss kl."
            )

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss became {loss} at step {step}. The best state so far (epoch "
                f"{self.best_epoch}) is kept. Try a smaller --lr.",
                self.best,
            )

    def _rising(self, losses: list[float]) -> bool:
        """Whether the mean of the last losses lies clearly above that of the first."""
        window = self.guard_steps
        if not window or len(losses) % window or len(losses) < 2 * window:
            return False
        first, last = np.array(losses[:window]), np.array(losses[-window:])
        noise = math.sqrt((first.var() + last.var()) / window)
        rise = last.mean() - first.mean()
        return bool(last.mean() > RISE * first.mean() and rise > STANDARD_ERRORS * noise)

    def _back_off(self, rate: float) -> bool:
        """Say what is done about a rising loss; return whether to try again."""
        again = len(self.notes) < MAX_BACKOFFS
        if again:
            note = f"the loss rose; starting again with {rate / 4:g} times the learning rate"
        else:
            note = f"the loss rose at {rate:g} times the learning rate too; the best state is kept"
        self.notes.append(note)
        logger.warning(note)
        return again

    def _tell(
        self, losses: list[float], epoch: int, steps: int, figures: Evaluation | None = None
    ) -> None:
        progress = Progress(
            step=len(losses),
            steps=steps,
            epoch=epoch,
            epochs=self.epochs,
            loss=float(np.mean(losses[-GUARD_STEPS:])),
            validation=figures,
            note=self.notes[-1] if self.notes else "",
        )
        self.report(progress)

    def _validate(self, model: Model) -> Evaluation:
        assert self.held_out is not None
        return evaluate(
            model,
            self.held_out.batches(self.config.batch_size),
            against=self.reference,
            threads=self.config.threads,
        )

    def _keep_best(self, epoch: int) -> None:
        candidate = _written_back(self.model, self.form, self.session.values)
        self.figures = self._validate(candidate)
        if _score(self.figures) > _score(self.best_figures):
            self.best, self.best_epoch, self.best_figures = candidate, epoch, self.figures


def _score(figures: Evaluation) -> tuple[float, float]:
    """Order states by accuracy where there are labels, then by agreement with the teacher."""
    return figures.metrics.get("top1", 0.0), figures.agreement or 0.0


def _written_back(model: Model, form: TrainingForm, values: Flat) -> Model:
    """Return the Q/DQ model with the trained weights and scales."""
    tuned = model.copy()
    tensors = tuned.graph.tensors()
    for name in form.weights:
        tensors[name].values = values.views[name].copy()
    params = read_params(model)
    if form.learns_scales:
        params = {
            name: replace(old, scale=values.views[f"{name}/scale"].copy())
            for name, old in params.items()
        }
    fit_bias_range(plan_of(model), params, tensors)
    return with_params(tuned, params, state="finetuned")
