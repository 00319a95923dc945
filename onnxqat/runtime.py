"""Sessions of onnxruntime: how a model is executed, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.errors import ModelError

__all__ = ["Optimization", "TensorReader", "open_session"]

# all: what a user's runtime does; basic: only rewrites that keep every value bit for bit;
# none: node by node as the file says.
Optimization = Literal["all", "basic", "none"]
LEVELS = {"all": "ORT_ENABLE_ALL", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL"}
LOG_FATAL_ONLY = 4  # failures come as exceptions, whose text we pass on


def open_session(
    model: onnx.ModelProto | bytes, *, optimization: Optimization, threads: int = 0
) -> ort.InferenceSession:
    """Return a CPU session.

    Q/DQ pairs are never fused into integer kernels: the arithmetic is what the file says.

    Parameters
    ----------
    model : onnx.ModelProto or bytes
        The model.
    optimization : {"all", "basic", "none"}
        How far onnxruntime may rewrite the graph.
    threads : int
        0 takes all cores.

    Raises
    ------
    ModelError
        onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_FATAL_ONLY
    # the pattern of the first run becomes one block beside what that run took: twice the memory
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization])
    try:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise a class per status code
        message = str(error).splitlines()[0]
        raise ModelError(f"onnxruntime cannot load the model: {message}") from error


class TensorReader:
    """A session that returns tensors of a model by name, inner ones too.

    Parameters
    ----------
    model : onnx.ModelProto
        Not changed but for its outputs: those of ``names`` that it lacks are added.
    names : iterable of str
        What to read; a graph input is none of them.
    optimization, threads
        As `open_session`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        names: Iterable[str],
        *,
        optimization: Optimization,
        threads: int = 0,
    ) -> None:
        self.names = list(names)
        present = {value.name for value in model.graph.output}
        added = (onnx.ValueInfoProto(name=name) for name in self.names if name not in present)
        model.graph.output.extend(added)
        self.session = open_session(model, optimization=optimization, threads=threads)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the tensors for one batch."""
        if not self.names:  # a session that is asked for nothing returns all of its outputs
            return {}
        return dict(zip(self.names, self.session.run(self.names, dict(inputs)), strict=True))
