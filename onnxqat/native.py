"""onnx's compiled functions in a process of their own: a model cannot kill or stall ours with them.

Shape inference, the version converter and the inliner read past the end of what a malformed file
holds, and some graphs keep them busy for ever. They run in a small process that starts with the
first call, stays for the next ones, and may take `MEMORY` and, for each call, `SECONDS` of
processor time. One that dies costs the call; the next call starts another. Initializers of more
than `MAX_ELEMENTS` are sent without their data, which none of these functions looks at, and get it
back in the answer.
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

MEMORY = 2**30  # a transformer of 50,000 nodes takes half of it
SECONDS = 10
MAX_ELEMENTS = 1024  # larger initializers are weights; smaller ones may be shapes and scales
MAX_ANSWER = 2**29  # bytes; a model without weights has no more
SERVER = Path(__file__).with_name("native_server.py")


class NativeError(ModelError):
    """A function of onnx refused a model, or died of it."""


def infer_shapes(model: onnx.ModelProto, *, strict: bool = False) -> onnx.ModelProto:
    """Return the model with the types and shapes that onnx infers, values of shapes included.

    Parameters
    ----------
    model : onnx.ModelProto
        Not changed.
    strict : bool
        Raise where a node contradicts its inputs, instead of stopping there.

    Raises
    ------
    NativeError
        onnx refuses the model, or the process died.
    """
    return _call("infer_shapes", int(strict), model)


def convert_version(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """Return the model in another opset of the default domain; raises as `infer_shapes`."""
    return _call("convert_version", target, model)


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with functions in place of their calls; raises as `infer_shapes`."""
    return _call("inline_functions", 0, model)


class _Server:
    """The process, and how to talk to it."""

    def __init__(self) -> None:
        extension = onnx.onnx_cpp2py_export.__file__
        # isolated and without site-packages, which it has no use for
        command = [sys.executable, "-I", "-S", str(SERVER), extension, str(MEMORY), str(SECONDS)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a terminal sends Ctrl-C to the whole group of ours
        )

    def ask(self, name: str, number: int, data: bytes) -> tuple[bytes, bytes]:
        """Return the state and the answer; raises OSError or EOFError when the process is gone."""
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
        """End the process, and return how it ended: below 0 is a signal."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not sent has nobody to read it
                if pipe is not None:
                    pipe.close()
        return self.process.wait()


class _Door:
    """Holds the one process that there is, from its first use to the end of ours."""

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
            except BaseException:  # an interruption: the answer would be the next call's
                self.close()
                raise

    def close(self) -> None:
        if self.server is not None:
            self.server.end()
            self.server = None

    def after_fork(self) -> None:
        """Leave the process to our parent; a second one asking it would mix up the answers."""
        if self.server is not None:
            self.server.process.returncode = 0  # it is not ours to wait for
        self.lock, self.server = threading.Lock(), None


def _reason(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {SECONDS} s of processor time"
    if code == -signal.SIGKILL:
        return f"returned more than {MAX_ANSWER} bytes, or was killed"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


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
    except DecodeError as error:  # of subgraphs that nest deeper than protobuf reads
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
