"""The device that runs a model: the CPU, or a GPU through onnxruntime's CUDA provider.

onnxruntime's packages for the CPU and for CUDA contain the same module, so an environment can hold
only one of them. A GPU is usable if a session with the CUDA provider can be opened on it.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

from onnxqat.environment import changing_to_cuda, runtime_distribution
from onnxqat.errors import OptionError

__all__ = [
    "CPU",
    "DEVICE",
    "LOG_FATAL_ONLY",
    "Device",
    "Precision",
    "check_device",
    "find_device",
]

LOG_FATAL_ONLY = 4  # failures raise exceptions, whose text is reported

Precision: TypeAlias = Literal["tf32", "fp32"]
PRECISIONS = get_args(Precision)
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
# The number of a process on its machine. Set by Open MPI, by MPICH and Intel MPI, and by Slurm.
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device on which sessions run.

    Attributes
    ----------
    kind : {"cpu", "cuda"}
        The device type, as onnxruntime calls it.
    index : int
        The number of the GPU.
    precision : {"tf32", "fp32"}
        Precision of matrix products and convolutions: float32, or TF32, which rounds the factors
        to 10 bits after the binary point and sums in float32 (NVIDIA, "TF32 precision format",
        https://blogs.nvidia.com/blog/tensorfloat-32-precision-format/).
    resident : bool
        Whether training keeps its arrays on the device between steps and runs the optimizer there
        as a graph. Always true on a GPU. If false, numpy holds the arrays.
    captures : bool
        Whether a training step is replayed as a CUDA graph, if onnxruntime can do that.
    captured : bool
        Whether the first run of a session on a GPU records such a graph, and the others replay it.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    index: int = 0
    precision: Precision = "fp32"
    resident: bool = False
    captures: bool = False
    captured: bool = False

    @property
    def name(self) -> str:
        """The name that a user gives: ``cpu`` or ``cuda:0``."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def providers(self) -> list[Any]:
        """The execution providers for onnxruntime, in order of preference."""
        if self.kind == "cpu":
            return ["CPUExecutionProvider"]
        options = {
            "device_id": str(self.index),
            "use_tf32": str(int(self.precision == "tf32")),
            # several sessions share the memory of the GPU
            "arena_extend_strategy": "kSameAsRequested",
        }
        if self.captured:
            options["enable_cuda_graph"] = "1"
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]

    def __str__(self) -> str:
        return f"{self.name} ({self.precision})"


CPU = Device()


def check_device(where: str, device: str, precision: str | None) -> None:
    """Refuse text that names no device or precision.

    Raises
    ------
    OptionError
        The text is not valid; the message quotes it.
    """
    if not DEVICE.fullmatch(device):
        raise OptionError(f"{where}: device is '{device}'. Give auto, cpu, cuda or cuda:N.")
    if precision not in (None, *PRECISIONS):
        raise OptionError(f"{where}: precision is '{precision}'. Give {' or '.join(PRECISIONS)}.")


def find_device(text: str, precision: str | None = None, *, rank: int = 0, size: int = 1) -> Device:
    """Return the device that a user names.

    Parameters
    ----------
    text : str
        ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a usable GPU, else the CPU. Without a number,
        each process on a machine uses its own GPU.
    precision : {"tf32", "fp32"} or None
        None: TF32 on a GPU. The CPU always uses float32.
    rank, size : int
        The number of this process among those that work together, and their count.

    Raises
    ------
    OptionError
        The device cannot be used; the message says what to install.
    """
    check_device("--device", text, precision)
    kind, _, number = text.partition(":")
    if kind != "cpu":
        index = int(number) if number else _local_rank(rank)
        problem = _problem(index)
        if number and size > 1:
            raise OptionError(
                f"--device {text}: {size} processes would share one GPU. Pass --device cuda, which "
                "takes one for each process."
            )
        if problem is None:
            found: Precision = "fp32" if precision == "fp32" else "tf32"
            return Device(kind="cuda", index=index, precision=found, resident=True, captures=True)
        if kind == "cuda":
            raise OptionError(f"--device {text}: {problem}")
    if precision == "tf32":
        raise OptionError("--precision tf32: the CPU computes in fp32. Leave --precision out.")
    return CPU


def _local_rank(rank: int) -> int:
    """Return the number of this process on its machine; its GPU has the same number."""
    numbers = [os.environ[name] for name in LOCAL_RANKS if name in os.environ]
    return int(numbers[0]) if rank and numbers else rank


@cache
def _problem(index: int) -> str | None:
    """Return why a GPU cannot be used and what to do about it; None if it can be used."""
    import onnxruntime as ort

    installed = runtime_distribution()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"{installed} computes on the CPU alone. {changing_to_cuda()}"
    # otherwise onnxruntime writes what it tries, and later each error, to the terminal
    ort.set_default_logger_severity(LOG_FATAL_ONLY)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):  # onnxruntime prints its attempts
        if hasattr(ort, "preload_dlls"):  # loads the CUDA libraries that pip installed
            ort.preload_dlls()
        reason = _refusal(index)
    if reason is None:
        return None
    return (
        f"{installed} cannot use GPU {index} ({reason}). Run nvidia-smi: does it show the "
        f"GPU, and does the driver support this version of CUDA? {changing_to_cuda()}"
    )


def _refusal(index: int) -> str | None:
    """Return why onnxruntime cannot open a session on a GPU; None if it can."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    device = Device(kind="cuda", index=index)
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=device.providers[:1]
        )
    except Exception as error:  # the bindings raise a class per status code
        return " ".join(str(error).split())[:200].rstrip(".")
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return "the driver, or the libraries of CUDA or cuDNN, cannot be loaded"
    return None
