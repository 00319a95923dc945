"""Which state is kept: by a figure, of the values or their average, and when it is enough."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.evaluation import Evaluation
from onnxqat.outputs import Output, Scores
from onnxqat.train import Config, finetune
from onnxqat.train.monitoring.verdict import verdict
from onnxqat.train.optimization.updater import Updater
from onnxqat.train.selection import Selection, score, selection_of
from tests.digits import calibrated_lenet, training_digits


@pytest.fixture(scope="module")
def data():
    with training_digits(320) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(data):
    return calibrated_lenet(data, "weight.bits=2")


def figures(**metrics) -> Evaluation:
    others = {n: metrics.pop(n) for n in ("agreement", "max_abs_diff", "loss") if n in metrics}
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
    found = {n: t.values for n, t in result.model.floats.graph.tensors().items() if n in average}
    found |= {f"{n}/scale": p.scale for n, p in result.model.params.items()}
    for name, expected in average.items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-6)
        if expected.size > 100:
            assert np.abs(found[name] - seen[-1][name]).max() > 1e-4


def test_patience_ends_a_run_that_does_not_get_better(coarse, data):
    """A rate this small changes no figure."""
    config = Config(epochs=9, threads=1, lr=1e-9, scale_lr=1e-9, patience=2)
    result = finetune(coarse, data, config=config)

    assert (result.epochs, result.best_epoch) == (2, 0)
    stopped, kept = result.notes
    assert stopped == "stopped after epoch 2: no better state in the last 2 epochs"
    assert kept.startswith(
        "the start was kept, and OUT contains its parameters: no epoch had a better loss"
    )
    assert result.model is coarse
    assert result.after == result.before


def test_patience_waits_anew_after_a_better_state(coarse, data):
    told = []
    config = Config(epochs=30, threads=1, patience=3, select="top1")
    result = finetune(coarse, data, config=config, report=told.append)
    last = [p for p in told if p.validation][-1]

    assert last.epoch == result.epochs == result.best_epoch + 3 < 30


# --- what chooses where the user does not say --------------------------------------------------

CLASSES = Output(name="y", learned=True, shape=("N", 5), scores=Scores(kind="logits", axis=1))
BOXES = Output(name="boxes", learned=True, shape=("N", 9, 320), scores=None)


def select(*outputs, held_out=1000, labelled=False, own_loss=False):
    return selection_of(outputs, labelled=labelled, own_loss=own_loss, held_out=held_out)


def test_what_states_are_told_apart_by():
    assert select(CLASSES).figure == "agreement"
    assert select(CLASSES, BOXES, labelled=True).figure == "top1"
    assert select(CLASSES, labelled=True, own_loss=True).figure == "loss"
    assert select(BOXES).figure == select(CLASSES, CLASSES).figure == "loss"


@pytest.mark.parametrize("labelled", [True, False])
def test_few_samples_cannot_tell_shares_apart(labelled):
    """The largest standard error of a share, at one half, is two points of 625 samples."""
    error = np.sqrt(0.5 * 0.5 / np.array([624, 625]))

    assert error[0] > 0.02 >= error[1]
    assert select(CLASSES, held_out=625, labelled=labelled).figure != "loss"
    assert select(CLASSES, held_out=624, labelled=labelled).figure == "loss"
    assert "100 held-out samples are too few" in select(CLASSES, held_out=100).reason
    assert "up to 5.0 points" in select(CLASSES, held_out=100).reason


# --- what is said about the choice --------------------------------------------------------------

BY_LOSS = Selection(figure="loss", reason="few samples")
START = figures(agreement=0.9, loss=0.2)


def test_a_kept_start_is_said_with_the_numbers():
    tried = [(1, figures(agreement=0.85, loss=0.4)), (2, figures(agreement=0.88, loss=0.3))]

    (note,) = verdict(START, tried, 0, BY_LOSS)
    assert note == (
        "the start was kept, and OUT contains its parameters: no epoch had a better loss; the best "
        "epoch was 2 (agreement 90.00 % at the start, 88.00 % after epoch 2; loss 0.2 at the "
        "start, 0.3 after epoch 2)"
    )
    assert "no epoch was completed" in verdict(START, [], 0, BY_LOSS)[0]


def test_a_disagreement_is_said_with_both_choices():
    tried = [(1, figures(agreement=0.95, loss=0.19)), (2, figures(agreement=0.94, loss=0.1))]

    (note,) = verdict(START, tried, 2, BY_LOSS)
    assert note == (
        "loss and agreement disagree: the loss is lowest at epoch 2 (loss 0.1, agreement 94.00 %), "
        "agreement highest at epoch 1 (loss 0.19, agreement 95.00 %); the state is chosen by loss: "
        "few samples"
    )
    assert verdict(START, [(1, figures(agreement=0.95, loss=0.1))], 1, BY_LOSS) == ()
    assert verdict(START, [(1, figures(agreement=0.9, loss=0.1))], 1, BY_LOSS) == ()
