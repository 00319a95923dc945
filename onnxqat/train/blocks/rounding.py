"""Train the rounding of a block's weights, see `onnxqat.train.adaround`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from onnxqat.qparams import FloatArray
from onnxqat.train.adaround import regularizer_gradient
from onnxqat.train.form import TrainingForm
from onnxqat.train.optimization.updater import Updater

__all__ = ["LearnedRounding"]

TRAVEL = 10.0  # how far a variable can move in all steps; h = 0 and h = 1 are 4.8 apart
# The regularizer is off at first. Then beta falls, so that it acts first on variables close to 0 or
# 1, and at the end on all variables (Nagel et al. 2020, section 3.3).
FREE_STEPS = 0.2  # share of the steps without the regularizer
FIRST_BETA, LAST_BETA = 20.0, 2.0
PRESSURE = 100.0  # weight of the regularizer, per unit of the block's error with nearest rounding


class LearnedRounding:
    """The rounding variables of one block.

    Parameters
    ----------
    form : TrainingForm
        The training form, which lists the weights with learned rounding.
    updater : Updater
        Moves the variables, whose values and gradients it contains; their rates are set here.
    steps : int
        The number of training steps.

    Attributes
    ----------
    moving : dict of str to AdaRound
        The weights whose rounding is trained: not frozen, and with a path to the loss.
    error : float
        The error of the block before training, in units of its loss.
    """

    def __init__(self, form: TrainingForm, updater: Updater, steps: int) -> None:
        self.roundings, self.steps, self.error = form.roundings, steps, 0.0
        self.values, self.gradients = updater.values.views, updater.gradients.views
        rates = updater.rates
        self.moving = {
            name: rounding
            for name, rounding in self.roundings.items()
            if name in rates and not rates[name].frozen(0)
        }
        for name in self.moving:
            updater.units[name] = 1.0
            rates[name].weight_decay = 0.0  # the weight itself does not change
            if rates[name].lr == updater.lr:  # no group sets another rate
                rates[name].lr = TRAVEL / steps
        for name in self.roundings.keys() - self.moving.keys():
            self.values[name][...] = self.roundings[name].decided(self.values[name])

    def press(self, number: int) -> None:
        """Add the gradient of the regularizer to that of the variables, at step ``number``."""
        pressure = self.pressure(number)
        if pressure is None:
            return
        weight, beta = pressure
        for name in self.moving:
            gradient = regularizer_gradient(self.values[name], beta)
            self.gradients[name] += np.float32(weight) * gradient

    def pressure(self, number: int) -> tuple[float, float] | None:
        """Return the regularizer's weight and its beta at a step; None while it is off."""
        done = (number / self.steps - FREE_STEPS) / (1 - FREE_STEPS)
        if done < 0:
            return None
        return PRESSURE * self.error, FIRST_BETA + (LAST_BETA - FIRST_BETA) * done

    @contextmanager
    def decided(self) -> Iterator[None]:
        """In the block, round weights as if training ended now."""
        variables = {name: self.values[name].copy() for name in self.moving}
        try:
            for name, rounding in self.moving.items():
                self.values[name][...] = rounding.decided(self.values[name])
            yield
        finally:
            for name, values in variables.items():
                self.values[name][...] = values

    def weights(self) -> dict[str, FloatArray]:
        """Return the weights with learned rounding, rounded unless their rounding is frozen."""
        found = {name: rounding.weight for name, rounding in self.roundings.items()}
        moved = {name: r.rounded(self.values[name]) for name, r in self.moving.items()}
        return found | moved
