"""The functions of docs/data.md read what they say."""

from __future__ import annotations

import io
import re
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, open_data

PAGE = Path(__file__).parents[2] / "docs/data.md"
RNG = np.random.default_rng(0)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Write the module of a name into the current directory, under a name of its own."""
    monkeypatch.chdir(tmp_path)

    def written(name):
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        (code,) = (block for block in blocks if block.startswith(f'"""{name}.py:'))
        (tmp_path / f"docs_{name}.py").write_text(code)
        return f"docs_{name}:samples"

    return written


def read(source, *shape):
    with open_data(source, [InputSpec(name="input", shape=("n", *shape), dtype="float32")]) as data:
        (batch,) = data.batches(100)
    return batch.inputs["input"], batch.labels.tolist()


def test_parquet(example):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    rows = RNG.normal(size=(5, 3)).astype(np.float32)
    table = pyarrow.table({"features": list(rows), "label": [4, 3, 2, 1, 0]})
    parquet.write_table(table, "data.parquet")
    found, labels = read(example("parquet_rows"), 3)

    np.testing.assert_array_equal(found, rows)
    assert labels == [4, 3, 2, 1, 0]


def test_tar_shards(example):
    Path("shards").mkdir()
    pixels = []
    for shard in range(2):
        with tarfile.open(f"shards/{shard}.tar", "w") as archive:
            for number in range(2):
                image = RNG.integers(0, 256, (224, 224, 3)).astype(np.uint8)
                file = io.BytesIO()
                Image.fromarray(image).save(file, "JPEG")
                pixels.append(np.asarray(Image.open(file)))
                for suffix, content in (("jpg", file.getvalue()), ("cls", str(shard).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    found, labels = read(example("tar_shards"), 3, 224, 224)

    np.testing.assert_array_equal(found.transpose(0, 2, 3, 1), pixels)
    assert labels == [0, 0, 1, 1]


def test_audio(example):
    expected = np.zeros((2, 16000), np.float32)
    for label, length in enumerate((100, 20000)):
        Path(f"speech/{label}").mkdir(parents=True)
        values = RNG.integers(-32768, 32768, length).astype("<i2")
        with wave.open(f"speech/{label}/a.wav", "wb") as audio:
            audio.setnchannels(1)
            audio.setsampwidth(2)
            audio.setframerate(16000)
            audio.writeframes(values.tobytes())
        expected[label, : min(length, 16000)] = values[:16000] / 32768
    found, labels = read(example("speech"), 16000)

    np.testing.assert_array_equal(found, expected)
    assert labels == [0, 1]
