"""Tune the blocks of a network, one after the other.

Each block learns the float model's tensors at its end, from inputs that the blocks before it
compute (BRECQ: Li et al. 2021, https://arxiv.org/abs/2102.05426, section 3.2; weights and scales
together: AdaQuant, Hubara et al. 2020, https://arxiv.org/abs/2006.10518, section 3). If the error
of a block on held-out samples does not fall, it keeps its old parameters. If the whole network is
not better on these samples, all blocks keep their old parameters.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.data import DataSet
from onnxqat.device import Device
from onnxqat.errors import TrainingError
from onnxqat.evaluation import Evaluation
from onnxqat.model import Model
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.quantized import QuantizedModel
from onnxqat.train.blocks.activations import Activations
from onnxqat.train.blocks.block import BlockTraining, block_loss
from onnxqat.train.blocks.network import CutNetwork
from onnxqat.train.blocks.parts import values_of
from onnxqat.train.checkpoint import Checkpoints, Identity
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat
from onnxqat.train.form import training_form
from onnxqat.train.losses import Loss
from onnxqat.train.monitoring.divergence import RECENT_STEPS
from onnxqat.train.optimization.parameter_groups import asked_for, base_rate, parameter_rates
from onnxqat.train.records import BlockFigures, Progress, StoppedError
from onnxqat.train.resident.blocks import DeviceBlockTraining
from onnxqat.train.selection import Selection, figures_of, score
from onnxqat.train.state import with_values
from onnxqat.train.trained import trained_initializers
from onnxqat.train.validation import Validation, check_labels

__all__ = ["BlockFigures", "Reconstructed", "Reconstruction"]

logger = logging.getLogger(__name__)

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """The result of block reconstruction.

    Attributes
    ----------
    model : QuantizedModel
        The model with tuned blocks; the start if they were not better.
    before, after : Evaluation
        The figures of the start and of ``model`` on the held-out data.
    better : bool
        Whether the tuned blocks were kept.
    blocks : tuple of BlockFigures
        The result of each block.
    seconds : float
        Wall time.
    notes : tuple of str
        Messages on blocks that were not kept.
    """

    model: QuantizedModel
    before: Evaluation
    after: Evaluation
    better: bool
    blocks: tuple[BlockFigures, ...]
    seconds: float
    notes: tuple[str, ...]


class BlockRecord(msgspec.Struct, kw_only=True):
    """The state of a run at the end of a block, without its arrays.

    Attributes
    ----------
    before : Evaluation
        The figures of the start.
    after : Evaluation or None
        The figures of the network with all blocks tuned.
    blocks : list of BlockFigures
        The results of the finished blocks.
    tuned : list of str
        The parameters that finished blocks have tuned; later blocks do not change them.
    seconds : float
        Wall time so far.
    finished : bool
        Whether the run has finished, with no training after the blocks.
    """

    before: Evaluation
    after: Evaluation | None = None
    blocks: list[BlockFigures] = []
    tuned: list[str] = []
    seconds: float = 0.0
    finished: bool = False


@dataclass(kw_only=True)
class Reconstruction:
    """Tunes the blocks of a network.

    Parameters
    ----------
    model : QuantizedModel
        The whole model to tune.
    rest : QuantizedModel
        The part of it that onnxruntime can run.
    reference : Model
        The float model whose tensors are learned.
    training, held_out : DataSet
        The training samples, and the samples that judge.
    config : Config
        The hyper-parameters; the batch size is set.
    validate, selection
        The evaluation of the network, and the figure that chooses.
    report, stage, say : callable
        See `onnxqat.train.finetune`.
    checkpoints : Checkpoints or None
        Where the state is saved at the end of each block.
    identity : callable
        Returns the values that must be the same when a run resumes.
    stop : callable
        Returns whether to stop.
    device : Device
        The device that trains.
    last : bool
        Whether nothing is trained after the blocks.
    """

    model: QuantizedModel
    rest: QuantizedModel
    reference: Model
    training: DataSet
    held_out: DataSet
    config: Config
    validate: Validation
    selection: Selection
    report: Callable[[Progress], None]
    stage: Callable[[str, int, int], None]
    say: Callable[[str], None]
    checkpoints: Checkpoints | None
    identity: Callable[[], Identity]
    stop: Callable[[], bool]
    device: Device
    last: bool

    def run(self) -> Reconstructed:
        """Tune all blocks, and return the tuned network if it is better than the start.

        Raises
        ------
        TrainingError
            There is nothing to learn from, or a group of `Config` matches nothing.
        StoppedError
            ``stop`` returned true.
        """
        self.started = time.monotonic()
        self._prepare()
        self._announce()
        if self.checkpoints:
            self.identity()  # now, because the data may be gone when a checkpoint is due
        self.record = self._first_record()
        if self.record.after is None:
            self._tune_blocks()
            self.record.after = self._evaluate("the blocks", self._current(self.model))
            self.record.finished = self.last
            self._save()
        if self.checkpoints:
            self.checkpoints.keep_blocks(self.identity(), self.record, self._arrays())
        return self._result(self.record.after)

    def _prepare(self) -> None:
        """Cut the graph, and collect the parameters that can be trained."""
        floats, config = self.rest.floats, self.config
        self.network = CutNetwork(self.rest, self.reference, config, self.device)
        self.asked = asked_for(config)
        self.weights = trained_initializers(floats.graph, self.rest.plan, self.asked)
        values = values_of(self.rest, self.weights)
        self.values = Flat(values)
        self.by_level = config.lr is None and config.optimizer != "sgd"
        self.config = msgspec.structs.replace(config, lr=base_rate(config, self.rest))
        roles = {scale_name(name): "scale" for name in self.rest.params}
        roles |= {zero_point_name(name): "zero_point" for name in self.rest.params}
        parameter_rates(values, roles, self.rest, self.config)  # a wrong group is refused at once
        self.note, self.loss = "", 0.0
        self.copies = {id(m): m.floats.copy() for m in (self.model, self.rest)}

    def _announce(self) -> None:
        blocks, config = self.network.blocks, self.config
        samples = min(len(self.training), config.block_samples)
        layers = max(len(block.layers) for block in blocks)
        self.say(
            f"{len(blocks)} blocks of up to {layers} layers learn to match the float "
            f"model's tensors at their ends, on {samples} samples for {config.block_epochs} epochs"
        )
        self.say(f"chooses the best state by {self.selection.figure}: {self.selection.reason}")

    def _first_record(self) -> BlockRecord:
        if self.checkpoints and self.checkpoints.resume:
            record = self.checkpoints.load_blocks(self.identity(), BlockRecord, self._arrays())
            self.started -= record.seconds
            return record
        before = self._evaluate("the start", self.model)
        score(before, self.selection.figure)
        check_labels(before, self.model.name, force=self.config.force_labels)
        return BlockRecord(before=before)

    def _evaluate(self, title: str, model: QuantizedModel) -> Evaluation:
        return self.validate(model, self._ticking(f"evaluating {title}", self.validate.batches))

    def _ticking(self, title: str, total: int) -> Callable[[], None]:
        """Return a function to call after each of ``total`` batches."""
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self.stage(title, done, total)
            self._stop_if_asked()

        return tick

    def _stop_if_asked(self) -> None:
        if not self.stop():
            return
        checkpoints = self.checkpoints
        if checkpoints is None or not checkpoints.written:
            raise StoppedError("Interrupted before the end of the first block. Nothing was kept.")
        done, total = len(self.record.blocks), len(self.network.blocks)
        raise StoppedError(
            f"Interrupted after block {done} of {total}, saved in {checkpoints.path}. Continue "
            "with the same command and --resume."
        )

    def _current(self, model: QuantizedModel, *, fit_biases: bool = True) -> QuantizedModel:
        """Return a model with the current parameters; the next call overwrites its weights."""
        return with_values(
            model,
            self.copies[id(model)],
            self.values.views,
            weights=self.weights,
            zero_points=model.params.keys(),
            fit_biases=fit_biases,
        )

    def _tune_blocks(self) -> None:
        with Activations(self.config.block_memory * MEGABYTE) as store:
            network = self.network
            reading = partial(self._ticking, "reading samples")
            network.read(self.training, self.held_out, store, reading)
            network.check_teacher(self.model.name)
            for number in range(len(network.blocks)):
                title = self._title(number)
                tick = self._ticking(f"{title}, float tensors", network.batches)
                network.compute_floats(number, tick)
                if number >= len(self.record.blocks):  # else tuned before an interruption
                    self._tune(number)
                    self._save()
                if number + 1 < len(network.blocks):
                    tick = self._ticking(f"{title}, its tensors", network.batches)
                    network.compute_quantized(
                        number, self._current(self.rest, fit_biases=False), tick
                    )

    def _title(self, number: int) -> str:
        return f"block {number + 1} of {len(self.network.blocks)}"

    def _block(self, number: int) -> QuantizedModel:
        return self.network.block(number, self._current(self.rest, fit_biases=False))

    def _steps(self) -> int:
        """Return the number of training steps of a block."""
        samples = self.network.samples
        rows = samples.batch * self.config.batches
        return max(self.config.block_epochs * samples.count // rows, 1)

    def _tune(self, number: int) -> None:
        """Train one block, and keep it if its error on the judging samples fell."""
        block, model = self.network.blocks[number], self._block(number)
        samples, judges = self.network.samples, self.network.judges
        found = BlockFigures(layers=len(block.layers), outputs=block.outputs)
        loss = block_loss(samples, block.outputs)
        try:
            training = self._training(model, loss)
        except TrainingError as error:
            self._end_block(number, msgspec.structs.replace(found, note=str(error)))
            return
        if training is None:
            note = "it has no parameters to train"
            self._end_block(number, msgspec.structs.replace(found, note=note))
            return
        before, steps = training.error(judges), self._steps()
        seed, finite = (self.config.seed, number), True
        recent: list[float] = []
        for step, value in enumerate(training.run(samples, seed, before), start=1):
            finite = finite and math.isfinite(value)
            recent = [*recent, value][-RECENT_STEPS:]
            self.loss = float(np.mean(recent))
            self._tell(number, step, steps, self.loss)
            self._stop_if_asked()
            if not finite:
                break
        after = training.error(judges) if finite else math.nan
        kept = after < before
        if kept:
            for name, tuned in training.values.items():
                self.values.views[name][...] = tuned
            self.record.tuned += sorted(training.tuned)
        figures = {"before": before, "after": after if finite else None, "kept": kept}
        note = "" if kept else "not better on held-out samples, so unchanged"
        self._end_block(number, msgspec.structs.replace(found, **figures, note=note))

    def _training(self, model: QuantizedModel, loss: Loss | None) -> BlockTraining | None:
        """Return the training of a block, or None if nothing in it can be trained."""
        if loss is None:
            return None
        read = loss.terms[0].output
        form = training_form(
            model,
            method=self.config.method,
            read=read,
            asked=self.asked,
            adaround=self.config.rounding == "adaround",
        )
        if not form.learned - {*self.record.tuned}:
            return None
        opened: Callable[..., BlockTraining] = BlockTraining
        if self.device.resident:
            opened = partial(DeviceBlockTraining, device=self.device)
        return opened(
            model,
            form,
            loss,
            self.config,
            still=self.record.tuned,
            steps=self._steps(),
            by_level=self.by_level,
        )

    def _tell(self, number: int, step: int, steps: int, loss: float) -> None:
        total = len(self.network.blocks)
        self.report(
            Progress(
                step=number * steps + step,
                steps=total * steps,
                epoch=number + 1,
                epochs=total,
                loss=loss,
                lr=self.config.lr or 0.0,
                scale_lr=self.config.scale_lr,
                part="block",
                note=self.note,
            )
        )

    def _end_block(self, number: int, figures: BlockFigures) -> None:
        self.record.blocks.append(figures)
        steps = self._steps()
        self.note = f"{self._title(number)}: {figures}"
        self._tell(number, steps, steps, self.loss)

    def _save(self) -> None:
        self.record.seconds = time.monotonic() - self.started
        if self.checkpoints is not None:
            finished = self.record.finished
            self.checkpoints.save(self.identity(), self.record, self._arrays(), finished=finished)

    def _arrays(self) -> Mapping[str, NDArray[np.float32]]:
        return {"values": self.values.buffer}

    def _result(self, after: Evaluation) -> Reconstructed:
        figure, before = self.selection.figure, self.record.before
        better = score(after, figure) > score(before, figure)
        notes = [f"{self._title(i)}: {b.note}" for i, b in enumerate(self.record.blocks) if b.note]
        if not better:
            ours, theirs = (figures_of(e)[figure] for e in (after, before))
            notes.append(
                f"the blocks were not kept: {figure} {ours:.4g} after them, {theirs:.4g} at the "
                "start"
            )
        return Reconstructed(
            model=self._current(self.model) if better else self.model,
            before=before,
            after=after if better else before,
            better=better,
            blocks=tuple(self.record.blocks),
            seconds=time.monotonic() - self.started,
            notes=tuple(notes),
        )
