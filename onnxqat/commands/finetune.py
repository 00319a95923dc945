"""The command ``finetune``: train weights and scales."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_calibration, take_config, take_settings, take_source
from onnxqat.commands.common import (
    figure_rows,
    join,
    listener_of,
    output_rows,
    print_result,
    renamed,
)
from onnxqat.commands.outputs import check_apart, command_line, hold
from onnxqat.commands.signals import noted_signals
from onnxqat.help_text import command, under
from onnxqat.json_values import json_value
from onnxqat.options import (
    calibration_options,
    checkpoint_options,
    data_options,
    device_options,
    force_option,
    json_option,
    keep_epochs_option,
    log_options,
    output_option,
    run_options,
    seed_option,
    teacher_option,
    train_samples_option,
    training_options,
)
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.parallel import Workers
    from onnxqat.quantized import QuantizedModel
    from onnxqat.train import Checkpoints, Finetuned
    from onnxqat.train.epochs import KeptEpochs

__all__ = ["finetune"]


@command(
    example="onnxqat finetune model.qdq.onnx train.npz --epochs 3 --log run.jsonl -o model.qat.onnx"
)
@click.argument("model")
@click.argument("data")
@under("Data")(
    "--val-data",
    metavar="DATA",
    help="Choose the best epoch on this data (default: 10 % of DATA, held out of training).",
)
@teacher_option
@train_samples_option
@training_options
@checkpoint_options
@keep_epochs_option
@log_options
@calibration_options
@data_options
@run_options(16)
@device_options("auto")
@seed_option
@output_option("Write the tuned model here (default: MODEL with .qat before its suffix).")
@force_option
@json_option
def finetune(model: str, data: str, val_data: str | None, teacher: str | None,
             checkpoint_every: dict[str, Any] | None, resume: bool, keep_epochs: int | None,
             log: str | None, tensorboard: str | None, log_every: int,
             output: str | None, force: bool, as_json: bool,
             **options: Any) -> None:  # fmt: skip
    """Fine-tune the weights and scales of a Q/DQ MODEL on DATA; calibrate it first if needed."""
    from onnxqat import verbs
    from onnxqat.files import check_writable

    target = output or renamed(model, "qat")
    workers = join()
    kept = f"{target}.checkpoint"
    check_apart({"output": target, "checkpoint": kept, "log": log, "tensorboard": tensorboard})
    check_writable(target, force=force)
    _check_logs(log, tensorboard, force=force or resume)
    if workers.rank == 0:
        hold(target, kept, log, tensorboard)
    checkpoints = _checkpoints(kept, checkpoint_every, resume, force)
    epochs = _kept_epochs(target, keep_epochs, force=force or resume)
    workers.any(False)  # wait until all processes have checked the files
    logs = verbs.TrainingLogs(path=log, tensorboard=tensorboard, every=log_every)
    settings, source = take_settings(options), take_source(data, options)
    calibration = take_calibration(options)
    with _ending_well(workers, target, force, checkpoints) as stop:
        result = verbs.finetune(
            model,
            source,
            validation=None if val_data is None else _validation(source, val_data),
            teacher=teacher,
            settings=settings,
            config=take_config(options),
            calibration=calibration,
            logs=logs,
            checkpoints=checkpoints,
            epochs=epochs,
            listener=listener_of(workers),
            stop=stop,
            workers=workers,
        )
    if workers.rank == 0:
        _finish(result.model, target, force, checkpoints)
        _print_finetuned(result, target, epochs.files if epochs else (), as_json)
    workers.leave()


def _validation(source: Any, data: str) -> Any:
    """Return the validation data, with the settings of DATA except its size and split."""
    return replace(source, source=data, samples=None, split=None)


def _kept_epochs(target: str, count: int | None, *, force: bool) -> KeptEpochs | None:
    from onnxqat.train.epochs import KeptEpochs

    return None if count is None else KeptEpochs(target, count, force=force)


@contextmanager
def _ending_well(
    workers: Workers, target: str, force: bool, checkpoints: Checkpoints | None
) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether to stop; end the command on a stop or divergence."""
    from onnxqat.train import DivergedError, StoppedError

    with noted_signals() as received:
        try:
            yield lambda: bool(received)
        except StoppedError as error:
            if workers.rank == 0:
                say(str(error), err=True)
            workers.leave()
            number = received[0] if received else signal.SIGINT  # another worker got the signal
            click.get_current_context().exit(128 + number)
        except DivergedError as error:
            if workers.rank == 0:
                _finish(error.outcome.model, target, force, checkpoints)
            raise click.ClickException(f"{error} Written to {target}.") from error


def _checkpoints(
    path: str, every: dict[str, Any] | None, resume: bool, force: bool
) -> Checkpoints | None:
    """Return the checkpoints; refuse to overwrite those of an interrupted run."""
    from onnxqat.errors import TrainingError
    from onnxqat.files import check_writable
    from onnxqat.train import Checkpoints

    if resume:
        return Checkpoints(path, **(every or {}), resume=True, elsewhere=force)
    if Path(path).is_file() and not force:
        raise TrainingError(
            f"{path}: is left from an interrupted run. Pass --resume to continue it, or --force to "
            "start again."
        )
    check_writable(path, force=force)
    return None if every is None else Checkpoints(path, **every)


def _check_logs(log: str | None, tensorboard: str | None, *, force: bool) -> None:
    """Raise early if a log could not be written."""
    from onnxqat.files import check_writable
    from onnxqat.train import check_event_folder

    if log:
        check_writable(log, force=force)
    if tensorboard:
        check_event_folder(tensorboard, force=force)


def _finish(
    model: QuantizedModel, target: str, force: bool, checkpoints: Checkpoints | None
) -> None:
    """Write the result, then remove the checkpoint."""
    from onnxqat.errors import OnnxQatError

    try:
        model.save(target, force=force)
    except OnnxQatError as error:
        raise OnnxQatError(f"{error} {_kept(model, target, checkpoints)}") from error
    if checkpoints:
        checkpoints.remove()


def _kept(model: QuantizedModel, target: str, checkpoints: Checkpoints | None) -> str:
    """Save a result elsewhere that could not be written to its place; return where it is."""
    from onnxqat.errors import OnnxQatError

    options = ("--resume", "--force") if Path(target).exists() else ("--resume",)
    again = f"with: {command_line(*options)}"
    if checkpoints and checkpoints.finished and checkpoints.path.is_file():
        return f"The finished training is kept in {checkpoints.path}. Write the result {again}"
    try:
        place = Path(tempfile.mkdtemp(prefix="result-of-onnxqat-")) / Path(target).name
        model.save(place)
        kept = f"The result is kept in {place}. Move it to where you want it"
    except (OSError, OnnxQatError) as error:
        kept = f"The result could not be kept elsewhere either ({error})"
    if checkpoints and checkpoints.written and checkpoints.path.is_file():
        return f"{kept}, or continue from the last checkpoint {again}"
    return f"{kept}."


def _print_finetuned(
    result: Finetuned, target: str, epochs: tuple[str, ...], as_json: bool
) -> None:
    from dataclasses import asdict

    from msgspec import to_builtins

    def figures(evaluation: Any) -> dict[str, float | None]:
        others = {} if evaluation.agreement is None else {"agreement": evaluation.agreement}
        found: dict[str, float | None] = json_value(
            evaluation.metrics | others | evaluation.metrics
        )
        return found

    before, after = figures(result.before), figures(result.after)
    losses = {"before": result.before.loss, "after": result.after.loss}
    document = {
        "schema": "onnxqat.finetune/1",
        "before": before,
        "after": after,
        "loss": losses if result.after.loss is not None else None,
        "learned_from": [asdict(part) for part in result.parts],
        "chosen_by": asdict(result.selection),
        "kept": result.kept,
        "blocks": [to_builtins(block) for block in result.blocks],
        "outputs": {
            "before": json_value(result.before.outputs),
            "after": json_value(result.after.outputs),
        },
        "samples": result.after.samples,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 1),
        "waiting_for_data": result.waiting,
        "samples_per_second": result.samples_per_second,
        "device": result.device,
        "notes": list(result.notes),
        "epoch_files": list(epochs),
        "output": target,
    }
    rows: list[tuple[str, Any]] = [
        (f"{k} before", v) for k, v in figure_rows(result.before.metrics)
    ]
    rows += [(f"{k} after", v) for k, v in figure_rows(result.after.metrics)]
    rows += [(f"{name} before", text) for name, text in output_rows(result.before)]
    rows += [(f"{name} after", text) for name, text in output_rows(result.after)]
    rows += [(f"loss {when}", f"{v:.6g}") for when, v in losses.items() if v is not None]
    rows += [
        ("held-out samples", result.after.samples),
        *_rows_of_training(result),
        ("kept", f"{result.kept}, chosen by {result.selection.figure}"),
        ("seconds", document["seconds"]),
        *_waiting_row(result),
        *_rows_of_pace(result),
        *(("note", note) for note in result.notes),
        *(("epoch file", path) for path in epochs),
        ("output", target),
    ]
    print_result(document, as_json, rows)


def _waiting_row(result: Finetuned) -> list[tuple[str, Any]]:
    if result.waiting is None:
        return []
    return [("waiting for data", f"{100 * result.waiting:.0f} % of the time of the steps")]


def _rows_of_pace(result: Finetuned) -> list[tuple[str, Any]]:
    """Return where the steps ran, and how fast."""
    if result.samples_per_second is None:
        return []
    return [("speed", f"{result.samples_per_second:.4g} samples a second on {result.device}")]


def _rows_of_training(result: Finetuned) -> list[tuple[str, Any]]:
    """Return rows about the training of blocks and of the whole network."""
    rows: list[tuple[str, Any]] = []
    if result.blocks:
        kept = sum(block.kept for block in result.blocks)
        rows.append(("blocks", f"{len(result.blocks)} trained, {kept} improved"))
    if result.epochs or not result.blocks:
        rows.append(("epochs", f"{result.epochs}, best {result.best_epoch}"))
    return rows
