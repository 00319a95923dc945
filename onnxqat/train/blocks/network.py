"""A network cut into blocks, and the tensors of the samples at the cuts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxqat.data import DataSet
from onnxqat.device import CPU, Device
from onnxqat.ends import TensorReader
from onnxqat.errors import TrainingError
from onnxqat.evaluation.run import model_session
from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel
from onnxqat.repair import original
from onnxqat.runtime import open_session
from onnxqat.train.blocks.activations import Activations
from onnxqat.train.blocks.cut import cut
from onnxqat.train.blocks.parts import between, block_model, quantized_crossings
from onnxqat.train.blocks.samples import Samples
from onnxqat.train.config import Config
from onnxqat.train.lowering import sample_shapes

__all__ = ["CutNetwork"]

HELD_OUT = 128  # samples that judge a block
UNLIKE = 0.5  # from this squared difference, divided by the variance, tensors count as different

Tick = Callable[[], None]


class CutNetwork:
    """The blocks of a network, which are computed one after the other for all samples.

    Parameters
    ----------
    model : QuantizedModel
        The model at the start.
    reference : Model
        The float model whose tensors are learned.
    config : Config
        Length of the blocks, number of samples, and batch size.
    device : Device
        The device that computes the tensors at the cuts; they are kept in numpy.

    Attributes
    ----------
    blocks : tuple of Block
        The blocks, in order.
    samples, judges : Samples
        The samples on which blocks are trained, and those that judge them.
    """

    samples: Samples
    judges: Samples

    def __init__(
        self,
        model: QuantizedModel,
        reference: Model,
        config: Config,
        device: Device = CPU,
    ) -> None:
        self.floats, self.reference, self.config = model.floats, reference, config
        self.device = device
        self.shapes = sample_shapes(model.floats)
        self.blocks = cut(model.floats, self.shapes, config.block_layers)
        self.crossings = quantized_crossings(model, self.blocks)

    def read(
        self,
        training: DataSet,
        held_out: DataSet,
        store: Activations,
        ticking: Callable[[int], Tick],
    ) -> None:
        """Read the samples, once.

        Parameters
        ----------
        store : Activations
            Stores the tensors of the samples.
        ticking : callable
            Takes the number of batches, and returns a function to call after each.
        """
        size, config = self.config.samples, self.config
        rng = np.random.default_rng(config.seed)
        count = min(len(training), config.block_samples)
        chosen = rng.permutation(len(training))[: count - count % size]
        judging = rng.permutation(len(held_out))[:HELD_OUT]
        if held_out.fixed_batch is not None:  # complete batches only
            judging = np.resize(judging, max(len(judging) // size, 1) * size)
        tick = ticking(-(-len(chosen) // size) + -(-len(judging) // size))
        self.samples = Samples(training, np.sort(chosen), size, store, tick)
        self.judges = Samples(held_out, np.sort(judging), size, store, tick)

    def check_teacher(self, student: str) -> None:
        """Refuse a float model whose tensors between the blocks differ from the student's.

        The channels inside an equalized network are scaled, although its outputs are the same.
        Corrected biases count as they were before, as in a teacher.

        Raises
        ------
        TrainingError
            A tensor is missing, or its values differ from the student's without quantization.
        """
        theirs = self.reference
        if theirs is self.floats:
            return
        ours = original(self.floats)
        names = [name for block in self.blocks for name in block.outputs]
        found = theirs.graph.tensors()
        advice = "Give the float model of 'insert'; after --equalize, the equalized one."
        for name in names:
            if name not in found:
                raise TrainingError(
                    f"{theirs.name}: the teacher has no tensor '{name}', at which a block ends. "
                    f"{advice}"
                )
        rows = np.arange(min(self.judges.batch, self.judges.count))
        fed = [tensor.name for tensor in ours.graph.inputs]
        inputs = self.judges.take(self.judges.floats, fed, rows)
        threads = self.config.threads
        values, wanted = (
            TensorReader(
                model.to_proto(), names, optimization="basic", threads=threads, name=model.name
            ).run(inputs)
            for model in (ours, theirs)
        )
        for name in names:
            a, b = (np.asarray(v[name], np.float64) for v in (values, wanted))
            if a.shape != b.shape or np.square(a - b).mean() > UNLIKE * b.var():
                raise TrainingError(
                    f"{theirs.name}: '{name}', at which a block ends, has other values in the "
                    f"teacher than in {student} without quantization. {advice}"
                )

    def block(self, number: int, model: QuantizedModel) -> QuantizedModel:
        """Return a block of ``model``, the network in its current state."""
        return block_model(model, self.blocks[number], self.crossings, self.shapes)

    @property
    def batches(self) -> int:
        """The number of batches to compute a block."""
        return sum(-(-s.count // s.batch) for s in (self.samples, self.judges))

    def compute_floats(self, number: int, tick: Tick) -> None:
        """Compute the float model's tensors at the end of a block."""
        block = self.blocks[number]
        floats = between(self.reference, block.inputs, block.outputs, self.shapes)
        threads = self.config.threads
        session = model_session(floats, "float", threads=threads, device=self.device)
        for samples in (self.samples, self.judges):
            samples.compute(samples.floats, block.inputs, block.outputs, session, tick)

    def compute_quantized(self, number: int, model: QuantizedModel, tick: Tick) -> None:
        """Compute the outputs of a tuned block, and free the tensors that no later block reads."""
        block, part, threads = self.blocks[number], self.block(number, model), self.config.threads
        name = model.name
        session = open_session(
            part.to_proto(),
            optimization="basic",
            threads=threads,
            name=name,
            device=self.device,
        )
        needed = {read for later in self.blocks[number + 1 :] for read in later.inputs}
        for samples in (self.samples, self.judges):
            samples.compute(samples.quantized, block.inputs, block.outputs, session, tick)
            samples.forget(needed)
