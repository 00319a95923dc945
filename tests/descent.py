"""Move parameters by given gradients: a training step without the training graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.model import Model
from onnxqat.train import Config
from onnxqat.train.engine import Flat
from onnxqat.train.form import training_form
from onnxqat.train.optimization.updater import Updater

Gradients = Callable[[str, NDArray[Any]], Any]


class Trained:
    """The parameters of a Q/DQ model at the start, and after steps.

    Parameters
    ----------
    settings
        Fields of `Config`.
    """

    def __init__(self, model: Model, **settings: Any) -> None:
        form = training_form(model, method=settings.get("method", "lsq"))
        learned = {n: v for n, v in form.parameters.items() if n in form.learned}
        self.values = Flat(form.parameters)
        self.start = {n: v.copy() for n, v in self.values.views.items()}
        self.gradients = Flat({n: np.ones_like(v) for n, v in learned.items()})
        self.updater = Updater(form, self.values, self.gradients, model, Config(**settings))

    def step(self, gradients: Gradients, step: int = 0) -> Trained:
        """Run one step; ``gradients`` returns a parameter's gradient from its name and shape."""
        for name, view in self.gradients.views.items():
            view[...] = gradients(name, view)
        self.updater.step(1.0, step)
        return self

    def steps(self, count: int) -> Trained:
        """Run steps with gradients that are the same in all tests."""
        rng = np.random.default_rng(1)
        for step in range(count):
            self.step(lambda _, view: rng.normal(size=view.shape), step)
        return self

    @property
    def moved(self) -> set[str]:
        """Names of the parameters that have changed."""
        return {n for n, v in self.values.views.items() if not np.array_equal(v, self.start[n])}
