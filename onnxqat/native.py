"""Run onnx's compiled functions in a separate process, so that a model cannot crash or block ours.

For a malformed file, shape inference, the version converter and the inliner can read beyond the end
of a buffer or run forever. They run in a small process, which is started by the first call and used
by the following ones. It may use `MEMORY` bytes, and `SECONDS` of CPU time for each call. If it
crashes, the call fails and the next call starts a new process. Initializers of more than
`MAX_ELEMENTS` elements are sent without their data, which these functions do not need, and get
their data back in the answer.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Container
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from onnxqat.errors import ModelError
from onnxqat.preserve import copy_fields

__all__ = ["NativeError", "convert_version", "infer_shapes", "inline_functions"]

MEMORY = 2**30  # a transformer of 50,000 nodes needs half of it
SECONDS = 10
MAX_ELEMENTS = 1024  # larger initializers are weights; smaller ones may be shapes and scales
MAX_ANSWER = 2**29  # bytes; a model without weights is smaller
SERVER = Path(__file__).with_name("native_server.py")


class NativeError(ModelError):
    """A function of onnx refused a model, or crashed on it."""


def infer_shapes(model: onnx.ModelProto, *, strict: bool = False) -> onnx.ModelProto:
    """Return the model with the types and shapes that onnx infers, with data propagation.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; it is not changed.
    strict : bool
        Raise an error if a node contradicts its inputs, instead of stopping there.

    Raises
    ------
    NativeError
        onnx refuses the model, or the process crashed.
    """
    return _call("infer_shapes", int(strict), model)


def convert_version(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """Return the model in another opset of the default domain; raises like `infer_shapes`."""
    return _call("convert_version", target, model)


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its function calls inlined; raises like `infer_shapes`."""
    return _call("inline_functions", 0, model)


class _Server:
    """The process, and the communication with it."""

    def __init__(self) -> None:
        extension = onnx.onnx_cpp2py_export.__file__
        # isolated and without site-packages, which it does not need
        command = [sys.executable, "-I", "-S", str(SERVER), extension, str(MEMORY), str(SECONDS)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a terminal sends Ctrl-C to our whole process group
        )

    def ask(self, name: str, number: int, data: bytes) -> tuple[bytes, bytes]:
        """Return the state and the answer; raises OSError or EOFError if the process has ended."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(b"%s %d %d\n" % (name.encode(), number, len(data)))
        requests.write(data)
        requests.flush()
        state, size = (answers.readline().split() or [b"", b"0"])[:2]
        answer = answers.read(min(int(size), MAX_ANSWER))
        if not state or len(answer) < int(size):
            raise EOFError
        return state, answer

    def end(self) -> int:
        """End the process, and return its exit code (negative: a signal)."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # unsent data cannot be flushed
                if pipe is not None:
                    pipe.close()
        return self.process.wait()


class _Door:
    """Owns the single process, from its first use until our process ends."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: _Server | None = None

    def ask(self, name: str, number: int, data: bytes) -> tuple[bytes, bytes]:
        with self.lock:
            self.server = self.server or _Server()
            try:
                return self.server.ask(name, number, data)
            except (OSError, EOFError) as error:
                code = self.server.end()
                self.server = None
                raise NativeError(f"onnx's {name} {_reason(code)}") from error
            except BaseException:  # interrupted: the next call would read this answer
                self.close()
                raise

    def close(self) -> None:
        if self.server is not None:
            self.server.end()
            self.server = None

    def after_fork(self) -> None:
        """Leave the process to the parent after a fork; two users would mix up the answers."""
        if self.server is not None:
            self.server.process.returncode = 0  # only the parent may wait for it
        self.lock, self.server = threading.Lock(), None


def _reason(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {SECONDS} s of CPU time"
    if code == -signal.SIGKILL:
        return f"returned more than {MAX_ANSWER} bytes, or was killed"
    return f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


_door = _Door()
atexit.register(_door.close)
os.register_at_fork(after_in_child=_door.after_fork)


def _call(name: str, number: int, model: onnx.ModelProto) -> onnx.ModelProto:
    large = {t.name: t for t in model.graph.initializer if math.prod(t.dims) > MAX_ELEMENTS}
    try:
        data = _without_data(model, large).SerializeToString()
        state, answer = _door.ask(name, number, data)
    except (OSError, ValueError, EncodeError) as error:  # no process, or above 2 GB
        raise NativeError(f"onnx's {name} cannot be called ({error})") from error
    if state != b"ok":
        raise NativeError(answer.decode(errors="replace").strip().splitlines()[0])
    try:
        result: onnx.ModelProto = onnx.ModelProto.FromString(answer)
    except DecodeError as error:  # subgraphs nest deeper than protobuf reads
        raise NativeError(f"the result of onnx's {name} cannot be read ({error})") from error
    for tensor in result.graph.initializer:
        if tensor.name in large:
            tensor.CopyFrom(large[tensor.name])
    return result


def _without_data(model: onnx.ModelProto, large: Container[str]) -> onnx.ModelProto:
    light = onnx.ModelProto()
    copy_fields(model, light, but="graph")
    copy_fields(model.graph, light.graph, but="initializer")
    for tensor in model.graph.initializer:
        if tensor.name in large:
            light.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
        else:
            light.graph.initializer.add().CopyFrom(tensor)
    return light
