"""onnx's compiled functions run elsewhere, so that what kills them kills nobody else."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxqat import native

TEXT = """<ir_version: 8, opset_import: ["": 11]>
    g (float[N,4] x) => (y) { a = MatMul(x, w) y = Relu(a) }"""


def small() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TEXT)
    weight = np.arange(4 * 512, dtype=np.float32).reshape(4, 512)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return proto


@pytest.fixture
def _door(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask a process that starts with the limits that a test sets."""
    door = native._Door()
    monkeypatch.setattr(native, "_door", door)
    yield
    door.close()


def test_the_answers_are_those_of_onnx() -> None:
    proto = small()
    before = proto.SerializeToString()

    inferred = native.infer_shapes(proto)
    converted = native.convert_version(proto, 13)

    assert inferred == onnx.shape_inference.infer_shapes(proto, data_prop=True)
    assert converted == onnx.version_converter.convert_version(proto, 13)
    assert proto.SerializeToString() == before


def test_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "my": 1]>
    g (float[2] x) => (float[2] y) { y = my.f(x) }
    <domain: "my", opset_import: ["": 17]> f (p) => (q) { q = Relu(p) }"""

    inlined = native.inline_functions(onnx.parser.parse_model(text))

    assert [node.op_type for node in inlined.graph.node] == ["Relu"]


def test_a_refusal_is_one_line() -> None:
    proto = onnx.parser.parse_model(TEXT.replace("MatMul(x, w)", "Concat(x, x)"))

    with pytest.raises(native.NativeError, match="axis") as caught:
        native.infer_shapes(proto, strict=True)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_door")
def test_a_process_that_dies_is_named_and_replaced() -> None:
    native.infer_shapes(small())
    server = native._door.server
    assert server is not None
    os.kill(server.process.pid, signal.SIGSEGV)

    with pytest.raises(native.NativeError, match="infer_shapes crashed with SIGSEGV"):
        native.infer_shapes(small())
    assert native.infer_shapes(small()).graph.value_info[0].name == "a"


@pytest.mark.usefixtures("_door")
def test_what_a_terminal_sends_to_our_group_does_not_reach_the_process() -> None:
    """Not even while it starts, when Python has no handler yet."""
    native.infer_shapes(small())
    server = native._door.server
    assert server is not None

    assert os.getpgid(server.process.pid) == server.process.pid


@pytest.mark.usefixtures("_door")
def test_a_process_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape inference computes the values of constants, whose sizes nobody has looked at."""
    monkeypatch.setattr(native, "MEMORY", 2**27)
    steps = " ".join(f"d{i + 1} = Concat<axis = 0>({', '.join([f'd{i}'] * 16)})" for i in range(9))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y)
        <float[8] d0 = {{1,1,1,1,1,1,1,1}}> {{ {steps} c = ReduceSum(d9) y = Add(x, c) }}"""
    )

    with pytest.raises(native.NativeError, match="needs more than 128 MiB"):
        native.infer_shapes(proto)


@pytest.mark.usefixtures("_door")
def test_a_process_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SECONDS", 0)
    nodes = " ".join(f"t{i + 1} = Relu(t{i})" for i in range(60000))
    header = '<ir_version: 8, opset_import: ["": 17]> g (float[2] t0) => (float[2] t60000)'
    proto = onnx.parser.parse_model(f"{header} {{ {nodes} }}")

    def ask() -> None:
        for _ in range(20):
            native.convert_version(proto, 18)

    with pytest.raises(native.NativeError, match="took more than 0 s of CPU time"):
        ask()


@pytest.mark.usefixtures("_door")
def test_limits_of_our_own_process_hold_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_CPU)
    command = subprocess.Popen

    def limited(*arguments: Any, **others: Any) -> Any:
        hard = (10**6, 10**6)
        limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, hard)  # noqa: E731
        return command(*arguments, **others, preexec_fn=limit)

    monkeypatch.setattr(subprocess, "Popen", limited)

    assert native.infer_shapes(small()).graph.value_info[0].name == "a"
    assert resource.getrlimit(resource.RLIMIT_CPU) == before


@pytest.mark.usefixtures("_door")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_has_a_process_of_its_own() -> None:
    native.infer_shapes(small())
    server = native._door.server
    assert server is not None
    os.register_at_fork(after_in_child=native._door.after_fork)
    child = os.fork()
    if child == 0:
        try:
            native.infer_shapes(small())
            other = native._door.server
            native._door.close()
            os._exit(0 if other is not None and other is not server else 1)
        finally:
            os._exit(2)

    assert os.waitpid(child, 0)[1] == 0
    assert native.infer_shapes(small()).graph.value_info[0].name == "a"
    assert native._door.server is server
