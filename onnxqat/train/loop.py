"""The training loop: steps, epochs, the best state, and what is done when the loss rises."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from onnxqat.calibrate import fit_bias_range
from onnxqat.errors import TrainingError
from onnxqat.evaluate import Evaluation
from onnxqat.insert import plan_of, read_params, with_params
from onnxqat.model import Model
from onnxqat.qparams import FloatArray
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat, StepSession
from onnxqat.train.form import TrainingForm
from onnxqat.train.guard import GUARD_STEPS, LossHistory
from onnxqat.train.schedules import cosine_rate
from onnxqat.train.supply import Supply
from onnxqat.train.updater import Updater

__all__ = ["DivergedError", "Finetuned", "Loop", "Progress"]

logger = logging.getLogger(__name__)

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


class Record(msgspec.Struct, kw_only=True):
    """What a run has come to, besides its arrays.

    Attributes
    ----------
    before, best : Evaluation
        Of the start and of the best state so far.
    best_epoch : int
        The epoch of the best state; 0 is the start.
    backoffs : int
        How often training started again at a quarter of the rate.
    step, epoch : int
        Steps taken and epochs validated since it last started.
    losses : LossHistory
        Since then.
    notes : list of str
        What was done about a rising loss.
    seconds : float
        Wall time so far.
    """

    before: Evaluation
    best: Evaluation
    losses: LossHistory
    best_epoch: int = 0
    backoffs: int = 0
    step: int = 0
    epoch: int = 0
    notes: list[str] = []
    seconds: float = 0.0


@dataclass
class Loop:
    """One fine-tuning, everything being settled.

    Parameters
    ----------
    model, form, session, supply, config
        What is trained, how, on what.
    validate : callable
        Evaluates a Q/DQ model on the held-out data.
    epochs : int
        How many to run.
    report : callable
        Told about every step and epoch.
    """

    model: Model
    form: TrainingForm
    session: StepSession
    supply: Supply
    config: Config
    validate: Callable[[Model], Evaluation]
    epochs: int
    report: Callable[[Progress], None]

    def run(self) -> Finetuned:
        """Train, and return the best state."""
        started = time.monotonic()
        self.steps = self.epochs * self.supply.steps
        self.best = Flat(self.session.values.views)
        before = self.validate(self.model)
        self.record = Record(before=before, best=before, losses=self._no_losses())
        self._begin()
        while not self._train():
            self._begin()
        record = self.record
        return Finetuned(
            model=self._best_model(),
            before=record.before,
            after=record.best,
            epochs=self.epochs,
            best_epoch=record.best_epoch,
            seconds=time.monotonic() - started,
            notes=tuple(record.notes),
        )

    def _no_losses(self) -> LossHistory:
        return LossHistory(window=min(GUARD_STEPS, self.steps // 10))

    def _begin(self) -> None:
        """Set everything that training changes to the start."""
        session, record = self.session, self.record
        for name, value in self.form.parameters.items():
            if name in session.values.views:
                session.values.views[name][...] = value
        self.updater = Updater(
            self.form, session.values, session.gradients, self.model, self.config
        )
        record.step, record.epoch, record.losses = 0, 0, self._no_losses()

    def _train(self) -> bool:
        """Run the epochs; return False when a smaller rate is to be tried from the start."""
        record = self.record
        while record.epoch < self.epochs:
            done = record.step - record.epoch * self.supply.steps
            for feeds in self.supply.epoch(record.epoch + 1, done=done):
                loss = self.session.run(feeds)
                self._check_finite(loss)
                record.losses.add(loss)
                if record.losses.rising():
                    return not self._back_off()
                self.updater.step(self._rate())
                record.step += 1
                self._tell()
            self._end_epoch()
        return True

    def _rate(self) -> float:
        """Return the factor of the learning rate at this step.

        The first steps change nothing: they measure the loss that later ones are compared with,
        and fill Adam's means.
        """
        first = self.record.losses.window
        step, steps = self.record.step - first, self.steps - first
        if step < 0:
            return 0.0
        warmup = max(1, round(self.config.warmup * self.steps))
        return 0.25**self.record.backoffs * cosine_rate(step, steps, warmup)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss became {loss} at step {self.record.step + 1}. The best state so far "
                f"(epoch {self.record.best_epoch}) is kept. Try a smaller --lr.",
                self._best_model(),
            )

    def _back_off(self) -> bool:
        """Say what is done about a rising loss; return whether to try again."""
        rate = 0.25**self.record.backoffs
        again = self.record.backoffs < MAX_BACKOFFS
        if again:
            self.record.backoffs += 1
            note = f"the loss rose; starting again with {rate / 4:g} times the learning rate"
        else:
            note = f"the loss rose at {rate:g} times the learning rate too; the best state is kept"
        self.record.notes.append(note)
        logger.warning(note)
        return again

    def _tell(self, figures: Evaluation | None = None) -> None:
        record = self.record
        progress = Progress(
            step=record.step,
            steps=self.steps,
            epoch=record.epoch + (figures is None),
            epochs=self.epochs,
            loss=record.losses.mean,
            validation=figures,
            note=record.notes[-1] if record.notes else "",
        )
        self.report(progress)

    def _end_epoch(self) -> None:
        """Evaluate, and keep the state if it is the best."""
        record, values = self.record, self.session.values
        figures = self.validate(_written_back(self.model, self.form, values.views))
        record.epoch += 1
        if _score(figures) > _score(record.best):
            record.best, record.best_epoch = figures, record.epoch
            self.best.buffer[...] = values.buffer
        self._tell(figures)

    def _best_model(self) -> Model:
        if self.record.best_epoch == 0:
            return self.model
        return _written_back(self.model, self.form, self.best.views)


def _score(figures: Evaluation) -> tuple[float, float]:
    """Order states by accuracy where there are labels, then by agreement with the teacher."""
    return figures.metrics.get("top1", 0.0), figures.agreement or 0.0


def _written_back(model: Model, form: TrainingForm, views: Mapping[str, FloatArray]) -> Model:
    """Return the Q/DQ model with the trained weights and scales."""
    tuned = model.copy()
    tensors = tuned.graph.tensors()
    for name in form.weights:
        tensors[name].values = views[name].copy()
    params = read_params(model)
    if form.learns_scales:
        params = {
            name: replace(old, scale=views[f"{name}/scale"].copy()) for name, old in params.items()
        }
    fit_bias_range(plan_of(model), params, tensors)
    return with_params(tuned, params, state="finetuned")
