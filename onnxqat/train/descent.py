"""The state that training changes: parameters, gradients, optimizer, averages, best state.

Here it consists of numpy arrays, which the session reads and writes in place.
`onnxqat.train.resident` keeps the same state on a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.train.batches import Feeds
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat, StepSession
from onnxqat.train.form import TrainingForm
from onnxqat.train.monitoring.divergence import explain_loss, not_finite
from onnxqat.train.optimization.ranges import Ranges
from onnxqat.train.optimization.updater import Updater

__all__ = ["Descent", "HostDescent"]


class Descent(ABC):
    """The state of one network during training, and its training steps.

    Attributes
    ----------
    inputs : set of str
        The names of the inputs of the training graph: a batch's arrays and the parameters.
    """

    inputs: set[str]

    @property
    @abstractmethod
    def best(self) -> Mapping[str, FloatArray]:
        """The parameters of the best state, by name."""

    @property
    @abstractmethod
    def kept(self) -> Mapping[str, FloatArray]:
        """The parameters to evaluate, by name: the moving average, if there is one."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """The learning rate of weights without a learning rate of their own."""

    @abstractmethod
    def reset(self) -> None:
        """Reset everything except the best state to its value at the start."""

    @abstractmethod
    def gradient(self, batches: Iterator[Any], step: int) -> float:
        """Set the gradients to their mean over a step's batches and workers; return the loss."""

    @abstractmethod
    def wrong(self, step: int) -> list[str]:
        """Return the parameters that change at ``step`` and have a gradient that is not finite."""

    @abstractmethod
    def explained(self, *, moved: bool) -> str:
        """Return why the loss is not finite, see `explain_loss`."""

    @abstractmethod
    def move(self, factor: float, step: int) -> None:
        """Take a step at ``factor`` times the learning rates; ``step`` counts from 0."""

    @abstractmethod
    def keep(self) -> None:
        """Save the current state as the best."""

    @abstractmethod
    def arrays(self) -> dict[str, FloatArray]:
        """Return every array that training changes, for a checkpoint."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, FloatArray], step: int) -> None:
        """Continue after ``step`` steps with the arrays of a checkpoint, named as in `arrays`."""


class HostDescent(Descent):
    """Training with its arrays in numpy.

    Parameters
    ----------
    form : TrainingForm
        The training form of the network.
    session : StepSession
        Computes the loss and the gradients.
    delayed : StepSession or None
        The same for the float network, if the first steps train it.
    model : QuantizedModel
        The Q/DQ model: the plan and the calibrated parameters.
    config : Config
        The learning rates and the optimizer.
    workers : Workers
        The processes that train together.
    """

    def __init__(
        self,
        form: TrainingForm,
        session: StepSession,
        delayed: StepSession | None,
        model: QuantizedModel,
        config: Config,
        workers: Workers,
    ) -> None:
        self.form, self.session, self.delayed = form, session, delayed
        self.model, self.config, self.workers = model, config, workers
        self.inputs = session.inputs
        values = session.values
        self._best = Flat(values.views)
        self._kept = values if config.ema is None else Flat(values.views)
        self.reset()

    @property
    def best(self) -> Mapping[str, FloatArray]:
        """The parameters of the best state, by name."""
        return self._best.views

    @property
    def kept(self) -> Mapping[str, FloatArray]:
        """The parameters to evaluate, by name: the moving average, if there is one."""
        return self._kept.views

    @property
    def lr(self) -> float:
        """The learning rate of weights without a learning rate of their own."""
        return self.updater.lr

    def reset(self) -> None:
        """Reset everything except the best state to its value at the start."""
        session = self.session
        for name, value in self.form.parameters.items():
            if name in session.values.views:
                session.values.views[name][...] = value
        self._kept.buffer[...] = session.values.buffer
        self.updater = Updater(
            self.form, session.values, session.gradients, self.model, self.config
        )
        constant = self.config.averaging_constant
        self.ranges = Ranges(self.form, session.values, self.model, constant)

    def gradient(self, batches: Iterator[Feeds], step: int) -> float:
        """Set the gradients to their mean over a step's batches and workers; return the loss."""
        session, gradients = self.session, self.session.gradients.buffer
        if self.delayed and step < self.config.quant_delay:
            session = self.delayed
            gradients[...] = 0  # the float network has no gradients for scales
        self.ranges.begin()

        def run(feeds: Feeds) -> float:
            loss = session.run(feeds)
            self.ranges.see(session.extremes())
            return loss

        losses = [run(next(batches))]
        if self.config.batches > 1:
            total = gradients.copy()
            for feeds in batches:
                losses.append(run(feeds))
                total += gradients
            np.divide(total, np.float32(len(losses)), out=gradients)
        self.workers.average(gradients)
        loss = np.array(sum(losses) / len(losses))
        self.workers.average(loss)
        return float(loss)

    def wrong(self, step: int) -> list[str]:
        """Return the parameters that change at ``step`` and have a gradient that is not finite."""
        gradients = self.session.gradients
        wrong = not_finite(gradients.views, gradients.buffer)
        return [name for name in wrong if not self.updater.rates[name].frozen(step)]

    def explained(self, *, moved: bool) -> str:
        """Return why the loss is not finite, see `explain_loss`."""
        values = self.session.values
        return explain_loss(values.views, values.buffer, moved=moved)

    def move(self, factor: float, step: int) -> None:
        """Take a step at ``factor`` times the learning rates; ``step`` counts from 0."""
        self.updater.step(factor, step)
        self.ranges.step(self.workers, partial(self.updater.frozen, step=step))
        if self.config.ema is not None:
            self._kept.buffer *= np.float32(self.config.ema)
            self._kept.buffer += np.float32(1 - self.config.ema) * self.session.values.buffer

    def keep(self) -> None:
        """Save the current state as the best."""
        self._best.buffer[...] = self._kept.buffer

    def arrays(self) -> dict[str, FloatArray]:
        """Return every array that training changes, for a checkpoint."""
        moments = self.updater.optimizer.buffers
        arrays = {f"optimizer/{name}": buffer for name, buffer in moments.items()}
        arrays |= {f"latent/{name}": latent for name, latent in self.updater.latents.items()}
        if self.form.observed:
            arrays["ranges"] = self.ranges.averages
        if self.config.ema is not None:
            arrays["average"] = self._kept.buffer
        return arrays | {"values": self.session.values.buffer, "best": self._best.buffer}

    def restore(self, arrays: Mapping[str, FloatArray], step: int) -> None:
        """Continue after ``step`` steps with the arrays of a checkpoint, named as in `arrays`."""
        del arrays  # the checkpoint has filled them in place
        self.updater.optimizer.steps = step
