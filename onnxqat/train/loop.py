"""The training loop: steps, epochs, the best state, and restarts when the loss rises."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from onnxqat.errors import TrainingError
from onnxqat.evaluation import Evaluation
from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.train.batches import TrainingBatches
from onnxqat.train.checkpoint import Checkpoints, Identity
from onnxqat.train.config import Config
from onnxqat.train.descent import Descent
from onnxqat.train.form import TrainingForm
from onnxqat.train.losses import Part
from onnxqat.train.monitoring.divergence import (
    RECENT_STEPS,
    LossHistory,
    explain_gradients,
)
from onnxqat.train.monitoring.pace import Pace, duration, peak_memory
from onnxqat.train.monitoring.verdict import verdict
from onnxqat.train.optimization.schedules import rate_factor
from onnxqat.train.records import DivergedError, Finetuned, Progress, Record, StoppedError
from onnxqat.train.selection import Selection, figures_of, score
from onnxqat.train.state import with_values
from onnxqat.train.validation import Validation, check_labels

__all__ = ["Loop"]

logger = logging.getLogger(__name__)

MAX_BACKOFFS = 3
TIMED = 10  # number of steps after which the duration of the run is estimated
LONG = 120  # seconds; the estimate is printed for runs at least this long


@dataclass
class Loop:
    """One fine-tuning of the network from end to end.

    Parameters
    ----------
    model, form, step_batches, config
        The Q/DQ model, its training form, the feeds and the hyper-parameters.
    descent : Descent
        The state that training changes, and its steps.
    validate : Validation
        Evaluates a Q/DQ model on the held-out data.
    parts, selection
        See `Finetuned`.
    epochs : int
        The number of epochs.
    report : callable
        Called after each step and each epoch.
    stage : callable
        Called during evaluations with a title, the number of finished batches, and their total.
    announcement, say
        Lines of text, and the function that prints them once the data have proved usable.
    checkpoints : Checkpoints or None
        Where the state is saved.
    identity : callable
        Returns the values that must be the same when a run resumes.
    stop : callable
        Returns whether to stop; called after each step and during evaluations.
    workers : Workers
        The processes that train together.
    """

    model: QuantizedModel
    form: TrainingForm
    descent: Descent
    step_batches: TrainingBatches
    config: Config
    validate: Validation
    parts: tuple[Part, ...]
    selection: Selection
    epochs: int
    report: Callable[[Progress], None]
    stage: Callable[[str, int, int], None]
    announcement: list[str]
    say: Callable[[str], None]
    checkpoints: Checkpoints | None
    identity: Callable[[], Identity]
    stop: Callable[[], bool]
    workers: Workers

    def run(self) -> Finetuned:
        """Train, and return the best state."""
        self.started = time.monotonic()
        self.steps = self.epochs * self.step_batches.steps
        self._check_delay()
        self.factor, self.pace, self.evaluating = 0.0, Pace(), 0.0
        self.tuned = self.model.floats.copy()  # receives the weights of each evaluated state
        if self.checkpoints and self.workers.rank == 0:
            self.identity()  # now, because the data may be gone when a checkpoint is due
        self.record = self._first_record()
        if not self.record.finished:
            for line in self.announcement:
                self.say(line)
            while not self._train():
                self.descent.reset()
                self.record = self._again()
            self.record.finished = True
            self._save()
        return self._outcome()

    def _outcome(self) -> Finetuned:
        """Return the current result of the run."""
        record, selection = self.record, self.selection
        said = verdict(record.before, record.tried, record.best_epoch, selection)
        return Finetuned(
            model=self._best_model(),
            before=record.before,
            after=record.best,
            epochs=record.epoch,
            best_epoch=record.best_epoch,
            seconds=self._seconds(),
            parts=self.parts,
            selection=selection,
            notes=(*record.notes, *said),
            tried=tuple(record.tried),
            samples_per_second=self.pace.rate(self._samples_per_step()),
            waiting=self.step_batches.waiting if self.pace.steps < 1 else self.pace.waiting,
        )

    def _samples_per_step(self) -> int:
        return self.config.samples * self.config.batches * self.workers.size

    def _check_delay(self) -> None:
        if self.config.quant_delay >= self.steps:
            raise TrainingError(
                f"--quant-delay {self.config.quant_delay}: the run has only {self.steps} steps, "
                "all of them without quantization. Give fewer, or more --epochs."
            )

    def _first_record(self) -> Record:
        """Evaluate the start, or load the state of the checkpoint."""
        if self.checkpoints and self.checkpoints.resume:
            arrays = self.descent.arrays()
            record = self.workers.first(lambda: self._load(arrays))
            for array in arrays.values():
                self.workers.spread(array)
            self.descent.restore(arrays, record.step)
            self._run_epochs(record.epochs or self.epochs)
            self.started -= record.seconds
            return record
        started = time.monotonic()
        before = self._evaluate("the start", self.model, self._stop_at_start)
        self.evaluating = time.monotonic() - started
        score(before, self.selection.figure)  # an unknown figure is refused at once
        self._check_start(before)
        check_labels(before, self.model.name, force=self.config.force_labels)
        return Record(before=before, best=before, losses=self._no_losses())

    def _load(self, arrays: dict[str, FloatArray]) -> Record:
        assert self.checkpoints is not None
        return self.checkpoints.load(self.identity(), Record, arrays)

    def _check_start(self, before: Evaluation) -> None:
        """Refuse a start whose figure is not finite, so that no state can be compared with it."""
        figure = before.first.get(self.selection.figure, self.selection.figure)
        value = figures_of(before)[figure]
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.model.name}: on the held-out data, {self.selection.figure} is {value} "
                "before training. The model computes infinite or NaN values on these data. Check "
                "the data and the preprocessing (--mean, --scale)."
            )

    def _evaluate(self, title: str, model: QuantizedModel, stop: Callable[[], None]) -> Evaluation:
        """Evaluate on worker 0; ``stop`` may end it if no other worker waits for the result."""
        done, total = 0, self.validate.batches

        def progress() -> None:
            nonlocal done
            done += 1
            self.stage(f"evaluating {title}", done, total)
            if self.workers.size == 1:
                stop()

        return self.workers.first(lambda: self.validate(model, progress))

    def _again(self) -> Record:
        return msgspec.structs.replace(
            self.record, step=0, epoch=0, waited=0, losses=self._no_losses()
        )

    def _no_losses(self) -> LossHistory:
        return LossHistory(window=min(RECENT_STEPS, self.steps // 10))

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _save(self) -> bool:
        """Write a checkpoint, if configured; return whether it was written."""
        if self.checkpoints is None:
            return False
        record = self.record
        record.seconds = self._seconds()
        if self.workers.rank != 0:
            return True
        return self.checkpoints.save(
            self.identity(), record, self.descent.arrays(), finished=record.finished
        )

    def _stop_at_start(self) -> None:
        if self.stop():
            raise StoppedError("Interrupted before the first step.")

    def _stop_if_asked(self) -> None:
        """Stop, with a checkpoint of the last step."""
        if not self.workers.any(self.stop()):
            return
        where = f"Interrupted at step {self.record.step} of {self.steps}"
        kept = self._save()
        if self.checkpoints is None or not self.checkpoints.written:
            raise StoppedError(f"{where}. Nothing was kept.")
        what = "saved" if kept else "which could not be saved; an earlier step is"
        raise StoppedError(
            f"{where}, {what} in {self.checkpoints.path}. Continue with the same command and "
            "--resume."
        )

    def _train(self) -> bool:
        """Run the epochs; return False if training must restart with a smaller rate."""
        record = self.record
        while record.epoch < self.epochs and self._patient():
            done = record.step - record.epoch * self.step_batches.steps
            for batches in self.step_batches.epoch(record.epoch + 1, done=done):
                if record.step == self.config.quant_delay > 0:
                    record.losses = self._no_losses()  # losses of the float network are lower
                loss = self.descent.gradient(self.pace.begin(batches), record.step)
                self._check_finite(loss)
                record.losses.add(loss)
                if record.losses.rising():
                    return not self._back_off()
                self.factor = self._rate()
                self.descent.move(self.factor, record.step)
                self.pace.end()
                record.step += 1
                self._look_at_the_clock()
                self._tell()
                self._stop_if_asked()
                if self.checkpoints and self.checkpoints.due(record.step):
                    self._save()
            self._end_epoch()
        return True

    def _run_epochs(self, count: int) -> None:
        self.epochs, self.steps = count, count * self.step_batches.steps

    def _look_at_the_clock(self) -> None:
        """After the first timed steps, fit the epochs into the time limit; print the duration."""
        record, pace, minutes = self.record, self.pace, self.config.minutes
        if pace.steps != max(1, min(TIMED, self.steps - 1)) or record.backoffs:
            return
        epoch = self.step_batches.steps * pace.step + self.evaluating
        if minutes is not None and not record.epochs:
            left = 60 * minutes - self._seconds() + record.step * pace.step
            delayed = self.config.quant_delay // self.step_batches.steps + 1
            fitting = self.workers.first(lambda: max(delayed, record.epoch + 1, int(left / epoch)))
            record.epochs = fitting
            self._run_epochs(fitting)
        whole = self.epochs * epoch
        if minutes is not None or whole >= LONG:
            memory, times = peak_memory(), "epoch" if self.epochs == 1 else "epochs"
            held = f"; {memory:.2g} GB of memory so far" if memory is not None else ""
            self.say(
                f"{self.epochs} {times} take about {duration(whole)}: {duration(pace.step)} a "
                f"step, {duration(self.evaluating)} to evaluate{held}"
            )

    def _rate(self) -> float:
        """Return the factor of the learning rate at this step.

        The first steps change nothing: they measure the loss with which later ones are compared,
        and initialize Adam's means.
        """
        record = self.record
        factor = rate_factor(self.config, record.step, self.steps, first=record.losses.window)
        return 0.25**record.backoffs * factor

    def _check_finite(self, loss: float) -> None:
        """Stop if the loss or a gradient is not finite, and name the tensor."""
        record = self.record
        moved = record.step > record.losses.window
        if not math.isfinite(loss):
            reason = self.descent.explained(moved=moved)
            self._diverged(f"The loss became {loss} at step {record.step + 1}: {reason}.")
        wrong = self.descent.wrong(record.step)
        if wrong:
            reason = explain_gradients(self.form.proto.graph, wrong, moved=moved)
            self._diverged(f"Step {record.step + 1}: {reason}.")

    def _diverged(self, message: str) -> NoReturn:
        best = self.record.best_epoch
        kept = f"The best state so far (epoch {best}) is kept." if best else "The start is kept."
        raise DivergedError(f"{message} {kept}", self._outcome())

    def _back_off(self) -> bool:
        """Report the reaction to a rising loss; return whether to restart."""
        rate = 0.25**self.record.backoffs
        again = self.record.backoffs < MAX_BACKOFFS
        if again:
            self.record.backoffs += 1
            note = f"the loss rose; restarting with {rate / 4:g} times the learning rate"
        else:
            note = f"the loss also rose at {rate:g} times the learning rate; the best state is kept"
        self.record.notes.append(note)
        if self.workers.rank == 0:
            logger.warning(note)
        return again

    def _tell(self, figures: Evaluation | None = None, model: QuantizedModel | None = None) -> None:
        record = self.record
        progress = Progress(
            step=record.step,
            steps=self.steps,
            epoch=record.epoch + (figures is None),
            epochs=self.epochs,
            loss=record.losses.mean,
            lr=self.factor * self.descent.lr,
            scale_lr=self.factor * self.config.scale_lr,
            validation=figures,
            model=model,
            score=score(figures, self.selection.figure) if model and figures else (),
            note=record.notes[-1] if record.notes else "",
            before=record.before,
        )
        self.report(progress)

    def _end_epoch(self) -> None:
        """Evaluate the state, and keep it if it is the best."""
        record = self.record
        candidate = self._written_back(self.descent.kept)
        figures = self._evaluate(f"epoch {record.epoch + 1}", candidate, self._stop_if_asked)
        record.epoch += 1
        record.waited += 1
        record.tried.append((record.epoch, figures))
        if score(figures, self.selection.figure) > score(record.best, self.selection.figure):
            record.best, record.best_epoch, record.waited = figures, record.epoch, 0
            self.descent.keep()
        self._tell(figures, candidate)

    def _patient(self) -> bool:
        """Return whether to continue the search for a better state."""
        patience, waited = self.config.patience, self.record.waited
        if patience is None or waited < patience or self.record.epoch == self.epochs:
            return True
        times = "epoch" if waited == 1 else f"{waited} epochs"
        note = f"stopped after epoch {self.record.epoch}: no better state in the last {times}"
        self.record.notes.append(note)
        return False

    def _best_model(self) -> QuantizedModel:
        if self.record.best_epoch == 0:
            return self.model
        return self._written_back(self.descent.best)

    def _written_back(self, views: Mapping[str, FloatArray]) -> QuantizedModel:
        """Return the model with trained weights and scales; the next call changes its weights."""
        return with_values(
            self.model,
            self.tuned,
            views,
            weights=self.form.weights,
            zero_points=self.form.zero_points,
        )
