"""Fine-tuning: a Q/DQ model and data in, the model with tuned weights and scales out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import msgspec
import onnxruntime as ort

from onnxqat.choices import nearest
from onnxqat.computable import computable
from onnxqat.data import DataSet, split
from onnxqat.errors import TrainingError
from onnxqat.evaluation.metrics import fitted
from onnxqat.evaluation.run import model_session
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.plan import QuantPlan
from onnxqat.quantized import QuantizedModel, weights_hash
from onnxqat.repair import original
from onnxqat.train.aim import (
    announcement,
    chosen_loss,
    chosen_selection,
    described_outputs,
    readable,
)
from onnxqat.train.batches import TrainingBatches
from onnxqat.train.checkpoint import (
    Checkpoints,
    Identity,
    data_identity,
    model_identity,
    settings_identity,
)
from onnxqat.train.config import STEP, Config
from onnxqat.train.engine import StepSession
from onnxqat.train.form import TrainingForm, training_form
from onnxqat.train.loop import Loop
from onnxqat.train.losses import (
    TENSOR,
    Loss,
    array_of,
    teacher_input,
    tensor_read,
)
from onnxqat.train.optimization.parameter_groups import asked_for
from onnxqat.train.records import Finetuned, Progress
from onnxqat.train.selection import INTEGER, LOSS, metrics_of
from onnxqat.train.validation import Validation

__all__ = ["finetune"]

# Fewer samples than this many steps' worth are shown again, up to MAX_EPOCHS times.
TARGET_STEPS = 2000
MAX_EPOCHS = 10


def finetune(
    model: QuantizedModel,
    data: DataSet,
    *,
    validation: DataSet | None = None,
    teacher: Model | None = None,
    config: Config = Config(),  # noqa: B008 (frozen)
    report: Callable[[Progress], None] = lambda _: None,
    stage: Callable[[str, int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] = lambda: False,
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> Finetuned:
    """Fine-tune weights and scales with the quantization in the loop.

    Parameters
    ----------
    model : QuantizedModel
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
    stage : callable
        Told what is evaluated meanwhile, how many batches are done, and how many there are.
    say : callable
        Told, before the first step, what is learned from and what chooses the state.
    checkpoints : Checkpoints, optional
        Where the state is saved, and whether to go on from there. The file is left behind, for the
        caller to remove when the result is safe.
    stop : callable
        Asked often; once it returns true, the state is saved and the run ends.
    workers : Workers
        The processes that train together, see `onnxqat.parallel`. All call this function
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
    model.check_calibrated()
    data = _in_batches_of(model, data)
    if validation is not None:
        validation = _in_batches_of(model, validation)
    size = data.batch_size(config.batch_size, default=config.samples)
    training, held_out = _divide(data, validation, config)
    config = msgspec.structs.replace(
        config, batch_size=size, accumulate=_batches_per_step(training, size, config, workers)
    )
    _check_enough(len(data), training, held_out, config, workers)
    rest, reference = computable(model), _teacher_of(model, teacher)
    if rest.lost:
        reference = computable(reference).model
        say(rest.note)
    outputs = described_outputs(rest.model.floats, data)
    loss, parts = chosen_loss(outputs, data, training, reference, config)
    with_loss = readable(loss, data, held_out)
    selection = chosen_selection(outputs, held_out, config, loss, with_loss)
    config = msgspec.structs.replace(config, select=selection.figure)
    names = [output.name for output in outputs]
    held_out, metrics = fitted(held_out, metrics_of(config.select), names, decode=config.decode)
    read = tensor_read(loss, rest.model.floats)
    asked = asked_for(config)
    form = training_form(rest.model, method=config.method, read=read, asked=asked)
    opened = partial(
        StepSession, loss=loss, batch_size=config.samples, threads=config.threads, arrays=data
    )
    session = opened(form)
    delayed = (
        opened(_float_form(rest.model, form, read, asked), other=session)
        if config.quant_delay
        else None
    )
    training = _with_arrays(training, session.inputs, config)
    teaching = _teaching_session(reference, session.inputs)
    if with_loss or config.select == LOSS:
        held_out = _with_arrays(held_out, session.inputs, config)
    step_batches = TrainingBatches(
        rest.model.floats, training, teaching, config, workers, session.classes
    )
    loop = Loop(
        model=model,
        form=form,
        session=session,
        delayed=delayed,
        step_batches=step_batches,
        config=config,
        validate=Validation(
            data=held_out,
            reference=reference,
            config=config,
            loss=loss,
            teacher=teaching,
            with_loss=with_loss or config.select == LOSS,
            metrics=metrics,
            integer=selection.figure.startswith(INTEGER),
            whole=not rest.lost,
        ),
        parts=parts,
        selection=selection,
        epochs=config.epochs or min(math.ceil(TARGET_STEPS / step_batches.steps), MAX_EPOCHS),
        report=report,
        stage=stage,
        announcement=announcement(config, parts, selection),
        say=say,
        checkpoints=checkpoints,
        identity=cache(
            partial(_identity, model, reference, training, held_out, config, workers, loss)
        ),
        stop=stop,
        workers=workers,
    )
    return loop.run()


def _float_form(
    model: QuantizedModel, form: TrainingForm, read: str | None, asked: frozenset[str]
) -> TrainingForm:
    """Return the training form of the float network, which observes what ``form`` observes."""
    plan = model.plan
    nothing = QuantPlan(rule=plan.rule, points=(), skips=())
    floats = model.with_params({}, state="calibrated", plan=nothing)
    activations = [p for p in plan.grid_points() if p.role == "activation" and p.observed]
    observed = {
        name: tuple(p.tensor for p in activations if p.parameters == name) for name in form.observed
    }
    return replace(training_form(floats, read=read, asked=asked), observed=observed)


def _identity(
    model: QuantizedModel,
    reference: Model,
    training: DataSet,
    held_out: DataSet,
    config: Config,
    workers: Workers,
    loss: Loss,
) -> Identity:
    files = {f"the loss '{path}'": model_identity(graph) for path, graph in loss.graphs.items()}
    others = {
        "the number of processes": workers.size,
        "the model": model_identity(model),
        "the teacher": model_identity(reference),
        "the training data": data_identity(training),
        "the held-out data": data_identity(held_out),
    }
    return settings_identity(config) | files | others


def _in_batches_of(model: QuantizedModel, data: DataSet) -> DataSet:
    """Return the data in the batches that the model is fixed to."""
    for tensor in model.floats.graph.inputs:
        length = tensor.shape[0] if tensor.shape else None
        if isinstance(length, int) and tensor.name in data.sample_inputs:
            return data.in_batches_of(length, tensor.name)
    return data


def _batches_per_step(data: DataSet, size: int, config: Config, workers: Workers) -> int:
    """Return what was asked for; else, where the batch is fixed, as many as make usual steps."""
    if config.accumulate is not None or data.fixed_batch is None:
        return config.batches
    at_once = size * workers.size
    return max(1, min(math.ceil(STEP / at_once), len(data) // at_once))


def _divide(data: DataSet, validation: DataSet | None, config: Config) -> tuple[DataSet, DataSet]:
    """Return what is trained on, and what is held out: whole batches where they are fixed."""
    if validation is not None:
        return data, validation
    count, fraction, unit = len(data), config.validation, data.fixed_batch or 1
    if count < 2 * unit:
        unit = 1
    if 0 < fraction < 1:
        fraction = min(max(round(count * fraction / unit), 1) * unit, count - 1) / count
    trained, kept = split(count, fraction, config.seed)
    return data.subset(trained), data.subset(kept)


def _check_enough(
    count: int, training: DataSet, held_out: DataSet, config: Config, workers: Workers
) -> None:
    size, batches = config.samples, config.batches * workers.size
    if len(training) >= size * batches and len(held_out):
        return
    times = f"{batches} " if batches > 1 else ""
    smaller = "" if training.fixed_batch else " or a smaller --batch-size"
    raise TrainingError(
        f"{count} samples are too few for {times}batches of {size} and a held-out slice. "
        f"Give more data{smaller}."
    )


def _with_arrays(data: DataSet, inputs: set[str], config: Config) -> DataSet:
    """Return the data with the arrays that the loss reads."""
    arrays = {name: array for name in sorted(inputs) if (array := array_of(name))}
    for key, _ in arrays.values():
        if config.augment and data.array(key).shape:
            raise TrainingError(
                f"--augment moves the images, and not the array '{key}' that the loss reads. "
                "Leave --augment out."
            )
    return data.with_arrays(arrays) if arrays else data


def _teaching_session(reference: Model, inputs: set[str]) -> ort.InferenceSession | None:
    """Return a session of the teacher with the tensors that the loss reads; None without any."""
    read = {name for name in inputs if name.startswith(teacher_input(""))}
    if not read:
        return None
    outputs = {tensor.name for tensor in reference.graph.outputs}
    others = sorted(read - {teacher_input(output) for output in outputs})
    wanted = [name.removeprefix(teacher_input(TENSOR)) for name in others]
    teacher = reference.copy() if wanted else reference
    tensors = teacher.graph.tensors()
    for name in (name for name in wanted if name not in outputs):
        if name not in tensors:
            raise TrainingError(
                f"{reference.name}: the teacher has no tensor '{name}'. "
                f"{nearest(name, sorted(tensors))}"
            )
        teacher.graph.outputs.append(tensors[name])
    return model_session(teacher, "float")


def _teacher_of(model: QuantizedModel, teacher: Model | None) -> Model:
    if teacher is not None:
        return teacher
    floats = original(model.floats)
    if weights_hash(floats.graph) != model.source:
        raise TrainingError(
            f"{model.name}: its weights are not those of the float model any more, so that it "
            "cannot teach itself. Pass the float model with --teacher."
        )
    return floats
