"""Prepare the inputs of a run: batches, held-out data, arrays that the loss reads, the teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import onnxruntime as ort

from onnxqat.choices import nearest
from onnxqat.data import DataSet, split
from onnxqat.data.beside import TARGETS, TARGETS_COUNT
from onnxqat.device import CPU, Device, find_device
from onnxqat.errors import TrainingError
from onnxqat.evaluation.run import model_session
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.quantized import QuantizedModel, weights_hash
from onnxqat.repair import original
from onnxqat.train.config import STEP, Config
from onnxqat.train.losses import TENSOR, array_input, array_of, teacher_input
from onnxqat.train.lowering import with_steps

__all__ = [
    "batches_per_step",
    "check_enough",
    "divide",
    "in_batches_of",
    "in_steps_of",
    "teacher_of",
    "teaching_session",
    "training_device",
    "with_arrays",
]


def training_device(config: Config, workers: Workers) -> Device:
    """Return the device that trains.

    Raises
    ------
    OptionError
        The requested device cannot be used.
    """
    return find_device(config.device, config.precision, rank=workers.rank, size=workers.size)


def in_batches_of(model: QuantizedModel, data: DataSet) -> DataSet:
    """Return the data in the fixed batches of the model, if its batch is fixed."""
    for tensor in model.floats.graph.inputs:
        length = tensor.shape[0] if tensor.shape else None
        if isinstance(length, int) and tensor.name in data.sample_inputs:
            return data.in_batches_of(length, tensor.name)
    return data


def in_steps_of(model: QuantizedModel, data: DataSet) -> QuantizedModel:
    """Return a model whose recurrent layers have as many steps as the data."""
    batch = next(iter(data.batches()), None)  # the first batch with a readable sample
    shapes = {} if batch is None else {name: a.shape for name, a in batch.inputs.items()}
    return replace(model, floats=with_steps(model.floats, shapes))


def batches_per_step(data: DataSet, size: int, config: Config, workers: Workers) -> int:
    """Return the configured number of batches per step, or the default for a fixed batch."""
    if config.accumulate is not None or data.fixed_batch is None:
        return config.batches
    at_once = size * workers.size
    return max(1, min(math.ceil(STEP / at_once), len(data) // at_once))


def divide(data: DataSet, validation: DataSet | None, config: Config) -> tuple[DataSet, DataSet]:
    """Return the training and the held-out data; fixed batches are not divided."""
    if validation is not None:
        return data, validation
    count, fraction, unit = len(data), config.validation, data.fixed_batch or 1
    if count < 2 * unit:
        unit = 1
    if 0 < fraction < 1:
        fraction = min(max(round(count * fraction / unit), 1) * unit, count - 1) / count
    trained, kept = split(count, fraction, config.seed)
    return data.subset(trained), data.subset(kept)


def check_enough(
    count: int, training: DataSet, held_out: DataSet, config: Config, workers: Workers
) -> None:
    """Refuse data that are too few for one step and a held-out slice."""
    size, batches = config.samples, config.batches * workers.size
    if len(training) >= size * batches and len(held_out):
        return
    times = f"{batches} " if batches > 1 else ""
    smaller = "" if training.fixed_batch else " or a smaller --batch-size"
    raise TrainingError(
        f"{count} samples are too few for {times}batches of {size} and a held-out slice. "
        f"Give more data{smaller}."
    )


def with_arrays(data: DataSet, inputs: set[str], config: Config) -> DataSet:
    """Return the data with the arrays that the loss reads."""
    arrays = {name: array for name in sorted(inputs) if (array := array_of(name))}
    moved = data.moved_arrays
    if config.augment and TARGETS_COUNT in moved & {key for key, _ in arrays.values()}:
        # what is left of these is counted
        arrays |= {array_input(TARGETS, "float32"): (TARGETS, "float32")}
    for key, _ in arrays.values():
        if config.augment and data.array(key).shape and key not in moved:
            raise TrainingError(
                f"--augment changes the images, but not the array '{key}' that the loss reads. "
                "Leave --augment out."
            )
    return data.with_arrays(arrays) if arrays else data


def teaching_session(
    reference: Model, inputs: set[str], device: Device = CPU
) -> ort.InferenceSession | None:
    """Return a session of the teacher with the tensors that the loss reads, or None if none."""
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
    return model_session(teacher, "float", device=device)


def teacher_of(model: QuantizedModel, teacher: Model | None) -> Model:
    """Return the teacher.

    Raises
    ------
    TrainingError
        No teacher is given, and the weights of ``model`` are no longer those of its float model.
    """
    if teacher is not None:
        return teacher
    floats = original(model.floats)
    if weights_hash(floats.graph) != model.source:
        raise TrainingError(
            f"{model.name}: its weights are no longer those of the float model, so it cannot be "
            "its own teacher. Pass the float model with --teacher."
        )
    return floats
