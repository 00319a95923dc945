"""Where a model is computed: the CPU, or a GPU that onnxruntime reaches by CUDA.

onnxruntime's packages for the CPU and for CUDA hold the same module, so that an environment has
one of them. A GPU is usable where a session with its provider can be opened.
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

__all__ = ["CPU", "DEVICE", "Device", "Precision", "check_device", "find_device"]

Precision: TypeAlias = Literal["tf32", "fp32"]
PRECISIONS = get_args(Precision)
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
# Set by the mpirun of Open MPI; of MPICH and Intel MPI; by Slurm: the number of a process on its
# machine.
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where sessions compute.

    Attributes
    ----------
    kind : {"cpu", "cuda"}
        As onnxruntime calls it.
    index : int
        Which GPU.
    precision : {"tf32", "fp32"}
        Of products of matrices and convolutions: float32, or TF32, whose factors have 10 bits
        behind the point and whose sums are float32 (NVIDIA, "TF32 precision format",
        https://blogs.nvidia.com/blog/tensorfloat-32-precision-format/).
    resident : bool
        Whether training keeps its arrays on the device between steps and its optimizer is a graph
        that runs there, as it is on a GPU. Of the CPU, numpy holds the arrays otherwise.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    index: int = 0
    precision: Precision = "fp32"
    resident: bool = False

    @property
    def name(self) -> str:
        """What a user calls it: ``cpu`` or ``cuda:0``."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def providers(self) -> list[Any]:
        """What onnxruntime is to use, by order of preference."""
        if self.kind == "cpu":
            return ["CPUExecutionProvider"]
        options = {
            "device_id": str(self.index),
            "use_tf32": str(int(self.precision == "tf32")),
            # several sessions share the memory of the GPU
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]

    def __str__(self) -> str:
        return f"{self.name} ({self.precision})"


CPU = Device()


def check_device(where: str, device: str, precision: str | None) -> None:
    """Refuse words that name no device or precision.

    Raises
    ------
    OptionError
        The word is quoted.
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
        ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a usable GPU, else the CPU. Without a number
        each process of a machine takes a GPU of its own.
    precision : {"tf32", "fp32"} or None
        None: TF32 on a GPU, and float32 on the CPU, which has nothing else.
    rank, size : int
        Which of the processes that work together this is, and how many there are.

    Raises
    ------
    OptionError
        The device cannot be used; what to install is said.
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
            return Device(kind="cuda", index=index, precision=found, resident=True)
        if kind == "cuda":
            raise OptionError(f"--device {text}: {problem}")
    if precision == "tf32":
        raise OptionError("--precision tf32: the CPU computes in fp32. Leave --precision out.")
    return CPU


def _local_rank(rank: int) -> int:
    """Return the number of this process on its machine, which is that of its GPU."""
    numbers = [os.environ[name] for name in LOCAL_RANKS if name in os.environ]
    return int(numbers[0]) if rank and numbers else rank


@cache
def _problem(index: int) -> str | None:
    """Return why a GPU cannot be used, and what to do about it; None where it can."""
    import onnxruntime as ort

    installed = runtime_distribution()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"{installed} computes on the CPU alone. {changing_to_cuda()}"
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):  # onnxruntime prints what it tries
        if hasattr(ort, "preload_dlls"):  # the libraries of CUDA that pip installed
            ort.preload_dlls()
        reason = _refusal(index)
    if reason is None:
        return None
    return (
        f"{installed} cannot use GPU {index} ({reason}). See whether nvidia-smi shows it, and "
        f"which CUDA its driver is for. {changing_to_cuda()}"
    )


def _refusal(index: int) -> str | None:
    """Return what onnxruntime says against a session on a GPU."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    device = Device(kind="cuda", index=index)
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=device.providers[:1]
        )
    except Exception as error:  # the bindings raise a class per status code
        return " ".join(str(error).split())[:200].rstrip(".")
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return "the libraries of CUDA or cuDNN cannot be loaded"
    return None
