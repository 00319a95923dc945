"""Train the weights and scales of one block so that its outputs match the float model's."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray, aligned
from onnxqat.quantized import QuantizedModel
from onnxqat.train.blocks.rounding import LearnedRounding
from onnxqat.train.blocks.samples import Samples
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat, StepSession
from onnxqat.train.form import TrainingForm
from onnxqat.train.losses import Loss, Term, teacher_input, variances
from onnxqat.train.monitoring.divergence import RECENT_STEPS, not_finite
from onnxqat.train.optimization.ranges import Ranges
from onnxqat.train.optimization.schedules import rate_factor
from onnxqat.train.optimization.updater import Updater

__all__ = ["BlockTraining", "block_loss"]

Feeds = dict[str, NDArray[Any]]

REACH = 1.0  # levels that a weight can move in all steps together
FEWEST_STEPS = 20  # in fewer steps, weights move less far: their gradients are too few to trust


def block_loss(samples: Samples, outputs: Collection[str]) -> Loss | None:
    """Return the loss of a block: the squared error of each output, divided by its variance.

    Outputs that are not float32, or have a constant value, are left out; None if none remains.
    """
    floats = [name for name in outputs if samples.floats[name].dtype == np.float32]
    spreads = variances(
        {(name, None, 0): value for name, value in taken.items()}
        for taken in (samples.take(samples.floats, floats, rows) for rows in samples.batches())
    )
    found = {name: spread for (name, _, _), spread in spreads.items()}
    terms = tuple(
        Term(kind="mse", weight=1 / found[name], output=name)
        for name in floats
        if math.isfinite(found[name]) and found[name] > 0
    )
    return Loss(terms=terms, graphs={}) if terms else None


class BlockTraining:
    """The training of one block, with its arrays in numpy.

    `onnxqat.train.resident.blocks` has the training with arrays on a device.

    Parameters
    ----------
    model : QuantizedModel
        The block, see `onnxqat.train.blocks.parts.block_model`.
    form : TrainingForm
        The training form of the block.
    loss : Loss
        See `block_loss`.
    config : Config
        Optimizer, rates, batch size and steps; ``lr`` is set.
    still : collection of str
        Parameters that are not changed, because an earlier block has tuned them.
    steps : int
        The number of training steps.
    by_level : bool
        Whether the step size of weights is measured in levels: in all steps together a weight can
        move by about `REACH` levels. Otherwise the rate is that of ``config``.
    """

    def __init__(
        self,
        model: QuantizedModel,
        form: TrainingForm,
        loss: Loss,
        config: Config,
        still: Collection[str],
        steps: int,
        by_level: bool = False,
    ) -> None:
        self.form, self.loss, self.config, self.still = form, loss, config, frozenset(still)
        self.steps, self.model = steps, model
        self._open(replace(form, frozen=form.learned & self.still))
        if by_level:
            self._set_rates(model)
        self.rounding = LearnedRounding(form, self.updater, steps)
        self._start()

    def _open(self, learning: TrainingForm) -> None:
        """Open the session of the loss and the gradients, and read the rates."""
        size, threads = self.config.samples, self.config.threads
        self.session = StepSession(learning, self.loss, batch_size=size, threads=threads)
        self.inputs = self.session.inputs
        self.updater = self._updater(self.session.values, self.session.gradients)

    def _updater(self, values: Flat, gradients: Flat) -> Updater:
        return Updater(
            self.form, values, gradients, self.model, self.config, part=True, still=self.still
        )

    def _start(self) -> None:
        """Prepare what moves parameters, after their rates are set."""
        constant = self.config.averaging_constant
        self.ranges = Ranges(self.form, self.session.values, self.model, constant)

    def _set_rates(self, model: QuantizedModel) -> None:
        """Measure the step size of weights in levels, unless a group sets their rate.

        What counts is whether a weight reaches another level. At 8 bits levels are close together,
        at 2 bits far apart, so that no rate relative to the weight suits both.
        """
        updater = self.updater
        moving = updater.rates.keys() & updater.units.keys() - self.form.roundings.keys()
        for point in model.plan.grid_points():
            name = point.tensor
            if point.role != "weight" or name not in moving:
                continue
            rates, rank = updater.rates[name], updater.values.views[name].ndim
            if rates.lr == updater.lr:
                scale = model.params[point.parameters].scale
                updater.units[name] = aligned(scale, rank, point.spec.axis)
                # the mean of the schedule is one half
                rates.lr = 2 * REACH / max(self.steps, FEWEST_STEPS)

    @property
    def tuned(self) -> set[str]:
        """Names of the parameters that training changes."""
        return set(self.updater.rates) - self.still

    @property
    def values(self) -> Mapping[str, FloatArray]:
        """The current values of the parameters, by name; learned roundings give rounded weights."""
        return self.session.values.views | self.rounding.weights()

    def feeds(self, samples: Samples, rows: NDArray[np.int64], inputs: Feeds) -> Feeds:
        """Return the feeds of the session: inputs, and the outputs of the float model."""
        read = [str(term.output) for term in self.loss.terms]
        outputs = samples.take(samples.floats, read, rows)
        return inputs | {teacher_input(name): value for name, value in outputs.items()}

    def step(self, batches: Iterator[Any], factor: float, number: int) -> float:
        """Run one step and return its loss; if it is not finite, nothing is changed."""
        session, gradients = self.session, self.session.gradients
        self.ranges.begin()
        losses = []
        total = np.zeros_like(gradients.buffer)
        for feeds in batches:
            losses.append(session.run(feeds))
            self.ranges.see(session.extremes())
            total += gradients.buffer
        np.divide(total, np.float32(len(losses)), out=gradients.buffer)
        loss = float(np.mean(losses))
        if not math.isfinite(loss) or not_finite(gradients.views, gradients.buffer):
            return math.nan
        self.rounding.press(number)
        self.updater.step(factor, number)
        self.ranges.step(Workers(), lambda name: self._frozen(name, number))
        return loss

    def _frozen(self, name: str, number: int) -> bool:
        return name in self.still or self.updater.frozen(name, number)

    def error(self, samples: Samples) -> float:
        """Return the mean loss over samples, with all inputs from the quantized network."""
        with self._decided():
            return self._error(samples)

    def _decided(self) -> AbstractContextManager[None]:
        """Round weights as if training ended now."""
        return self.rounding.decided()

    def _loss(self, feeds: Feeds) -> float:
        """Return the loss of one batch."""
        return self.session.run(feeds)

    def _error(self, samples: Samples) -> float:
        losses = []
        inputs = [name for name in self.inputs if name in samples.quantized]
        inputs += [name for name in self.inputs if name in samples.constants]
        count = max(samples.count // samples.batch, 1)
        order = np.resize(np.arange(samples.count), count * samples.batch)
        for rows in order.reshape(count, samples.batch):
            taken = samples.take(samples.quantized, inputs, rows)
            losses.append(self._loss(self.feeds(samples, rows, taken)))
        return float(np.mean(losses))

    def run(self, samples: Samples, seed: tuple[int, ...], error: float) -> Iterator[float]:
        """Train, and yield the loss of each step.

        Parameters
        ----------
        seed : tuple of int
            The seed of the order of samples, and of the values taken from the float network.
        error : float
            The error of the block before training, see `error`.
        """
        self.rounding.error = error
        inputs = [n for n in self.inputs if n in (*samples.quantized, *samples.constants)]
        inputs.sort()  # random numbers are drawn in this order
        rng, parts = np.random.default_rng(seed), self.config.batches
        order = self._order(samples, rng)

        def batches() -> Iterator[Feeds]:
            for _ in range(parts * self.steps):
                rows = next(order)
                mixed = samples.mixed(inputs, rows, self.config.block_mix, rng)
                yield self.feeds(samples, rows, mixed)

        first = min(RECENT_STEPS, self.steps // 10)  # initialize Adam's means; change nothing
        ready = self._ready(batches())
        for number in range(self.steps):
            factor = rate_factor(self.config, number, self.steps, first=first)
            yield self.step(islice(ready, parts), factor, number)

    def _ready(self, batches: Iterator[Feeds]) -> Iterator[Any]:
        """Return the batches in the form that `step` reads."""
        return batches

    @staticmethod
    def _order(samples: Samples, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Yield batches of rows forever, in a new order after each pass over all rows."""
        count = samples.count // samples.batch
        while True:
            chosen = rng.permutation(samples.count)[: count * samples.batch]
            yield from chosen.reshape(count, samples.batch)
