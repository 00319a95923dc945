from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxqat import external, model
from onnxqat.calibration import placeholder_params
from onnxqat.errors import ModelError
from onnxqat.model import load_model
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import convnet
from tests.oracles import run_ort

SIDE = 64


def write(folder: Path, count: int = 3, *, side: int = SIDE, offset: int = 0) -> Path:
    """Write a chain of MatMuls whose weights lie in one file, some at an odd offset."""
    rng = np.random.default_rng(0)
    weight = rng.normal(scale=side**-0.5, size=(side, side)).astype(np.float32)
    tensors, nodes = [], []
    with (folder / "weights.bin").open("wb") as file:
        file.write(b"\0" * offset)
        for i in range(count):
            tensor = TensorProto(name=f"w{i}", data_type=1, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "weights.bin"),
                ("offset", file.tell()),
                ("length", weight.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.roll(weight, i, 0).tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x0", TensorProto.FLOAT, ["N", side])],
        [value(f"x{count}", TensorProto.FLOAT, ["N", side])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17)]
    path = folder / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.fixture
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every model as too large for one file, every tensor as one to map."""
    monkeypatch.setattr(external, "MAP_BYTES", 1)
    monkeypatch.setattr(model, "MAX_PROTOBUF_BYTES", 2**24)


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("offset", [0, 3])
def test_mapped_weights_are_those_of_the_file(offset: int, tmp_path: Path) -> None:
    path = write(tmp_path, offset=offset)
    expected = onnx.load(path)
    x = {"x0": np.random.default_rng(1).normal(size=(2, SIDE)).astype(np.float32)}

    loaded = load_model(path)
    loaded.save(tmp_path / "again.onnx")

    weight = loaded.graph.tensors()["w1"].values
    assert type(weight) is np.ndarray
    assert not weight.flags.writeable
    assert np.array_equal(run_ort(loaded.to_proto(), x)[0], run_ort(expected, x)[0])
    again = onnx.load(tmp_path / "again.onnx")
    assert np.array_equal(run_ort(again, x)[0], run_ort(expected, x)[0])
    entries = onnx.load(tmp_path / "again.onnx", load_external_data=False).graph.initializer
    offsets = [int(e.value) for t in entries for e in t.external_data if e.key == "offset"]
    assert offsets == [0, 16384, 32768]


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("map_bytes", [1, 2**20])
def test_strip_undoes_insert_where_weights_lie_beside_the_model(
    map_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked at the weights before: the same bytes come out."""
    monkeypatch.setattr(external, "MAP_BYTES", map_bytes)
    path = tmp_path / "model.onnx"
    onnx.save(convnet(), path, save_as_external_data=True, location="data", size_threshold=0)
    floats = prepare(load_model(path))
    before = floats.to_proto().SerializeToString(deterministic=True)
    plan = make_plan(floats.graph, load_rule("tensorrt"))
    qdq = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")

    assert qdq.floats.to_proto().SerializeToString(deterministic=True) == before
    assert floats.to_proto().SerializeToString(deterministic=True) == before


def test_a_mapped_model_can_be_written_over_itself(tmp_path: Path) -> None:
    load_model(write(tmp_path)).save(tmp_path / "own.onnx")
    loaded = load_model(tmp_path / "own.onnx")
    before = loaded.to_proto()

    loaded.save(tmp_path / "own.onnx", force=True)

    assert load_model(tmp_path / "own.onnx").to_proto() == before
    assert loaded.to_proto() == before


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param("offset", "40000", "needs 16384 bytes of 'weights.bin' from 40000", id="end"),
        pytest.param("offset", "-8", "cannot be read|from -8", id="negative"),
        pytest.param("length", "16380", "the entry states 16380", id="length"),
        pytest.param(
            "offset", "x", "external data of initializer 'w1' cannot be read", id="not-a-number"
        ),
    ],
)
def test_entries_that_do_not_fit_the_file(
    key: str, value: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[1].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(proto.SerializeToString())

    with pytest.raises(ModelError, match=message):
        load_model(path)


@pytest.mark.parametrize("map_bytes", [1, 2**20])
@pytest.mark.parametrize(
    ("location", "message"),
    [
        pytest.param("none.bin", "'none.bin' is missing", id="missing"),
        pytest.param("../weights.bin", "outside of the model's folder", id="outside"),
        pytest.param("link.bin", "outside of the model's folder", id="link-outside"),
        pytest.param("n" * 300, "'w1' cannot be read .*File name too long", id="too-long"),
        pytest.param("a\0b", "not UTF-8|contains a NUL|'w1' cannot be read", id="nul"),
        pytest.param("pipe", "not a regular file", id="pipe"),
        pytest.param("folder", "'w1': .*a directory", id="folder"),
        pytest.param("loop", "'w1' cannot be read|is missing", id="loop"),
        pytest.param(None, "keeps its data at ''", id="no-location"),
    ],
)
def test_locations_that_are_not_files_beside_the_model(
    location: str | None, message: str, map_bytes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(external, "MAP_BYTES", map_bytes)
    (tmp_path / "m").mkdir()
    path = write(tmp_path / "m")
    (tmp_path / "weights.bin").write_bytes(b"\0" * 2**16)
    (path.parent / "link.bin").symlink_to(tmp_path / "weights.bin")
    (path.parent / "loop").symlink_to("loop")
    (path.parent / "folder").mkdir()
    os.mkfifo(path.parent / "pipe")
    proto = onnx.load(path, load_external_data=False)
    entries = proto.graph.initializer[1].external_data
    if location is None:
        del entries[:]
    for entry in entries:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(proto.SerializeToString())

    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


INSERT = """
import sys
from onnxqat.cli import main
main(["insert", sys.argv[1], "--rules", "onnxruntime-cpu", "-o", sys.argv[2]])
"""


@pytest.mark.slow
def test_memory_of_a_model_above_2_gb(tmp_path: Path) -> None:
    path = write(tmp_path, 36, side=4096)
    size = (tmp_path / "weights.bin").stat().st_size

    command = [sys.executable, "-c", INSERT, str(path), str(tmp_path / "q.onnx")]
    subprocess.run(command, check=True)

    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 1.3 * size
    assert (tmp_path / "q.onnx.data").stat().st_size >= size
