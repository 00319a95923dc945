"""Estimate the memory of a training step, and choose the batch that fits into a budget.

A tensor counts from the node that writes it to the last node that reads it, in the order of the
graph (Griewank and Walther 2008, "Evaluating Derivatives", chapter
4: storage of the reverse mode). The estimate excludes the workspace of kernels and the rounding of
the allocator.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import onnx
from onnx import helper

from onnxqat import native
from onnxqat.errors import TrainingError
from onnxqat.train.config import Config
from onnxqat.train.form import TrainingForm

__all__ = ["fitted_to_memory", "held_bytes", "parameter_bytes"]

MEGABYTE = 2**20
# Ops whose output shares the memory of their first input.
VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
STATES = {
    "sgd": 1,
    "adam": 2,
    "adamw": 2,
}  # number of optimizer arrays, each as large as the parameters


def held_bytes(model: onnx.ModelProto) -> int:
    """Return the peak memory of the computed tensors of a graph, in bytes.

    Parameters
    ----------
    model : onnx.ModelProto
        The graph; its inputs have fixed shapes. Tensors without an inferred shape are not counted.
    """
    graph = native.infer_shapes(model).graph
    sizes = dict(_sizes(graph))
    root: dict[str, str] = {}  # view -> tensor that owns its memory
    for node in graph.node:
        if node.op_type in VIEWS and not node.domain:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
    reads = Counter(root.get(n, n) for node in graph.node for n in set(node.input))
    for value in graph.output:
        reads[root.get(value.name, value.name)] += 1
    held = most = 0
    written: set[str] = set()
    for node in graph.node:
        fresh = [n for n in node.output if n and n not in root and reads[n]]
        written.update(fresh)
        held += sum(sizes.get(name, 0) for name in fresh)
        most = max(most, held)
        for name in {root.get(n, n) for n in set(node.input)}:
            reads[name] -= sum(root.get(n, n) == name for n in set(node.input))
            if not reads[name] and name in written:
                held -= sizes.get(name, 0)
    return most


def _sizes(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")]
        if kind.HasField("shape") and len(dims) == len(kind.shape.dim):
            width = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            yield value.name, math.prod(dims) * width


def parameter_bytes(form: TrainingForm, config: Config) -> int:
    """Return the bytes of the parameters, gradients, optimizer and saved states."""
    size = sum(4 * value.size for value in form.parameters.values())
    # start, current and best parameters, gradients; sum of gradients, moving average
    copies = 4 + (config.batches > 1) + (config.ema is not None)
    return (copies + STATES[config.optimizer]) * size


def fitted_to_memory(
    config: Config, form: TrainingForm, drawn: Callable[[int], onnx.ModelProto], budget: int
) -> tuple[Config, int]:
    """Return settings with the largest batch that fits; a step has as many samples as before.

    Parameters
    ----------
    config : Config
        The settings; they include the batch size and the number of batches per step.
    form : TrainingForm
        The training form of the network.
    drawn : callable
        Returns the training graph for a batch size.
    budget : int
        The memory budget in megabytes.

    Returns
    -------
    config : Config
        The new settings; their batch size divides the given batch size.
    megabytes : int
        The estimated memory of a step with these settings.

    Raises
    ------
    TrainingError
        A step with one sample does not fit.
    """
    size, one = config.samples, held_bytes(drawn(1))
    each = (held_bytes(drawn(size)) - one) / (size - 1) if size > 1 else 0
    fixed = parameter_bytes(form, config)

    def megabytes(batch: int) -> int:
        return math.ceil((fixed + one + each * (batch - 1)) / MEGABYTE)

    fitting = [b for b in range(1, size + 1) if size % b == 0 and megabytes(b) <= budget]
    if not fitting:
        raise TrainingError(
            f"--memory-budget {budget}: a step of one sample takes about {megabytes(1)} MB. Give "
            "at least that."
        )
    batch = max(fitting)
    changed = {"batch_size": batch, "accumulate": config.batches * size // batch}
    return msgspec.structs.replace(config, **changed, memory_budget=None), megabytes(batch)
