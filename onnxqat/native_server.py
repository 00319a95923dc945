"""Run onnx's compiled functions on models that are read from stdin; see `onnxqat.native`.

This is a separate program. It loads only onnx's extension module, without the packages around it,
which takes a tenth of the time. A request is a line ``NAME NUMBER BYTES`` followed by the model; an
answer is a line ``ok BYTES`` or ``error BYTES`` followed by the result or the message.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import resource
import sys
from collections.abc import Callable
from typing import Any


def load(path: str) -> Any:
    """Load onnx's extension module from its file."""
    name = "onnx.onnx_cpp2py_export"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def limit(kind: int, value: int) -> None:
    """Set a resource limit of this process, but not above its current limit."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def serve(path: str, memory: int, seconds: int) -> None:
    """Answer requests until stdin ends, within ``memory`` bytes and ``seconds`` of CPU for each."""
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, memory)
    onnx = load(path)
    calls: dict[str, Callable[[bytes, int], bytes]] = {
        "infer_shapes": lambda data, strict: onnx.shape_inference.infer_shapes(
            data, False, bool(strict), True
        ),
        "convert_version": onnx.version_converter.convert_version,
        "inline_functions": lambda data, _: onnx.inliner.inline_local_functions(data, False),
    }
    while line := sys.stdin.buffer.readline():
        name, number, size = line.split()
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        state = b"ok"
        try:
            answer = calls[name.decode()](sys.stdin.buffer.read(int(size)), int(number))
        except MemoryError:
            state, answer = b"error", b"needs more than %d MiB" % (memory >> 20)
        except Exception as error:  # the C++ part can throw anything
            state, answer = b"error", (str(error) or type(error).__name__).encode()
        sys.stdout.buffer.write(b"%s %d\n%s" % (state, len(answer), answer))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
