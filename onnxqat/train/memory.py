"""How much memory a training step takes, and the batch that fits into a budget.

The tensors of a graph are counted as they live: from the node that writes one to the last that
reads it, in the order of the graph (Griewank and Walther 2008, "Evaluating Derivatives", chapter
4: storage of the reverse mode). What a kernel needs besides, and what an allocator rounds up, is
not in it.
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
# Ops whose output is their first input's memory.
VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
STATES = {"sgd": 1, "adam": 2, "adamw": 2}  # arrays as large as the parameters


def held_bytes(model: onnx.ModelProto) -> int:
    """Return the most that the computed tensors of a graph take at once, in bytes.

    Parameters
    ----------
    model : onnx.ModelProto
        Its inputs have fixed shapes. A tensor whose shape cannot be inferred counts nothing.
    """
    graph = native.infer_shapes(model).graph
    sizes = dict(_sizes(graph))
    root: dict[str, str] = {}  # of a view, whose memory it is
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
    """Return the bytes of parameters, gradients, the optimizer, and the states that are kept."""
    size = sum(4 * value.size for value in form.parameters.values())
    # the start, the present, the best, the gradients; their sum and the moving average
    copies = 4 + (config.batches > 1) + (config.ema is not None)
    return (copies + STATES[config.optimizer]) * size


def fitted_to_memory(
    config: Config, form: TrainingForm, drawn: Callable[[int], onnx.ModelProto], budget: int
) -> tuple[Config, int]:
    """Return the settings with the largest batch that fits, and as many batches as make the step.

    Parameters
    ----------
    config : Config
        With the batch of a step, and how many of them.
    form : TrainingForm
        What is trained.
    drawn : callable
        Returns the graph of a step for a batch size.
    budget : int
        Megabytes.

    Returns
    -------
    config : Config
        Its batch divides the one that was given.
    megabytes : int
        What a step takes with it, see above.

    Raises
    ------
    TrainingError
        One sample does not fit.
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
