"""Fine-tune the weights and scales of a Q/DQ model on data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import msgspec
import onnxruntime as ort

from onnxqat.computable import Computable, computable
from onnxqat.data import DataSet
from onnxqat.device import Device
from onnxqat.errors import TrainingError
from onnxqat.evaluation.integer import check_documented
from onnxqat.evaluation.metrics import Metric, fitted
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.plan import QuantPlan
from onnxqat.quantized import QuantizedModel
from onnxqat.train.aim import (
    announcement,
    chosen_loss,
    chosen_selection,
    described_outputs,
    readable,
)
from onnxqat.train.batches import TrainingBatches
from onnxqat.train.blocks import Reconstructed, Reconstruction
from onnxqat.train.checkpoint import (
    Checkpoints,
    Identity,
    data_identity,
    model_identity,
    place_identity,
    settings_identity,
)
from onnxqat.train.config import Config
from onnxqat.train.engine import fix_batch, step_graph
from onnxqat.train.form import TrainingForm, training_form
from onnxqat.train.given import (
    batches_per_step,
    check_enough,
    divide,
    in_batches_of,
    in_steps_of,
    teacher_of,
    teaching_session,
    training_device,
    with_arrays,
)
from onnxqat.train.loop import Loop
from onnxqat.train.losses import Loss, Part, add_loss, tensor_read
from onnxqat.train.memory import fitted_to_memory
from onnxqat.train.opening import bringing, open_descent
from onnxqat.train.optimization.parameter_groups import asked_for, frozen_throughout
from onnxqat.train.records import Finetuned, Progress
from onnxqat.train.scope import check_scope, chosen_scope
from onnxqat.train.selection import INTEGER, LOSS, Selection, metrics_of
from onnxqat.train.validation import Validation

__all__ = ["finetune"]

# The default number of epochs makes about this many steps, but is at most MAX_EPOCHS.
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
    device: Device | None = None,
) -> Finetuned:
    """Fine-tune weights and scales with simulated quantization.

    Parameters
    ----------
    model : QuantizedModel
        A calibrated or fine-tuned model. It is not changed.
    data : DataSet
        Training samples.
    validation : DataSet, optional
        Samples that choose the best state (default: a seeded slice of ``data``, held out of
        training).
    teacher : Model, optional
        The float model to distil from (default: the float model inside a calibrated ``model``).
    config : Config
        The hyper-parameters.
    report : callable
        Called after each step and each epoch.
    stage : callable
        Called during evaluations with a title, the number of finished batches, and their total.
    say : callable
        Called before the first step with lines that name the loss and the selection figure.
    checkpoints : Checkpoints, optional
        Where checkpoints are saved, and whether to resume from them. The caller must remove the
        file when the result is saved.
    stop : callable
        Is called often; once it returns true, the state is saved and the run ends.
    workers : Workers
        The processes that train together, see `onnxqat.parallel`. All call this function
        with the same arguments, and all return the same.
    device : Device, optional
        The device that trains (default: the device that ``config`` names).

    Raises
    ------
    TrainingError
        A hyper-parameter is wrong, no output can be learned from, there are too few samples, a node
        has no gradient, or a checkpoint belongs to another run.
    DivergedError
        The loss became infinite or NaN.
    StoppedError
        ``stop`` returned true.
    """
    model.check_calibrated()
    device = training_device(config, workers) if device is None else device
    data = in_batches_of(model, data)
    if validation is not None:
        validation = in_batches_of(model, validation)
    size = data.batch_size(config.batch_size, default=config.samples)
    training, held_out = divide(data, validation, config)
    own_teacher = teacher is not None
    scope, reason = chosen_scope(config, training, workers, own_teacher=own_teacher)
    check_scope(config, scope, workers)
    accumulate = batches_per_step(training, size, config, workers)
    config = msgspec.structs.replace(config, scope=scope, batch_size=size, accumulate=accumulate)
    check_enough(len(data), training, held_out, config, workers)
    rest, reference = computable(model), teacher_of(model, teacher)
    rest = replace(rest, model=in_steps_of(rest.model, data))
    if rest.lost:
        reference = computable(reference).model
        say(rest.note)
    outputs = described_outputs(rest.model.floats, data)
    loss, parts = chosen_loss(outputs, data, training, reference, config)
    with_loss = readable(loss, data, held_out)
    selection = chosen_selection(outputs, held_out, config, loss, with_loss)
    names = [output.name for output in outputs]
    figure = selection.figure
    if figure.startswith(INTEGER):
        check_documented(model, None, f"--select {figure}")
    held_out, metrics = fitted(held_out, metrics_of(figure), names, decode=config.decode)
    run = _Run(
        model=model,
        rest=rest,
        reference=reference,
        data=data,
        training=training,
        held_out=held_out,
        config=msgspec.structs.replace(config, select=selection.figure),
        loss=loss,
        parts=parts,
        selection=selection,
        with_loss=with_loss or selection.figure == LOSS,
        metrics=metrics,
        report=report,
        stage=stage,
        say=say,
        checkpoints=checkpoints,
        stop=stop,
        workers=workers,
        device=device,
    )
    if reason:
        say(reason)
    if "blocks" not in scope:
        return run.network()
    blocks = run.blocks()
    if "network" not in scope:
        return _of_blocks(blocks, run)
    if checkpoints is not None:
        checkpoints.resume = checkpoints.behind_blocks
    rest = replace(rest, model=in_steps_of(computable(blocks.model).model, data))
    tuned = replace(run, model=blocks.model, rest=rest).network()
    return replace(
        tuned,
        before=blocks.before,
        seconds=blocks.seconds + tuned.seconds,
        notes=(*blocks.notes, *tuned.notes),
        blocks=blocks.blocks,
        blocks_kept=blocks.better,
    )


def _of_blocks(blocks: Reconstructed, run: _Run) -> Finetuned:
    """Return the outcome of a run without epochs."""
    return Finetuned(
        model=blocks.model,
        before=blocks.before,
        after=blocks.after,
        epochs=0,
        best_epoch=0,
        seconds=blocks.seconds,
        parts=run.parts,
        selection=run.selection,
        notes=blocks.notes,
        blocks=blocks.blocks,
        blocks_kept=blocks.better,
        device=str(run.device),
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A fine-tuning with all decisions that do not depend on its scope.

    Parameters
    ----------
    model, rest, reference
        The model, the part of it that onnxruntime can run, and the float model.
    data, training, held_out
        All samples, and the two sets into which they were divided.
    config, loss, parts, selection, with_loss
        How the model is trained and judged; ``with_loss``: whether the held-out loss is measured.
    metrics : tuple of Metric
        Further metrics.
    """

    model: QuantizedModel
    rest: Computable[QuantizedModel]
    reference: Model
    data: DataSet
    training: DataSet
    held_out: DataSet
    config: Config
    loss: Loss
    parts: tuple[Part, ...]
    selection: Selection
    with_loss: bool
    metrics: tuple[Metric, ...]
    report: Callable[[Progress], None]
    stage: Callable[[str, int, int], None]
    say: Callable[[str], None]
    checkpoints: Checkpoints | None
    stop: Callable[[], bool]
    workers: Workers
    device: Device

    def blocks(self) -> Reconstructed:
        """Tune one block after the other."""
        proto = fix_batch(self.rest.model.to_proto(), set(), self.config.samples)
        read = {value.name for value in add_loss(proto, self.loss, self.data).graph.input}
        held_out = self._judging(read)
        teaching = teaching_session(self.reference, read, self.device)
        return Reconstruction(
            model=self.model,
            rest=self.rest.model,
            reference=self.reference,
            training=self.training,
            held_out=held_out,
            config=self.config,
            validate=self._validation(held_out, teaching),
            selection=self.selection,
            report=self.report,
            stage=self.stage,
            say=self.say,
            checkpoints=self.checkpoints,
            identity=self._identity(self.training, held_out),
            stop=self.stop,
            device=self.device,
            last="network" not in (self.config.scope or ()),
        ).run()

    def network(self) -> Finetuned:
        """Train from end to end."""
        config, rest = self.config, self.rest.model
        read = tensor_read(self.loss, rest.floats)
        asked = asked_for(config)
        form = self._frozen(training_form(rest, method=config.method, read=read, asked=asked))
        if config.memory_budget is not None:
            return self._within(form, config.memory_budget).network()
        delayed = None
        if config.quant_delay:
            delayed = self._frozen(_float_form(rest, form, read, asked))
        descent, classes = open_descent(
            form,
            delayed,
            self.model,
            loss=self.loss,
            arrays=self.data,
            config=config,
            workers=self.workers,
            device=self.device,
        )
        training = with_arrays(self.training, descent.inputs, config)
        teaching = teaching_session(self.reference, descent.inputs, self.device)
        held_out = self._judging(descent.inputs)
        step_batches = TrainingBatches(
            rest.floats,
            training,
            None if self.device.resident else teaching,
            config,
            self.workers,
            classes,
            bringing(self.device, teaching, descent.inputs),
        )
        loop = Loop(
            model=self.model,
            form=form,
            descent=descent,
            step_batches=step_batches,
            config=config,
            validate=self._validation(held_out, teaching),
            parts=self.parts,
            selection=self.selection,
            epochs=config.epochs or min(math.ceil(TARGET_STEPS / step_batches.steps), MAX_EPOCHS),
            report=self.report,
            stage=self.stage,
            announcement=announcement(config, self.parts, self.selection),
            say=self.say,
            checkpoints=self.checkpoints,
            identity=self._identity(training, held_out),
            stop=self.stop,
            workers=self.workers,
        )
        return replace(loop.run(), device=str(self.device))

    def _frozen(self, form: TrainingForm) -> TrainingForm:
        """Return the form with the names of the inputs that the user's groups freeze."""
        learned = {name: form.parameters[name] for name in sorted(form.learned)}
        frozen = frozen_throughout(learned, form.roles, self.model, self.config)
        return replace(form, frozen=frozen)

    def _within(self, form: TrainingForm, budget: int) -> _Run:
        """Return the run with batches that fit into ``budget`` megabytes."""
        if self.training.fixed_batch is not None:
            raise TrainingError(
                f"--memory-budget {budget}: {self.model.name} takes "
                f"{self.training.fixed_batch} samples at a time. Export it with a free batch."
            )
        config, needed = fitted_to_memory(
            self.config,
            form,
            lambda size: (
                step_graph(
                    form, self.loss, batch_size=size, arrays=self.data, device=self.device
                ).model
            ),
            budget,
        )
        self.say(f"{config.batches} batches of {config.samples} a step, in about {needed} MB")
        return replace(self, config=config)

    def _judging(self, read: set[str]) -> DataSet:
        """Return the held-out data with the arrays that the loss reads."""
        return with_arrays(self.held_out, read, self.config) if self.with_loss else self.held_out

    def _validation(self, held_out: DataSet, teaching: ort.InferenceSession | None) -> Validation:
        return Validation(
            data=held_out,
            reference=self.reference,
            config=self.config,
            loss=self.loss,
            teacher=teaching,
            with_loss=self.with_loss,
            metrics=self.metrics,
            integer=self.selection.figure.startswith(INTEGER),
            whole=not self.rest.lost,
            device=self.device,
        )

    def _identity(self, training: DataSet, held_out: DataSet) -> Callable[[], Identity]:
        """Return a function that computes (once) the values that must be the same on resuming."""
        return cache(
            partial(
                _identity,
                self.model,
                self.reference,
                training,
                held_out,
                self.config,
                self.workers,
                self.loss,
                self.device,
            )
        )


def _float_form(
    model: QuantizedModel, form: TrainingForm, read: str | None, asked: frozenset[str]
) -> TrainingForm:
    """Return the training form of the float network, with the observed tensors of ``form``."""
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
    device: Device,
) -> Identity:
    files = {f"the loss '{path}'": model_identity(graph) for path, graph in loss.graphs.items()}
    others = {
        "the number of processes": workers.size,
        "the model": model_identity(model),
        "the teacher": model_identity(reference),
        "the training data": data_identity(training),
        "the held-out data": data_identity(held_out),
    }
    return settings_identity(config) | files | others | place_identity(device)
