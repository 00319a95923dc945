"""Models that no built-in default fits are fine-tuned with losses of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import DataError, TrainingError
from onnxqat.train import Checkpoints, Config, StoppedError, finetune
from tests.networks import answering, detector, quantized, samples
from tests.oracles import run_ort

W4A8 = ("weight.bits=4",)
FAST = {"epochs": 10, "batch_size": 16, "threads": 1}
DETECTION = """
<ir_version: 8, opset_import: ["" : 17]>
loss (float[N, 5, 4, 4] output, float[N, 1, 4, 4] objectness, float[N, 4, 4, 4] boxes)
  => (float value)
<int64[2] sizes = {1, 4}, float half = {0.5}, float one = {1}, float five = {5}>
{
  logit, found = Split <axis = 1> (output, sizes)
  soft = Softplus(logit)
  hit = Mul(logit, objectness)
  terms = Sub(soft, hit)
  bce = ReduceMean <keepdims = 0> (terms)
  difference = Sub(found, boxes)
  d = Abs(difference)
  is_near = Less(d, one)
  square = Mul(d, d)
  bowl = Mul(half, square)
  line = Sub(d, half)
  each = Where(is_near, bowl, line)
  counted = Mul(each, objectness)
  mean = ReduceMean <keepdims = 0> (counted)
  weighted = Mul(five, mean)
  value = Add(bce, weighted)
}
"""


class Task:
    """A network, its quantized form, samples with what the float network says, and unseen ones."""

    def __init__(self, folder: Path, network: onnx.ModelProto, overrides=W4A8) -> None:
        self.network = network
        _, self.quantized = quantized(network, overrides=overrides)
        self.x, self.unseen = samples(network, 640, seed=5), samples(network, 200, seed=6)
        self.outputs = run_ort(network, {"input": self.x})
        self.path = folder / "data.npz"

    def save(self, **arrays):
        np.savez(self.path, input=self.x, **arrays)

    def open(self, label=None):
        shape = ("N", *self.x.shape[1:])
        spec = InputSpec(name="input", shape=shape, dtype="float32")
        return open_data(self.path, [spec], label=label)

    def distance(self, model) -> float:
        """Return the mean squared distance from the float network on unseen samples."""
        pairs = zip(
            run_ort(model.to_proto(), {"input": self.unseen}),
            run_ort(self.network, {"input": self.unseen}),
            strict=True,
        )
        return float(np.mean([np.square(a - b).mean() for a, b in pairs]))

    def tuned(self, config, label=None, **others):
        losses: list[float] = []
        with self.open(label) as data:
            result = finetune(
                self.quantized,
                data,
                config=config,
                report=lambda p: None if p.validation else losses.append(p.loss),
                **others,
            )
        return result, losses


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    task = Task(folder, detector())
    (grid,) = task.outputs
    found = 1 / (1 + np.exp(-grid[:, :1]))  # what a float detector learned, as soft targets
    # 'labels' of another kind than classes lie beside it
    task.save(objectness=found, boxes=grid[:, 1:].astype(np.float64), labels=grid[:, 0, 0])
    onnx.save(onnx.parser.parse_model(DETECTION), folder / "detection.onnx")
    return task


def loss_file(task) -> str:
    return str(task.path.with_name("detection.onnx"))


def test_a_detector_learns_by_a_loss_file(detection):
    config = Config(**FAST, loss=loss_file(detection))
    result, losses = detection.tuned(config, label="none")

    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    assert result.after.loss < result.before.loss
    assert detection.distance(result.model) < 0.7 * detection.distance(detection.quantized)


def test_labels_that_are_no_classes_need_a_word(detection):
    with pytest.raises(DataError, match=r"name other labels with --label, or none\."):
        detection.open()


def test_images_are_not_moved_without_their_boxes(detection):
    config = Config(**FAST, loss=loss_file(detection), augment=("flip",))
    with pytest.raises(
        TrainingError, match="--augment changes the images, but not the array 'boxes'"
    ):
        detection.tuned(config, label="none")


def test_a_run_does_not_go_on_with_another_loss_in_the_file(detection, tmp_path):
    path = tmp_path / "loss.onnx"
    path.write_bytes(Path(loss_file(detection)).read_bytes())
    config = Config(**FAST, loss=str(path))
    told = iter(range(100))
    with pytest.raises(StoppedError):
        detection.tuned(
            config,
            label="none",
            checkpoints=Checkpoints(tmp_path / "c"),
            stop=lambda: next(told) > 20,
        )
    changed = onnx.parser.parse_model(DETECTION.replace("five = {5}", "five = {6}"))
    onnx.save(changed, path)
    with pytest.raises(TrainingError, match=r"the loss '.*loss\.onnx' was"):
        detection.tuned(config, label="none", checkpoints=Checkpoints(tmp_path / "c", resume=True))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    task = Task(tmp_path_factory.mktemp("answers"), answering())
    start, end = task.outputs
    task.save(starts=start.argmax(1), ends=end.argmax(1).astype(np.int32))
    return task


QA = "cross-entropy:output=starts+cross-entropy:end=ends"


def test_labels_of_where_answers_start_and_end(answers):
    result, losses = answers.tuned(Config(**FAST, loss=QA))

    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    assert result.after.agreement > result.before.agreement


@pytest.mark.parametrize(
    "loss",
    [
        "kl:output+kl:end",
        "smooth-l1",
        "0.5*mse+mse:tensor/t1+1e-3*l1:tensor/w2",
        "l1:end+l1:output",
    ],
)
def test_question_answering(answers, loss):
    result, losses = answers.tuned(Config(**FAST, loss=loss))

    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    assert answers.distance(result.model) < 0.7 * answers.distance(answers.quantized)


def test_the_best_state_is_chosen_by_the_held_out_loss(answers):
    config = Config(**FAST, loss="2*mse:end+l1:tensor/output", select="loss")
    with answers.open() as held_out:
        validation = held_out.subset(np.arange(70))  # four batches are full
        result, _ = answers.tuned(config, validation=validation)
    seen = {"input": answers.x[:64]}

    def loss(model):
        pairs = zip(run_ort(model.to_proto(), seen), run_ort(answers.network, seen), strict=True)
        (start, end) = (a.astype(np.float64) - b for a, b in pairs)
        return float(2 * np.square(end).mean() + np.abs(start).mean())

    assert result.before.loss == pytest.approx(loss(answers.quantized), rel=1e-5)
    assert result.after.loss == pytest.approx(loss(result.model), rel=1e-5)
    assert result.after.loss < 0.8 * result.before.loss


def test_weights_may_be_kept_near_and_states_chosen_by_it(answers):
    """A bias, which has no Q/DQ pair, is an input of the training and a constant of the file."""
    config = Config(**FAST, loss="mse+0.1*l1:tensor/b2+0.1*l1:tensor/w2", select="loss")
    result, _ = answers.tuned(config)

    assert result.after.loss < result.before.loss


def test_held_out_data_need_what_the_loss_reads(answers, tmp_path):
    np.savez(tmp_path / "less.npz", input=answers.x[:32])
    spec = InputSpec(name="input", shape=("N", *answers.x.shape[1:]), dtype="float32")
    with (
        open_data(tmp_path / "less.npz", [spec]) as less,
        pytest.raises(DataError, match=r"less\.npz: no array 'ends'\. It has 'input'\."),
    ):
        answers.tuned(Config(**FAST, loss=QA, select="loss"), validation=less)


def test_only_what_is_read_learns(answers):
    """Of the two heads, which one Split divides, the loss reads the second."""
    result, _ = answers.tuned(Config(**FAST, loss="mse:end"))
    unseen = {"input": answers.unseen}
    wanted = run_ort(answers.network, unseen)[1]
    before, after = (
        np.square(run_ort(model.to_proto(), unseen)[1] - wanted).mean()
        for model in (answers.quantized, result.model)
    )

    assert result.best_epoch > 0
    assert after < 0.7 * before


def test_a_label_beyond_the_classes_of_an_array(answers, tmp_path):
    task = Task(tmp_path, answering())
    starts = answers.outputs[0].argmax(1)
    starts[7] = 12
    task.save(starts=starts)
    config = Config(**FAST, loss="cross-entropy:output=starts")
    with pytest.raises(DataError, match="A label is 12, but the model has 12 classes, 0 to 11"):
        task.tuned(config)
    result, _ = task.tuned(Config(**FAST, loss=config.loss, ignore_index=12))
    assert result.epochs == 10


def test_a_tensor_that_the_teacher_lacks(answers):
    renamed = answering()
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "renamed" if name == "t1" else name
    floats, _ = quantized(renamed)
    with pytest.raises(TrainingError, match="the teacher has no tensor 't1'"):
        answers.tuned(Config(**FAST, loss="mse:tensor/t1"), teacher=floats)
