"""Run a training form with a loss and its gradients in an onnxruntime session.

`onnxqat.gradients` makes the graph, so that any onnxruntime can run it; with a training build, some
of its kernels are used. The session reads parameters from flat numpy buffers and writes gradients
to them in place, without copying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat import native
from onnxqat.device import CPU, Device
from onnxqat.errors import TrainingError
from onnxqat.gradients import add_gradients, drop_unread, installed_kernels
from onnxqat.qparams import FloatArray
from onnxqat.runtime import open_session
from onnxqat.train.form import TrainingForm
from onnxqat.train.losses import Arrays, Loss, add_loss

__all__ = [
    "HIGHEST",
    "LOWEST",
    "Flat",
    "StepGraph",
    "StepSession",
    "fix_batch",
    "forward_session",
    "step_graph",
]

LOWEST, HIGHEST = "/lowest", "/highest"
FLOAT = onnx.TensorProto.FLOAT


class Flat:
    """Named float32 arrays that lie one behind the other in one buffer.

    Attributes
    ----------
    buffer : float32 of shape (total,)
        All values.
    views : dict of str to float32 array
        The arrays, as views of the buffer.
    """

    def __init__(self, arrays: Mapping[str, FloatArray]) -> None:
        self.buffer: FloatArray = np.zeros(sum(a.size for a in arrays.values()), np.float32)
        self.views: dict[str, FloatArray] = {}
        start = 0
        for name, array in arrays.items():
            self.views[name] = self.buffer[start : start + array.size].reshape(array.shape)
            self.views[name][...] = array
            start += array.size


def forward_session(form: TrainingForm, *, threads: int = 0) -> ort.InferenceSession:
    """Return a session of the training form's forward pass; parameters are its inputs."""
    return open_session(form.proto, optimization="basic", threads=threads)


@dataclass(frozen=True, kw_only=True)
class StepGraph:
    """The graph of a loss and its gradients.

    Attributes
    ----------
    model : onnx.ModelProto
        The graph. Its outputs: ``loss``, ``<parameter>_grad``, the extremes of ``tensors``.
    classes : dict of str to (int, int or None)
        For each input of labels: the number of classes, and the label that is ignored.
    observed : dict of str to tuple of str
        The tensors that determine a clipping range, by `QuantPoint.parameters`.
    tensors : list of str
        All observed tensors, each once; ``<tensor>/lowest`` and ``<tensor>/highest`` are outputs.
    """

    model: onnx.ModelProto
    classes: dict[str, tuple[int, int | None]]
    observed: dict[str, tuple[str, ...]]
    tensors: list[str]


def step_graph(
    form: TrainingForm,
    loss: Loss,
    *,
    batch_size: int,
    arrays: Arrays | None = None,
    device: Device = CPU,
) -> StepGraph:
    """Return the graph of a training form's loss and gradients for a device.

    For the other parameters, see `StepSession`.
    """
    on_gpu = device.kind == "cuda"
    kernels: frozenset[str] = frozenset() if on_gpu else installed_kernels()
    parameters = set(form.parameters)
    fixed = fix_batch(form.proto, parameters, batch_size)
    model = fix_batch(add_loss(fixed, loss, arrays, parameters), parameters, batch_size)
    graph = add_gradients(model, form.learned - form.frozen, kernels=kernels, wide=on_gpu)
    observed = {name: tensors for name, tensors in form.observed.items() if tensors}
    tensors = sorted({t for tensors in observed.values() for t in tensors})
    _add_extremes(graph, tensors)
    drop_unread(graph)
    # onnxruntime runs the nodes of functions last: what gradients compute from the same tensors
    # would come first, and stay in memory through the whole forward pass
    graph = native.inline_functions(graph)
    return StepGraph(model=graph, classes=_classes(model), observed=observed, tensors=tensors)


class StepSession:
    """Computes the loss and the gradients of all parameters for a batch.

    Parameters
    ----------
    form : TrainingForm
        The training form.
    loss : Loss
        See `onnxqat.train.losses`.
    batch_size : int
        Samples in each batch; onnxruntime's pooling gradients need a fixed number.
    threads : int
        The number of threads (0: all cores).
    arrays : Arrays, optional
        The arrays of the data that the loss may read.
    other : StepSession, optional
        A session with at least these parameters, whose buffers are shared.

    Attributes
    ----------
    values, gradients : Flat
        The parameters by input name, and the gradients of the learned ones; the session reads and
        writes these buffers.
    inputs : set of str
        The inputs of the graph: the feeds of a batch, and the parameters.
    classes : dict of str to (int, int or None)
        For each input of labels: the number of classes, and the label that is ignored.

    Raises
    ------
    TrainingError
        A node between a parameter and the loss has no gradient.
    """

    def __init__(
        self,
        form: TrainingForm,
        loss: Loss,
        *,
        batch_size: int,
        threads: int = 0,
        arrays: Arrays | None = None,
        other: StepSession | None = None,
    ) -> None:
        self.values: Flat = Flat(form.parameters) if other is None else other.values
        graph = step_graph(form, loss, batch_size=batch_size, arrays=arrays)
        self.classes, self._observed, tensors = graph.classes, graph.observed, graph.tensors
        self._session = open_session(
            graph.model, optimization="basic", threads=threads, name="the training graph"
        )
        outputs = [o.name for o in self._session.get_outputs()]
        self.inputs = {i.name for i in self._session.get_inputs()}
        reached = form.with_gradient(outputs)
        zeros = {name: np.zeros_like(value) for name, value in reached.items()}
        self.gradients: Flat = Flat(zeros) if other is None else other.gradients
        self._loss = np.zeros((), np.float32)
        self._extremes = {t: np.zeros((2, 1), np.float32) for t in tensors}
        self._binding = self._session.io_binding()
        for name, array in self.values.views.items():
            if name in self.inputs:
                self._bind(self._binding.bind_input, name, array)
        targets = {"loss": self._loss}
        targets |= {f"{n}_grad": v for n, v in self.gradients.views.items()}
        for name, (low, high) in self._extremes.items():
            targets |= {f"{name}{LOWEST}": low.reshape(()), f"{name}{HIGHEST}": high.reshape(())}
        for name in outputs:
            self._bind(self._binding.bind_output, name, targets[name])

    @staticmethod
    def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> float:
        """Fill `gradients` for one batch and return its loss.

        Parameters
        ----------
        feeds : mapping of str to array
            Data, labels and teacher's outputs, by input name.
        """
        for name, array in feeds.items():
            if name in self.inputs:
                self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)
        return float(self._loss)

    def extremes(self) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest values in the last batch, by `TrainingForm.observed`."""
        found = {}
        for name, tensors in self._observed.items():
            ends = np.hstack([self._extremes[tensor] for tensor in tensors])
            found[name] = float(ends[0].min()), float(ends[1].max())
        return found


def fix_batch(model: onnx.ModelProto, parameters: set[str], batch_size: int) -> onnx.ModelProto:
    """Return a copy whose data inputs have this batch size, with all shapes inferred.

    Raises
    ------
    TrainingError
        onnx cannot infer the shapes.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    model = fixed
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in parameters and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = batch_size
    del model.graph.value_info[:]
    try:
        return native.infer_shapes(model)
    except native.NativeError as error:
        message = (
            f"Batches of {batch_size}: shapes cannot be inferred ({error}). Run 'onnxqat insert' "
            "again."
        )
        raise TrainingError(message) from error


def _classes(model: onnx.ModelProto) -> dict[str, tuple[int, int | None]]:
    """Return the number of classes and the ignored label, by input of labels."""
    values = (*model.graph.value_info, *model.graph.input)
    dims = {value.name: value.type.tensor_type.shape.dim for value in values}
    inputs = {value.name for value in model.graph.input}
    found: dict[str, tuple[int, int | None]] = {}
    for node in model.graph.node:
        if node.op_type == "SoftmaxCrossEntropyLoss" and node.input[1] in inputs:
            logits = dims.get(node.input[0], ())
            ignored = [a.i for a in node.attribute if a.name == "ignore_index"]
            if len(logits) > 1 and logits[1].dim_value:
                found[node.input[1]] = logits[1].dim_value, *(ignored or [None])
    return found


def _add_extremes(model: onnx.ModelProto, tensors: list[str]) -> None:
    """Add the smallest and the largest value of some tensors as outputs."""
    for name in tensors:
        for op, suffix in (("ReduceMin", LOWEST), ("ReduceMax", HIGHEST)):
            output = f"{name}{suffix}"
            model.graph.node.append(onnx.helper.make_node(op, [name], [output], keepdims=0))
            model.graph.output.append(onnx.helper.make_tensor_value_info(output, FLOAT, []))
