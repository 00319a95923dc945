"""Run models in sessions of onnxruntime, with errors that name the model and the node."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.device import CPU, LOG_FATAL_ONLY, Device
from onnxqat.errors import DataError, ModelError, OnnxQatError

__all__ = ["Optimization", "Session", "UnknownOpError", "explained_memory", "open_session"]

# all: as in a user's runtime; basic: only rewrites that keep all values bit for bit; none: node by
# node as in the file.
Optimization = Literal["all", "basic", "none"]
LEVELS = {"all": "ORT_ENABLE_ALL", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL"}
STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
SOURCE_LINE = re.compile(r"^\S+\.(h|cc|cpp):\d+ (.* was false\. )?")  # in onnxruntime's own files
FAILED = re.compile(r"while running (\w+) node\. Name:'(.*?)' Status Message: (.*)", re.DOTALL)
TENSOR_OF_NUMBERS = re.compile(r"tensor\((?!string)\w+\)")
UNKNOWN = re.compile(r"Fatal error: (?:(\S*):)?(\w+)\(-?\d+\) is not a registered function/op")
UNREGISTERED = re.compile(r"No Op registered for (\w+) with domain_version")
FULL = re.compile(r"out of memory|Failed to allocate memory|ALLOC_FAILED|bad.?alloc", re.IGNORECASE)
WITHOUT_KERNEL = re.compile(
    r"Could not find an implementation for (\w+)\(\d+\) node with name '(.*)'"
)

# The advice for a failing node, by its op.
ADVICE = {
    "Reshape": "If its shape contains the batch size of the export, pass that as --batch-size "
    "(often 1), or export with a dynamic batch.",
    **dict.fromkeys(
        ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "OneHot"),
        "Check that the integers of the data are valid indices of the model.",
    ),
}
OTHERWISE = (
    "Check that the shapes and values of the data are what the model expects, and pass "
    "--batch-size 1 if it was exported for one sample."
)


class UnknownOpError(ModelError):
    """onnxruntime lacks an op, or a kernel of it for these types.

    Attributes
    ----------
    op : str
        The type of the op.
    node : str or None
        The name of the only node that cannot run; None if no node of this type can.
    """

    def __init__(self, message: str, op: str, node: str | None) -> None:
        super().__init__(message)
        self.op, self.node = op, node


class Session(ort.InferenceSession):  # type: ignore[misc]
    """A session whose failures become an `OnnxQatError` that names the model and the node.

    Parameters
    ----------
    name : str
        The name of the model in messages.
    model : bytes
        The model, as in a file.
    options : SessionOptions
        See onnxruntime.
    outputs_of_unnamed : mapping of str to list of str
        The first outputs of the nodes without a name, by op.
    device : Device
        The device that runs the model.
    """

    # onnxruntime's own fallback prints text, and then runs the model on the CPU unnoticed
    _enable_fallback = property(lambda _: False, lambda *_: None)

    def __init__(
        self,
        name: str,
        model: bytes,
        options: ort.SessionOptions,
        outputs_of_unnamed: Mapping[str, list[str]],
        device: Device = CPU,
    ) -> None:
        self.name, self._outputs_of_unnamed, self._device = name, outputs_of_unnamed, device
        try:
            super().__init__(
                model,
                options,
                providers=device.providers,
                disabled_optimizers=["ReshapeFusion"],  # its nodes would be the last to run
            )
        except Exception as error:  # the bindings raise a class per status code
            said = _said(error)
            raise (_full_memory(name, said, device) or _load_error(name, said)) from error
        if device.kind == "cuda" and "CUDAExecutionProvider" not in self.get_providers():
            raise ModelError(
                f"{name}: onnxruntime could not open it on {device.name}. Check "
                "whether another process uses the GPU's memory (nvidia-smi), or pass --device cpu."
            )

    def run(self, *arguments: Any, **others: Any) -> Any:
        """Return the outputs, see onnxruntime.

        Raises
        ------
        ModelError
            A node does not run on these values.
        DataError
            The values do not fit the model's inputs.
        """
        with self._explained():
            return super().run(*arguments, **others)

    def run_with_iobinding(self, *arguments: Any, **others: Any) -> Any:
        """Run on bound arrays, see onnxruntime; raises the errors of `run`."""
        with self._explained():
            return super().run_with_iobinding(*arguments, **others)

    def run_in_place(
        self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """Return the outputs like `run`, but float32 outputs without copying them.

        Such an array keeps onnxruntime's memory alive, and must not be written to. A session with
        string outputs, or with outputs that are not tensors, copies all outputs.

        Raises
        ------
        ModelError, DataError
            As for `run`.
        """
        ends = (*self.get_inputs(), *self.get_outputs())
        if not all(TENSOR_OF_NUMBERS.fullmatch(end.type) for end in ends):
            copied: list[NDArray[Any]] = self.run(names, feeds)
            return copied
        with self._explained():
            binding = self.io_binding()
            for name, values in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(values).reshape(values.shape))
            for name in names:
                binding.bind_output(name, "cpu")
            self.run_with_iobinding(binding)
            return [_in_place(value) for value in binding.get_outputs()]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OnnxQatError:
            raise
        except Exception as error:  # the bindings raise a class per status code
            raise self._run_error(_said(error)) from error

    def _run_error(self, said: str) -> OnnxQatError:
        if (full := _full_memory(self.name, said, self._device)) is not None:
            return full
        found = FAILED.search(said)
        if found is None:
            what = said.removesuffix("Please fix either the inputs/outputs or the model.")
            return DataError(
                f"{self.name}: does not run on the data ({what.rstrip(' .')}). "
                "Store them in the shapes and dtypes of the model's inputs."
            )
        op, node, why = found.groups()
        outputs = self._outputs_of_unnamed.get(op, [])
        where = f"node '{node}' ({op})"
        if not node and len(outputs) == 1:
            where = f"the {op} that computes '{outputs[0]}'"
        elif not node:
            where = f"a node of type {op}"
        why = SOURCE_LINE.sub("", why).strip().rstrip(".")
        advice = ADVICE.get(op, OTHERWISE)
        return ModelError(f"{self.name}: {where} does not run on the data ({why}). {advice}")


def _in_place(value: ort.OrtValue) -> NDArray[Any]:
    """Return the array of a value; for float32, a view of its memory."""
    if value.data_type() != "tensor(float)" or 0 in value.shape():
        copied: NDArray[Any] = value.numpy()
        return copied
    length = math.prod(value.shape())
    memory = (ctypes.c_float * length).from_address(value.data_ptr())
    memory.value = value  # lives as long as the array
    view = np.frombuffer(memory, np.float32).reshape(value.shape())
    view.flags.writeable = False
    return view


def _said(error: Exception) -> str:
    """Return onnxruntime's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return STATUS.sub("", text)


def _full_memory(name: str, said: str, device: Device) -> ModelError | None:
    """Return an error if a message says that the memory of a GPU is full, otherwise None."""
    if device.kind == "cpu" or FULL.search(said) is None:
        return None
    return ModelError(
        f"{name}: the memory of {device.name} is full. Pass a smaller --batch-size (in training, "
        "with a larger --accumulate); nvidia-smi shows what else uses it."
    )


@contextmanager
def explained_memory(name: str, device: Device) -> Iterator[None]:
    """Raise a `ModelError` with advice if an array does not fit into the memory of a device."""
    try:
        yield
    except OnnxQatError:
        raise
    except Exception as error:  # the bindings raise a class per status code
        if (full := _full_memory(name, _said(error), device)) is not None:
            raise full from error
        raise


def _load_error(name: str, said: str) -> ModelError:
    for pattern in (UNKNOWN, UNREGISTERED, WITHOUT_KERNEL):
        if found := pattern.search(said):
            op = found[2] if pattern is UNKNOWN else found[1]
            node = (found[2] or None) if pattern is WITHOUT_KERNEL else None
            lacking = f"onnxruntime has no {op}"
            if pattern is WITHOUT_KERNEL:
                where = f"node '{node}'" if node else "a node"
                lacking = f"onnxruntime cannot run {where} ({op}) with its data types"
            elif pattern is UNKNOWN and found[1]:
                lacking += f" of the domain '{found[1]}'"
            return UnknownOpError(f"{name}: {lacking}. Export without it.", op, node)
    return ModelError(f"{name}: onnxruntime cannot load the model: {said}")


def open_session(
    model: onnx.ModelProto | bytes,
    *,
    optimization: Optimization,
    threads: int = 0,
    name: str = "the model",
    device: Device = CPU,
) -> Session:
    """Return a session.

    Q/DQ pairs are never fused into integer kernels, so the arithmetic is that of the file.

    Parameters
    ----------
    model : onnx.ModelProto or bytes
        The model.
    optimization : {"all", "basic", "none"}
        How far onnxruntime may rewrite the graph.
    threads : int
        The number of threads; 0: all cores.
    name : str
        The name of the model in messages.
    device : Device
        The device that runs the model; ops without a CUDA kernel run on the CPU.

    Raises
    ------
    ModelError
        onnxruntime refuses the model.
    UnknownOpError
        onnxruntime lacks an op of the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_FATAL_ONLY
    # otherwise onnxruntime plans one block from the first run, beside the memory of that run: twice
    # the memory
    options.enable_mem_pattern = False
    # otherwise onnxruntime walks back from one output after the other, and keeps what others need
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization])
    outputs: dict[str, list[str]] = {}
    if isinstance(model, onnx.ModelProto):
        for node in model.graph.node:
            if not node.name and node.output:
                outputs.setdefault(node.op_type, []).append(node.output[0])
        model = model.SerializeToString()
    return Session(name, model, options, outputs, device)
