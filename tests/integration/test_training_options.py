"""What `finetune` takes besides data, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from onnxqat.quantized import load_model
from tests.digits import write_digits
from tests.networks import detector, samples
from tests.oracles import run_ort

MODELS = Path(__file__).parents[2] / "models"
NORM = ("--mean", 128, "--scale", 0.0078125)
ALL = (
    *("--accumulate", 2, "--schedule", "one-cycle", "--warmup", 0.2, "--optimizer", "sgd"),
    *("--lr", 1e-4, "--nesterov", "--weight-decay", 1e-4, "--clip-norm", 5, "--clip-value", 1),
    *("--group", "bias.lr=1e-5", "--group", "name:.*conv.*.freeze_from=3", "--ema", 0.5),
    *("--select", "agreement", "--patience", 2, "--augment", "crop"),
)


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_digits(folder / "train.npz", 200)
    words = ("--rules", "sophgo-bm1684x", "--set", "weight.bits=2", *NORM)
    source = ("--data", folder / "train.npz", "-o", folder / "qdq.onnx")
    result = invoke("insert", MODELS / "lenet5.onnx", *words, *source)
    assert result.exit_code == 0, result.output
    return folder


def finetune(work, output, *words) -> Any:
    fixed = ("--epochs", 2, "--threads", 1, "-o", output)
    return invoke("finetune", work / "qdq.onnx", work / "train.npz", *fixed, *words)


def test_all_options_together_train_and_log(work, tmp_path):
    log = tmp_path / "log.jsonl"
    result = finetune(work, tmp_path / "a.onnx", *ALL, "--log", log, "--log-every", 4, "--json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["epochs"] == 2
    # 180 samples are 5 steps of twice 16
    assert [(x["event"], x.get("step")) for x in lines[1:]] == [
        ("step", 4),
        ("epoch", 5),
        ("step", 8),
        ("epoch", 10),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "log.jsonl"]


def test_a_preset_lies_under_the_options(work, tmp_path):
    def rates(*words):
        log = tmp_path / "log.jsonl"
        output = tmp_path / "a.onnx"
        more = ("--log", log, "--log-every", 1, "--force", *words)
        result = finetune(work, output, "--preset", "horizon", *more)
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line["lr"] for line in lines if line["event"] == "step"]

    # by default 22 steps: two that only measure, a warm-up of one, decays at 10 and 15 of 20
    alone = rates()
    assert alone[:2] == [0, 0]
    assert [alone[i] for i in (2, 11, 12, 16, 17, 21)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    )
    assert rates("--lr", 1e-4, "--schedule", "constant")[2:] == [1e-4] * 20


@pytest.mark.parametrize("method", ["lsq+", "pact", "dsq", "moving-average"])
def test_a_file_of_every_method_comes_back_from_its_table(work, tmp_path, method):
    qdq, tuned, again = (tmp_path / f"{name}.onnx" for name in ("qdq", "tuned", "again"))
    rule = ("--rules", "onnxruntime-cpu", "--set", "weight.bits=4", "--set", "activation.bits=4")
    data = ("--data", work / "train.npz", *NORM)
    words = ("--epochs", 2, "--method", method, "--quant-delay", 3, "--select", "loss")

    def run(*words):
        result = invoke(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    run("insert", MODELS / "lenet5.onnx", *rule, *data, "-o", qdq)
    assert run("finetune", qdq, work / "train.npz", *words, "-o", tuned)["best_epoch"] > 0
    files = run("strip", tuned, "--format", "onnxqat", "-o", tmp_path / "chip")["files"]
    table = (files["table"], files["model"], "--format", "onnxqat")
    run("import-table", *table, *rule, "-o", again)

    against = ("--against", tuned, *NORM)
    assert run("evaluate", again, work / "train.npz", *against)["max_abs_diff"] == 0


def test_event_files_and_a_log_come_of_a_run(work, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log, board = tmp_path / "log.jsonl", tmp_path / "board"
    words = ("--log", log, "--tensorboard", board, "--log-every", 3)
    assert finetune(work, tmp_path / "a.onnx", *words).exit_code == 0
    again = finetune(work, tmp_path / "b.onnx", *words)
    forced = finetune(work, tmp_path / "a.onnx", *words, "--force")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    reader = EventAccumulator(str(board)).Reload()

    assert (again.exit_code, forced.exit_code) == (1, 0)
    assert lines[-1]["step"] == 22
    assert [(e.step, e.value) for e in reader.Scalars("lr")] == [
        (x["step"], float(np.float32(x["lr"]))) for x in lines if x["event"] == "step"
    ]
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == ["a.onnx", "board", "log.jsonl"]


def test_frozen_weights_are_in_the_result_as_they_were(work, tmp_path):
    group = ("--group", "weight.freeze=true", "--group", "bias.freeze=true")
    words = (*group, "--val-data", work / "train.npz", "--scale-lr", 0.01)
    result = finetune(work, tmp_path / "a.onnx", *words)
    before, after = load_model(work / "qdq.onnx"), load_model(tmp_path / "a.onnx")
    assert result.exit_code == 0, result.output

    moved = [name for name, p in after.params.items() if not p.same_as(before.params[name])]
    assert moved
    tensors = [m.floats.graph.tensors() for m in (before, after)]
    for name, tensor in tensors[0].items():
        if hasattr(tensor, "values"):
            np.testing.assert_array_equal(tensor.values, tensors[1][name].values)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--group", "wight.lr=1"), 1, "unknown selector 'wight'"),
        (("--select", "top9"), 1, "no figure 'top9'"),
        (("--schedule", "linear"), 2, "'linear' is not one of"),
        (("--ema", 1), 2, "1.0 is not in the range"),
        (("--checkpoint-every", "5"), 2, "'5' is not an interval such as 200steps"),
        (("--checkpoint-every", "0steps"), 2, "'0steps' is not an interval"),
        (("--resume",), 1, "no such file. Leave out --resume to start"),
        (("--log", "{folder}/none/log"), 1, "directory '{folder}/none' does not exist"),
        (("--quant-delay", 99), 1, "--quant-delay 99: the run has only 22 steps"),
        (("--preset", "nobody"), 2, "No preset 'nobody'. Use one of horizon."),
        (("--accumulate", 99), 1, "too few for 99 batches of 16"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(work, tmp_path, words, code, message):
    words = [str(word).format(folder=tmp_path) for word in words]
    result = finetune(work, tmp_path / "a.onnx", *words)

    assert result.exit_code == code
    assert message.format(folder=tmp_path) in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_file_trains_a_detector_from_the_float_model_on(tmp_path):
    network, x = detector(), samples(detector(), 64)
    (grid,) = run_ort(network, {"input": x})
    onnx.save(network, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", input=x, labels=grid[:, 1:])  # boxes, and no classes
    header = '<ir_version: 8, opset_import: ["" : 17]> '
    text = (
        "loss (float[N, 5, 4, 4] output, float[N, 4, 4, 4] labels) => (float value) "
        "<int64[1] one = {1}, int64[1] end = {5}> { found = Slice(output, one, end, one) "
        "d = Sub(found, labels)  s = Mul(d, d)  value = ReduceMean <keepdims = 0> (s) }"
    )
    onnx.save(onnx.parser.parse_model(header + text), tmp_path / "loss.onnx")
    data, qdq, tuned = (tmp_path / name for name in ("data.npz", "qdq.onnx", "tuned.onnx"))
    words = ("--rules", "sophgo-bm1684x", "--set", "weight.bits=4", "-o", qdq)
    assert invoke("insert", tmp_path / "net.onnx", *words).exit_code == 0
    training = ("finetune", qdq, data, "--epochs", 2, "--threads", 1, "-o", tuned)
    with_labels = invoke(*training, "--loss", tmp_path / "loss.onnx")
    result = invoke(*training, "--loss", f"2*{tmp_path / 'loss.onnx'}", "--label", "none")

    assert with_labels.exit_code == 1
    assert "or name other labels with --label, or none." in with_labels.output
    assert result.exit_code == 0, result.output
    assert load_model(tuned).state == "finetuned"


def test_errors_of_a_loss_name_what_is_wrong(work, tmp_path):
    for loss, message in (
        ("kl+0.5*entropy", "Unknown loss 'entropy' at character 4"),
        ("kl:outputs", "the model has no output 'outputs'"),
        ("mse=image", "the data have no array 'image'. The nearest: 'images'."),
        ("missing.onnx", "missing.onnx: no such file."),
    ):
        result = finetune(work, tmp_path / "a.onnx", "--loss", loss)
        assert result.exit_code == 1
        assert message in result.output
    result = finetune(work, tmp_path / "a.onnx", "--label-smoothing", 1)
    assert result.exit_code == 2
