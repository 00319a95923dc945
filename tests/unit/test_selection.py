"""Which state is kept: by a figure, of the values or their average, and when it is enough."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.evaluate import Evaluation
from onnxqat.insert import read_params, strip
from onnxqat.train import Config, finetune
from onnxqat.train.selection import score
from onnxqat.train.updater import Updater
from tests.digits import calibrated_lenet, training_digits


@pytest.fixture(scope="module")
def data():
    with training_digits(320) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(data):
    return calibrated_lenet(data, "weight.bits=2")


def figures(**metrics) -> Evaluation:
    others = {n: metrics.pop(n) for n in ("agreement", "max_abs_diff") if n in metrics}
    return Evaluation(samples=1, metrics=metrics, reference={}, **others)


def test_the_order_of_states():
    a = figures(top1=0.5, top5=0.9, agreement=0.6, max_abs_diff=3.0)
    b = figures(top1=0.6, top5=0.8, agreement=0.7, max_abs_diff=2.0)
    c = figures(top1=0.6, top5=0.9, agreement=0.5, max_abs_diff=1.0)

    assert sorted([a, b, c], key=lambda e: score(e, None)) == [a, c, b]
    assert sorted([a, b, c], key=lambda e: score(e, "top5")) == [b, a, c]
    assert sorted([a, b, c], key=lambda e: score(e, "agreement")) == [c, a, b]
    assert sorted([a, b, c], key=lambda e: score(e, "max_abs_diff")) == [a, b, c]
    assert score(figures(agreement=0.6), None) < score(figures(agreement=0.7), None)


@pytest.mark.parametrize("select", ["top5", "agreement", "max_abs_diff"])
def test_the_kept_state_is_the_best_by_the_figure(coarse, data, select):
    told = []
    config = Config(epochs=4, threads=1, select=select)
    result = finetune(coarse, data, config=config, report=told.append)
    scores = [score(e, select) for e in (result.before, *(p.validation for p in told)) if e]

    assert len(scores) == 5
    assert score(result.after, select) == max(scores)
    assert result.best_epoch == scores.index(max(scores))


def test_an_unknown_figure_is_said_before_training(coarse, data):
    told = []
    config = Config(epochs=1, threads=1, select="map50")
    with pytest.raises(TrainingError, match=r"no figure 'map50'.*top1, top5, agreement, max_abs"):
        finetune(coarse, data, config=config, report=told.append)

    assert told == []


def test_the_average_is_kept(coarse, data, monkeypatch):
    """Against a float64 average of what the steps left, of weights and scales."""
    seen, step = [], Updater.step

    def spied(self, *arguments):
        if not seen:
            seen.append({n: v.astype(np.float64) for n, v in self.values.views.items()})
        step(self, *arguments)
        seen.append({n: v.astype(np.float64) for n, v in self.values.views.items()})

    monkeypatch.setattr(Updater, "step", spied)
    config = Config(epochs=1, threads=1, ema=0.9, validation=0.2)
    result = finetune(coarse, data, config=config)
    average = seen[0]
    for values in seen[1:]:
        average = {n: 0.9 * a + 0.1 * values[n] for n, a in average.items()}

    assert result.best_epoch == 1
    assert len(seen) == 17
    found = {n: t.values for n, t in strip(result.model).graph.tensors().items() if n in average}
    found |= {f"{n}/scale": p.scale for n, p in read_params(result.model).items()}
    for name, expected in average.items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-6)
        if expected.size > 100:
            assert np.abs(found[name] - seen[-1][name]).max() > 1e-4


def test_patience_ends_a_run_that_does_not_get_better(coarse, data):
    """A rate this small changes no figure."""
    config = Config(epochs=9, threads=1, lr=1e-9, scale_lr=1e-9, patience=2)
    result = finetune(coarse, data, config=config)

    assert (result.epochs, result.best_epoch) == (2, 0)
    assert result.notes == ("stopped after epoch 2: no better state in the last 2 epochs",)


def test_patience_waits_anew_after_a_better_state(coarse, data):
    told = []
    config = Config(epochs=30, threads=1, patience=3)
    result = finetune(coarse, data, config=config, report=told.append)
    last = [p for p in told if p.validation][-1]

    assert last.epoch == result.epochs == result.best_epoch + 3 < 30
