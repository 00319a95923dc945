"""Train the weights and scales of a Q/DQ model on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from onnxqat.calibration import Calibration
from onnxqat.data import DataSet
from onnxqat.device import Device
from onnxqat.errors import ModelError
from onnxqat.evaluation import check_interface
from onnxqat.json_values import json_value
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.preparation import prepare
from onnxqat.quantized import QuantizedModel, Stage
from onnxqat.requantizations import with_requantizations
from onnxqat.settings import Settings
from onnxqat.train import (
    Checkpoints,
    Config,
    DivergedError,
    Finetuned,
    Progress,
    TrainingLog,
    training_device,
)
from onnxqat.train import finetune as run
from onnxqat.train.epochs import KeptEpochs
from onnxqat.train.losses import parse_loss
from onnxqat.train.selection import figures_of
from onnxqat.verbs.calibrate import calibrate
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, any_model, quantized_model
from onnxqat.verbs.opening import TO_CHOOSE, TO_LEARN, AnyData, opened, warn_if_unlike_training

__all__ = ["TrainingLogs", "finetune"]

NOT_TOLD = ("threads",)  # settings that are not recorded, because they change no result


@dataclass(frozen=True, kw_only=True)
class TrainingLogs:
    """The files to which losses, rates and figures are written; see `onnxqat.train.TrainingLog`.

    Attributes
    ----------
    path : str or Path, optional
        A ``.jsonl`` or ``.csv`` file.
    tensorboard : str or Path, optional
        A folder of event files.
    every : int
        The number of steps between events.
    """

    path: str | Path | None = None
    tensorboard: str | Path | None = None
    every: int = 20


def finetune(
    model: AnySource,
    data: AnyData,
    *,
    validation: AnyData | None = None,
    teacher: AnySource | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    config: Config = Config(),  # noqa: B008 (frozen)
    calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
    logs: TrainingLogs = TrainingLogs(),
    checkpoints: Checkpoints | None = None,
    epochs: KeptEpochs | None = None,
    listener: Listener = Listener(),  # noqa: B008 (without state)
    stop: Callable[[], bool] = lambda: False,
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> Finetuned:
    """Return the model with trained weights and scales, like ``onnxqat finetune``.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        A model from `insert` or `calibrate`; an uncalibrated model is calibrated first. It is not
        changed.
    data : path, arrays or DataSet
        Training samples.
    validation : path, arrays or DataSet, optional
        Samples that choose the best state (default: a seeded slice of ``data``, held out of
        training).
    teacher : str, Path or Model, optional
        The float model to distil from (default: the one inside ``model``).
    settings : Settings
        How data become model inputs, for settings that the model does not store.
    config : Config
        The hyper-parameters.
    calibration : Calibration
        Observer and number of samples for an uncalibrated model. Batch size, seed and threads are
        those of ``config``.
    logs : TrainingLogs
        The files to which losses, rates and figures are written.
    checkpoints : Checkpoints, optional
        Where checkpoints are saved, and whether to resume from them. The caller must remove the
        file when the result is saved.
    epochs : KeptEpochs, optional
        Writes the models of several epochs, not only the best one.
    listener : Listener
        Gets messages and progress.
    stop : callable
        Is called often; once it returns true, the state is saved and the run ends.
    workers : Workers
        The processes that train together, see `onnxqat.parallel`.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, the data do not fit the model, or the model
        cannot be trained.
    DivergedError
        The loss became infinite or NaN; the error contains the last good state.
    StoppedError
        ``stop`` returned true.
    """
    loaded = quantized_model(model)
    taught_by = None if teacher is None else _teacher(teacher, loaded)
    if epochs is not None and config.scope is None:  # blocks have none
        config = msgspec.structs.replace(config, scope=("network",))
    with ExitStack() as stack:

        def from_source(source: AnyData, *splits: str) -> DataSet:
            context = opened(loaded, source, settings, listener, beside=taught_by, splits=splits)
            return stack.enter_context(context)

        training = from_source(data, *TO_LEARN)
        held_out = None if validation is None else from_source(validation, *TO_CHOOSE)
        loaded = _calibrated(loaded, training, config, calibration, listener, workers)
        speaker = listener if workers.rank == 0 else Listener()
        heard = stack.enter_context(speaker.training())
        device = training_device(config, workers)
        reports: list[Callable[[Progress], None]] = [heard]
        if workers.rank == 0 and (logs.path or logs.tensorboard):
            resume = checkpoints is not None and checkpoints.resume
            log = _log(loaded, held_out or training, config, logs, device, resume=resume)
            reports.append(stack.enter_context(log))
        if workers.rank == 0 and epochs is not None:
            reports.append(epochs)
        inputs = {"data": training.name}
        inputs |= {"val_data": held_out.name} if held_out else {}
        inputs |= {"teacher": taught_by.name} if taught_by else {}
        recorded = partial(_recorded, config=config, inputs=inputs, device=device)
        try:
            result = run(
                loaded,
                training,
                validation=held_out,
                teacher=taught_by,
                config=config,
                report=partial(_tell, reports),
                stage=heard.stage,
                say=heard.say,
                checkpoints=checkpoints,
                stop=stop,
                workers=workers,
                device=device,
            )
        except DivergedError as error:
            raise DivergedError(str(error), recorded(error.outcome, str(error))) from error
    return recorded(result)


def _tell(reports: list[Callable[[Progress], None]], progress: Progress) -> None:
    for report in reports:
        report(progress)


def _calibrated(
    model: QuantizedModel,
    data: DataSet,
    config: Config,
    calibration: Calibration,
    listener: Listener,
    workers: Workers,
) -> QuantizedModel:
    """Calibrate an uncalibrated model; for a calibrated one, only check the range of the data."""
    if model.state != "uncalibrated":
        if workers.rank == 0:
            size, threads = config.batch_size, config.threads
            warn_if_unlike_training(model, data, batch_size=size, threads=threads)
        return model
    names = ("batch_size", "seed", "threads", "device", "precision")
    shared = {name: getattr(config, name) for name in names}
    return calibrate(
        model,
        data,
        calibration=msgspec.structs.replace(calibration, **shared),
        listener=listener,
        workers=workers,
        default_size=config.samples,
    )


def _log(
    model: QuantizedModel,
    data: DataSet,
    config: Config,
    logs: TrainingLogs,
    device: Device,
    *,
    resume: bool,
) -> TrainingLog:
    size = data.batch_size(config.batch_size, default=config.samples)
    batch = next(iter(data.batches(size))).inputs
    return TrainingLog(
        logs.path,
        model,
        batch,
        every=logs.every,
        resume=resume,
        threads=config.threads,
        device=device,
        tensorboard=logs.tensorboard,
    )


def _recorded(
    result: Finetuned, *notes: str, config: Config, inputs: Mapping[str, str], device: Device
) -> Finetuned:
    """Return the outcome with the fine-tuning recorded in the model's history."""
    usual = msgspec.to_builtins(Config())
    told: dict[str, Any] = {
        name: value
        for name, value in msgspec.to_builtins(config).items()
        if value != usual[name] and name not in NOT_TOLD
    }
    if config.loss is not None:
        told["loss"] = _without_folders(config.loss)
    tried = ((0, result.before), *result.tried)
    chosen = "the start" if result.kept == "start" else result.kept
    stage = Stage(
        name="finetune",
        settings=told,
        figures=_figures(result),
        inputs={name: Path(file).name for name, file in inputs.items()},
        epochs=tuple({"epoch": float(n), **json_value(figures_of(e))} for n, e in tried),
        notes=(
            *(f"learns from: {part}" for part in result.parts),
            *(f"block {n} of {len(result.blocks)}: {b}" for n, b in enumerate(result.blocks, 1)),
            f"{chosen} was chosen by {result.selection.figure}: {result.selection.reason}",
            *result.notes,
            *notes,
        ),
        device=str(device),
    )
    return replace(result, model=result.model.with_stage(stage))


def _without_folders(loss: str) -> str:
    """Return the text of a loss, with file names but without their folders."""
    for term in parse_loss(loss):
        if term.is_file:
            loss = loss.replace(term.kind, Path(term.kind).name)
    return loss


def _figures(result: Finetuned) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "epochs": float(result.epochs),
        "best_epoch": float(result.best_epoch),
        "held_out": float(result.before.samples),
    }
    if result.kept == "blocks":
        found["blocks_kept"] = 1.0
    found |= {f"float.{name}": value for name, value in json_value(result.before.reference).items()}
    for when, evaluation in (("before", result.before), ("after", result.after)):
        found |= {f"{when}.{name}": v for name, v in json_value(figures_of(evaluation)).items()}
    return found


def _teacher(source: AnySource, student: QuantizedModel) -> Model:
    """Load and prepare the teacher."""
    teacher = any_model(source)
    if isinstance(teacher, QuantizedModel):
        raise ModelError(f"{teacher.name}: contains Q/DQ pairs. Give a float model as --teacher.")
    check_interface(student, teacher, output_names=True)
    return with_requantizations(prepare(teacher), student.plan)
