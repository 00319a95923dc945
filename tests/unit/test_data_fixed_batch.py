"""A model's fixed batch is taken without being asked for, and what fills it does not count."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.data import Batch, InputSpec, open_data
from onnxqat.errors import DataError, TrainingError
from onnxqat.evaluation import evaluate
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from onnxqat.settings import input_specs
from onnxqat.train import Config, finetune
from tests.networks import attention, convnet

SAMPLES = 26


def with_batch(proto, length):
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = length
    return from_proto(proto)


def inserted(model):
    prepared = prepare(model)
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))
    return insert_pairs(prepared, plan, placeholder_params(prepared, plan), state="uncalibrated")


@pytest.fixture(params=[convnet, attention])
def pair(request, tmp_path):
    """Yield a network with a free batch and with one of 4, and data for both."""
    free, fixed = from_proto(request.param()), with_batch(request.param(), 4)
    shape = [d if isinstance(d, int) else SAMPLES for d in free.graph.inputs[0].shape]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    x[-1] *= 3  # the last batch holds the extremes, and would weigh twice in a histogram
    np.savez(tmp_path / "x.npz", input=x, label=rng.integers(0, 3, SAMPLES))
    with (
        open_data(tmp_path / "x.npz", input_specs(free)) as any_size,
        open_data(tmp_path / "x.npz", input_specs(fixed)) as by_four,
    ):
        yield free, any_size, fixed, by_four


def test_repeated_samples_fill_the_last_batch(pair):
    _, any_size, _, by_four = pair
    batches = list(by_four.batches())
    assert [len(batch.inputs["input"]) for batch in batches] == [4] * 7
    assert [len(batch.indices) for batch in batches] == [4] * 6 + [2]
    assert [len(batch.labels) for batch in batches] == [4] * 6 + [2]
    last = batches[-1].inputs["input"]
    np.testing.assert_array_equal(last[2:], last[:2])
    (whole,) = any_size.batches(SAMPLES)
    counting = np.concatenate([b.counting(b.inputs["input"]) for b in batches])
    np.testing.assert_array_equal(counting, whole.inputs["input"])


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_calibration_does_not_count_them(pair, observer):
    free, any_size, fixed, by_four = pair
    expected = calibrate(inserted(free), any_size.batches(SAMPLES), observer=observer, threads=1)
    found = calibrate(inserted(fixed), by_four.batches(), observer=observer, threads=1)
    theirs, ours = expected.params, found.params
    assert theirs.keys() == ours.keys()
    for name, params in theirs.items():
        np.testing.assert_allclose(ours[name].scale, params.scale, rtol=1e-5, err_msg=name)


def test_evaluation_does_not_count_them(pair):
    free, any_size, fixed, by_four = pair
    model, reference = (
        calibrate(inserted(m), d.batches(), observer="minmax", threads=1)
        for m, d in ((free, any_size), (fixed, by_four))
    )
    expected = evaluate(model, any_size.batches(2), against=free, threads=1)
    found = evaluate(reference, by_four.batches(), against=fixed, threads=1)
    assert (found.samples, found.metrics) == (expected.samples, expected.metrics)
    assert (found.reference, found.agreement) == (expected.reference, expected.agreement)
    assert found.max_abs_diff == pytest.approx(expected.max_abs_diff, rel=1e-3)


def test_training_takes_whole_batches_and_usual_steps(pair):
    _, _, fixed, by_four = pair
    model = calibrate(inserted(fixed), by_four.batches(), observer="minmax", threads=1)
    seen = []
    result = finetune(
        model, by_four, config=Config(epochs=2, threads=1), report=lambda p: seen.append(p.steps)
    )
    assert result.after.samples == 4  # held out: a tenth, in whole batches
    assert set(seen) == {2}  # of 22 samples: one step of 16 in each epoch
    few = finetune(model, by_four.subset(np.arange(9)), config=Config(epochs=2, threads=1))
    assert few.after.samples == 4  # and one step of 4 in each epoch


@pytest.mark.parametrize("count", [1, 3, 4])
def test_too_few_samples_to_train_on_are_an_error(pair, count):
    _, _, fixed, by_four = pair
    model = calibrate(inserted(fixed), by_four.batches(), observer="minmax", threads=1)
    with pytest.raises(TrainingError, match=rf"^{count} samples are too few .* Give more data\.$"):
        finetune(model, by_four.subset(np.arange(count)), config=Config(threads=1))


def test_one_sample_is_repeated(pair):
    _, _, fixed, by_four = pair
    one = by_four.subset([7])
    model = calibrate(inserted(fixed), one.batches(), observer="minmax", threads=1)
    assert evaluate(model, one.batches(), against=fixed, threads=1).samples == 1


def test_another_batch_size_is_refused(pair):
    _, _, _, by_four = pair
    assert by_four.batch_size(4) == by_four.batch_size() == 4
    with pytest.raises(DataError, match=r"--batch-size 3: model input 'input' takes batches of 4"):
        by_four.batches(3)


@pytest.mark.parametrize("layout", ["rows", "columns", "groups"])
def test_what_counts_is_found_along_any_axis(layout):
    last = Batch(inputs={}, labels=None, indices=np.arange(2), size=4)
    rows = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)[[0, 1, 0, 1]]
    given, expected = {
        "rows": (rows, rows[:2]),
        "columns": (rows.transpose(1, 0, 2), rows[:2].transpose(1, 0, 2)),
        "groups": (rows.reshape(12, 5), rows[:2].reshape(6, 5)),
    }[layout]
    np.testing.assert_array_equal(last.counting(given), expected)
    other = np.arange(8.0).reshape(4, 2)  # no entry repeats another
    assert last.counting(other) is other


def spec(name, *shape):
    return InputSpec(name=name, shape=shape, dtype="float32")


def test_inputs_of_different_batches_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((8, 3), np.float32), b=np.zeros((8, 2), np.float32))
    with pytest.raises(DataError, match=r"batches of different sizes: 'a' of 4, 'b' of 2"):
        open_data(tmp_path / "x.npz", [spec("a", 4, 3), spec("b", 2, 2)])
    with open_data(tmp_path / "x.npz", [spec("a", "n", 3), spec("b", 2, 2)]) as data:
        assert data.batch_size() == 2
