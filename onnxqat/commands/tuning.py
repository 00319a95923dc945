"""The command that trains: finetune."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import (
    calibrated,
    join,
    load_quantized,
    open_for,
    output_documents,
    output_rows,
    percentages,
    print_result,
    renamed,
    take_settings,
    warn_if_unlike_training,
)
from onnxqat.commands.outputs import check_apart, command_line, hold
from onnxqat.commands.signals import noted_signals
from onnxqat.options import (
    calibration_options,
    checkpoint_options,
    data_options,
    force_option,
    json_option,
    log_options,
    output_option,
    run_options,
    seed_option,
    training_options,
)
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.model import Model
    from onnxqat.quantized import QuantizedModel
    from onnxqat.settings import Settings
    from onnxqat.train import Checkpoints, Config, Finetuned, Workers

__all__ = ["finetune"]


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("--val-data", help="Chooses the best state; 10 % of DATA by default.")
@click.option("--teacher", help="Float model to distil from; MODEL itself by default.")
@training_options
@checkpoint_options
@log_options
@calibration_options
@data_options
@run_options(16)
@seed_option
@output_option("MODEL with .qat before its suffix by default.")
@force_option
@json_option
def finetune(model: str, data: str, val_data: str | None, teacher: str | None,
             checkpoint_every: dict[str, Any] | None, resume: bool,
             log: str | None, tensorboard: str | None, log_every: int,
             output: str | None, force: bool, as_json: bool,
             **options: Any) -> None:  # fmt: skip
    """Fine-tune the weights and scales of a Q/DQ MODEL on DATA; calibrates first if needed."""
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
    workers.any(False)  # all have looked before one writes
    loaded = load_quantized(model)
    taught_by = _teacher(teacher, loaded) if teacher else None
    given = take_settings(options)
    reading = {name: options.pop(name) for name in ("layout", "skip_broken")}
    calibration = {name: options.pop(name) for name in ("observer", "samples")}
    config = _config(options)
    compare = loaded.state != "uncalibrated"  # calibration does it else
    if not compare:
        shared = {name: getattr(config, name) for name in ("batch_size", "seed", "threads")}
        shared |= {**calibration, **reading, "default_size": config.samples}
        loaded, _ = calibrated(loaded, data, given, workers=workers, **shared)
    logging = {"path": log, "tensorboard": tensorboard, "every": log_every, "resume": resume}
    with _ending_well(workers, target, force, checkpoints) as stop:
        result = _tuned(
            loaded, data, val_data, given, reading, logging=logging, teacher=taught_by,
            config=config, checkpoints=checkpoints, stop=stop, workers=workers, compare=compare,
        )  # fmt: skip
    if workers.rank == 0:
        _finish(result.model, target, force, checkpoints)
        _print_finetuned(result, target, as_json)
    workers.leave()


@contextmanager
def _ending_well(
    workers: Workers, target: str, force: bool, checkpoints: Checkpoints | None
) -> Iterator[Callable[[], bool]]:
    """Yield what says whether to stop; turn a stop or a diverged loss into the command's end."""
    from onnxqat.train import DivergedError, StoppedError

    with noted_signals() as received:
        try:
            yield lambda: bool(received)
        except StoppedError as error:
            if workers.rank == 0:
                say(str(error), err=True)
            workers.leave()
            number = received[0] if received else signal.SIGINT  # another worker's
            click.get_current_context().exit(128 + number)
        except DivergedError as error:
            if workers.rank == 0:
                _finish(error.best, target, force, checkpoints)
            raise click.ClickException(f"{error} Written to {target}.") from error


def _checkpoints(
    path: str, every: dict[str, Any] | None, resume: bool, force: bool
) -> Checkpoints | None:
    """Return where to save the state, after refusing what could be a mistake."""
    from onnxqat.errors import TrainingError
    from onnxqat.files import check_writable
    from onnxqat.train import Checkpoints

    if resume:
        return Checkpoints(path, **(every or {}), resume=True)
    if Path(path).is_file() and not force:
        raise TrainingError(
            f"{path}: a run was interrupted. Pass --resume to go on, or --force to start again."
        )
    check_writable(path, force=force)
    return None if every is None else Checkpoints(path, **every)


def _check_logs(log: str | None, tensorboard: str | None, *, force: bool) -> None:
    """Refuse logs that could not be written."""
    from onnxqat.files import check_writable
    from onnxqat.train import check_event_folder

    if log:
        check_writable(log, force=force)
    if tensorboard:
        check_event_folder(tensorboard, force=force)


def _finish(
    model: QuantizedModel, target: str, force: bool, checkpoints: Checkpoints | None
) -> None:
    """Write the result; only then is the checkpoint not needed any more."""
    from onnxqat.errors import OnnxQatError

    try:
        model.save(target, force=force)
    except OnnxQatError as error:
        raise OnnxQatError(f"{error} {_kept(model, target, checkpoints)}") from error
    if checkpoints:
        checkpoints.remove()


def _kept(model: QuantizedModel, target: str, checkpoints: Checkpoints | None) -> str:
    """Say where a result is that could not be written to its place."""
    from onnxqat.errors import OnnxQatError

    options = ("--resume", "--force") if Path(target).exists() else ("--resume",)
    again = f"with: {command_line(*options)}"
    if checkpoints and checkpoints.finished and checkpoints.path.is_file():
        return f"The finished training is kept in {checkpoints.path}. Then write it {again}"
    try:
        place = Path(tempfile.mkdtemp(prefix="result-of-onnxqat-")) / Path(target).name
        model.save(place)
        kept = f"The result is kept in {place}. Move it to where you want it"
    except (OSError, OnnxQatError) as error:
        kept = f"Nor could the result be kept elsewhere ({error})"
    if checkpoints and checkpoints.written and checkpoints.path.is_file():
        return f"{kept}, or go on from the last checkpoint {again}"
    return f"{kept}."


def _teacher(path: str, student: QuantizedModel) -> Model:
    """Load and prepare the float model that teaches."""
    from onnxqat.errors import ModelError
    from onnxqat.evaluation import check_interface
    from onnxqat.preparation import prepare
    from onnxqat.quantized import QuantizedModel, load_model

    teacher = load_model(path)
    if isinstance(teacher, QuantizedModel):
        raise ModelError(f"{path}: holds Q/DQ pairs. Give a float model as --teacher.")
    check_interface(student, teacher, output_names=True)
    return prepare(teacher)


def _config(options: dict[str, Any]) -> Config:
    """Return the hyper-parameters: defaults where an option was not given."""
    from onnxqat.train import Config

    return Config(**{name: value for name, value in options.items() if value is not None})


def _tuned(model: QuantizedModel, data: str, val_data: str | None, given: Settings,
           reading: dict[str, Any], *,
           logging: dict[str, Any], config: Config, workers: Workers, compare: bool,
           **others: Any) -> Finetuned:  # fmt: skip
    """Open the data and fine-tune on them."""
    from onnxqat.progress import FinetuneReport
    from onnxqat.train import TrainingLog
    from onnxqat.train import finetune as run

    def opened(source: str) -> Any:
        return open_for(model, source, given, beside=others["teacher"], **reading)

    reports: list[Callable[[Any], None]] = []
    with ExitStack() as stack:
        training = stack.enter_context(opened(data))
        validation = stack.enter_context(opened(val_data)) if val_data else None
        if compare and workers.rank == 0:
            warn_if_unlike_training(
                model, training, data, batch_size=config.batch_size, threads=config.threads
            )
        if workers.rank == 0:
            shown = stack.enter_context(FinetuneReport())
            reports.append(shown)
            others |= {"stage": shown.stage, "say": shown.say}
        if workers.rank == 0 and (logging["path"] or logging["tensorboard"]):
            shown = validation or training
            size = shown.batch_size(config.batch_size, default=config.samples)
            batch = next(iter(shown.batches(size))).inputs
            log = TrainingLog(start=model, batch=batch, threads=config.threads, **logging)
            reports.append(stack.enter_context(log))
        others["report"] = lambda progress: [report(progress) for report in reports]
        return run(model, training, validation=validation, config=config, workers=workers, **others)


def _print_finetuned(result: Finetuned, target: str, as_json: bool) -> None:
    from dataclasses import asdict

    def figures(evaluation: Any) -> dict[str, float]:
        found = {**evaluation.metrics, "agreement": evaluation.agreement}
        return {name: value for name, value in found.items() if value is not None}

    before, after = figures(result.before), figures(result.after)
    losses = {"before": result.before.loss, "after": result.after.loss}
    kept = f"epoch {result.best_epoch}" if result.best_epoch else "start"
    document = {
        "schema": "onnxqat.finetune/1",
        "before": before,
        "after": after,
        "loss": losses if result.after.loss is not None else None,
        "learned_from": [asdict(part) for part in result.parts],
        "chosen_by": asdict(result.selection),
        "kept": kept,
        "outputs": {
            "before": output_documents(result.before),
            "after": output_documents(result.after),
        },
        "samples": result.after.samples,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 1),
        "notes": list(result.notes),
        "output": target,
    }
    rows: list[tuple[str, Any]] = [
        (f"{k} before", v) for k, v in percentages(result.before.metrics)
    ]
    rows += [(f"{k} after", v) for k, v in percentages(result.after.metrics)]
    rows += [(f"{name} before", text) for name, text in output_rows(result.before)]
    rows += [(f"{name} after", text) for name, text in output_rows(result.after)]
    rows += [(f"loss {when}", f"{v:.6g}") for when, v in losses.items() if v is not None]
    rows += [
        ("held-out samples", result.after.samples),
        ("epochs", f"{result.epochs}, best {result.best_epoch}"),
        ("kept", f"{kept}, chosen by {result.selection.figure}"),
        ("seconds", document["seconds"]),
        *(("note", note) for note in result.notes),
        ("output", target),
    ]
    print_result(document, as_json, rows)
