"""Fine-tuning: a Q/DQ model and data in, the model with tuned weights and scales out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

from onnxqat.data import DataSet, split
from onnxqat.errors import TrainingError
from onnxqat.evaluate import Evaluation, evaluate
from onnxqat.evaluate.run import model_session
from onnxqat.insert import SOURCE_KEY, state_of, strip, weights_hash
from onnxqat.model import Model
from onnxqat.train.checkpoint import (
    Checkpoints,
    Identity,
    data_identity,
    model_identity,
    settings_identity,
)
from onnxqat.train.config import Config
from onnxqat.train.engine import StepSession
from onnxqat.train.form import training_form
from onnxqat.train.loop import Loop
from onnxqat.train.losses import parse_loss
from onnxqat.train.parallel import Workers
from onnxqat.train.records import Finetuned, Progress
from onnxqat.train.supply import Supply

__all__ = ["finetune"]

# Fewer samples than this many steps' worth are shown again, up to MAX_EPOCHS times.
TARGET_STEPS = 2000
MAX_EPOCHS = 10


def finetune(
    model: Model,
    data: DataSet,
    *,
    validation: DataSet | None = None,
    teacher: Model | None = None,
    config: Config = Config(),  # noqa: B008 (frozen)
    report: Callable[[Progress], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] = lambda: False,
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> Finetuned:
    """Fine-tune weights and scales with the quantization in the loop.

    Parameters
    ----------
    model : Model
        Calibrated, or fine-tuned before. It is not changed.
    data : DataSet
        Training samples.
    validation : DataSet, optional
        Chooses the best state. A seeded slice of ``data`` is held out for it otherwise.
    teacher : Model, optional
        Float model to distil from; of a calibrated file it is the file itself.
    config : Config
        Hyper-parameters.
    report : callable
        Told about every step and epoch.
    checkpoints : Checkpoints, optional
        Where the state is saved, and whether to go on from there. The file is left behind, for the
        caller to remove when the result is safe.
    stop : callable
        Asked often; once it returns true, the state is saved and the run ends.
    workers : Workers
        The processes that train together, see `onnxqat.train.parallel`. All call this function
        with the same arguments, and all return the same.

    Raises
    ------
    TrainingError
        A wrong hyper-parameter, nothing to teach, too few samples, a gradient that does not exist,
        or a checkpoint that is not of this run.
    DivergedError
        The loss left the finite numbers.
    StoppedError
        ``stop`` said so.
    """
    config.check()
    if state_of(model) == "uncalibrated":
        raise TrainingError(f"{model.name}: is not calibrated. Calibrate it first.")
    _check_batch(model, config)
    training, held_out = _divide(data, validation, config, workers.size)
    terms = _loss_terms(data, config)
    reference = _teacher_of(model, teacher)
    teaching = any(term != "cross-entropy" for term in terms)
    teaching_session = model_session(reference, "float") if teaching else None
    form = training_form(model, learn_scales=config.method == "lsq")
    supply = Supply(model, training, teaching_session, config, workers)
    loop = Loop(
        model=model,
        form=form,
        session=StepSession(form, terms, batch_size=config.batch_size, threads=config.threads),
        supply=supply,
        config=config,
        validate=partial(_validate, held_out=held_out, reference=reference, config=config),
        epochs=config.epochs or min(math.ceil(TARGET_STEPS / supply.steps), MAX_EPOCHS),
        report=report,
        checkpoints=checkpoints,
        identity=cache(partial(_identity, model, reference, training, held_out, config, workers)),
        stop=stop,
        workers=workers,
    )
    return loop.run()


def _validate(
    model: Model,
    progress: Callable[[], None],
    *,
    held_out: DataSet,
    reference: Model,
    config: Config,
) -> Evaluation:
    batches = held_out.batches(config.batch_size)
    threads = config.threads
    return evaluate(model, batches, against=reference, threads=threads, progress=progress)


def _identity(
    model: Model,
    reference: Model,
    training: DataSet,
    held_out: DataSet,
    config: Config,
    workers: Workers,
) -> Identity:
    return settings_identity(config) | {
        "the number of processes": workers.size,
        "the model": model_identity(model),
        "the teacher": model_identity(reference),
        "the training data": data_identity(training),
        "the held-out data": data_identity(held_out),
    }


def _check_batch(model: Model, config: Config) -> None:
    for tensor in model.graph.inputs:
        length = tensor.shape[0] if tensor.shape else None
        if isinstance(length, int) and length != config.batch_size:
            raise TrainingError(
                f"Input '{tensor.name}' takes {length} samples at a time, and batches have "
                f"{config.batch_size}. Pass --batch-size {length}, or export the model "
                "with a free first axis."
            )


def _divide(
    data: DataSet, validation: DataSet | None, config: Config, workers: int
) -> tuple[DataSet, DataSet]:
    """Return what is trained on, and what is held out."""
    count, batches = len(data), config.accumulate * workers
    if validation is None:
        trained, kept = split(count, config.validation, config.seed)
        data, validation = data.subset(trained), data.subset(kept)
    if len(data) < config.batch_size * batches or len(validation) == 0:
        times = f"{batches} " if batches > 1 else ""
        raise TrainingError(
            f"{count} samples are too few for {times}batches of {config.batch_size} and a "
            "held-out slice. Give more data or a smaller --batch-size."
        )
    return data, validation


def _loss_terms(data: DataSet, config: Config) -> tuple[str, ...]:
    default = "cross-entropy+kl" if data.has_labels else "kl"
    terms = parse_loss(config.loss or default)
    if "cross-entropy" in terms and not data.has_labels:
        raise TrainingError(
            "The loss 'cross-entropy' needs labels, and the data have none. "
            "Name them with --label, or distil with --loss kl."
        )
    return terms


def _teacher_of(model: Model, teacher: Model | None) -> Model:
    if teacher is not None:
        return teacher
    floats = strip(model)
    if weights_hash(floats.graph) != model.metadata.get(SOURCE_KEY):
        raise TrainingError(
            f"{model.name}: its weights are not those of the float model any more, so that it "
            "cannot teach itself. Pass the float model with --teacher."
        )
    return floats
