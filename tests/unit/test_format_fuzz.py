"""Malformed tables give one-line FormatErrors, and nothing else."""

from __future__ import annotations

import random

import pytest

from onnxqat.errors import FormatError
from onnxqat.formats import FORMATS, Calibrated, Table
from onnxqat.quantized import insert_pairs
from tests.networks import convnet, quantized

RULES = {
    "amct": ("ascend", ("op:Add.quantize=false",)),
    "axera": ("axera-ax650", ()),
    "cambricon": ("cambricon-mlu", ()),
    "horizon": ("horizon-bayes", ()),
    "mindspore": ("mindspore", ()),
    "mnn": ("sophgo-cv183x", (
        *(f"op:{op}.quantize=false" for op in (
            "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Flatten")),
        "name:n_r3.quantize=false")),
    "ncnn": ("ncnn", ()),
    "onnxqat": ("tflite", ()),
    "onnxruntime-calibration": ("tensorrt", ()),
    "qnn": ("qnn-htp", ()),
    "qnn-1.0.0": ("qnn-htp", ()),
    "rockchip": ("rockchip-rk3588", ()),
    "sophgo": ("sophgo-bm1684x", ()),
    "tengine": ("axera-ax650", ()),
    "tensorrt": ("tensorrt", ()),
}  # fmt: skip
PIECES = [
    *(b"0", b"-1", b"1e400", b"1e-400", b"NaN", b"-Infinity", b"null", b"true", b'""', b"[]"),
    *(b"{}", b"9" * 400, b"0x1f", b"\x00", b"\xff\xfe", b"\n", b" ", b'"', b"{", b"}", b"[", b"]"),
    *(b":", b",", b"#", b"\\u0000", b"\\ud800", "\u0660".encode(), b"_", b"1_0", b"+1", b"."),
    *(b"[" * 5000, b'{"a":' * 5000, b"value {" * 50, b"-0", b"1e38", b"4e-46", b"256", b"65536"),
]
READABLE = [
    (name, kind)
    for name in FORMATS
    for kind in FORMATS[name].files
    if kind in ("table", "ranges", "dynamic_range", "cache")
]
IDS = [f"{name}-{kind}" for name, kind in READABLE]


@pytest.fixture(scope="module")
def written():
    """The files of each format, with float graph and plan."""
    models = {name: quantized(convnet(), *RULES[name])[1] for name in FORMATS}
    return {
        name: (FORMATS[name].write(Calibrated(m)).files, m.floats, m.plan)
        for name, m in models.items()
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file with a few random changes."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 1, 2, 5, 20)))
        change = rng.randrange(6)
        if change == 0:
            data = data[:start]  # cut off
        elif change == 1:
            data = data[:start] + data[end:]
        elif change == 2:
            data = data[:start] + rng.choice(PIECES) + data[end:]
        elif change == 3:
            data = data[:start] + rng.choice(PIECES) + data[start:]
        elif change == 4:
            data = data[:end] + data[start:]  # twice
        else:
            data = data[:start] + bytes([rng.randrange(256)]) + data[end:]
    return data


def check(written, name, kind, count, seed):
    """Read mutated files; return how many were refused."""
    files, floats, plan = written[name]
    content = files[kind]
    data = content if isinstance(content, bytes) else content.encode()
    rng, refused = random.Random(seed), 0
    for _ in range(count):
        changed = mutated(data, rng)
        try:
            found = FORMATS[name].read(Table(name="t", data=changed), floats.graph, plan)
            params = found.complete()
        except FormatError as error:
            message = str(error)
            assert message.startswith("t:"), message
            assert len(message) < 1000, message
            refused += 1
        else:  # the change did no harm: what came out must be usable
            assert all((p.scale > 0).all() for p in params.values())
            if rng.random() < 0.02:
                insert_pairs(floats, plan, params, state="calibrated")
    return refused


@pytest.mark.parametrize(("name", "kind"), READABLE, ids=IDS)
def test_mutated_files_are_refused_or_read(written, name, kind):
    assert check(written, name, kind, 150, seed=1) > 50


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), READABLE, ids=IDS)
def test_ten_thousand_mutated_files(written, name, kind):
    check(written, name, kind, 10_000 // len(READABLE) + 1, seed=2)


@pytest.mark.parametrize(("name", "kind"), READABLE, ids=IDS)
@pytest.mark.parametrize("data", [b"", b"\n", b"{}", b"[]", b"\xff", b"[" * 100_000, b"0 0 0\n"])
def test_what_is_no_table_is_refused(written, name, kind, data):
    _, floats, plan = written[name]
    with pytest.raises(FormatError, match=r"^t:"):
        FORMATS[name].read(Table(name="t", data=data), floats.graph, plan).complete()
