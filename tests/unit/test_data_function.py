"""Data from a Python function in the user's directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnxqat.data import Batch, InputSpec, Preprocessing, open_data
from onnxqat.errors import DataError

SPEC = InputSpec(name="x", shape=("n", 3), dtype="float32")
X = np.arange(30, dtype=np.float32).reshape(10, 3)
SOURCE = """
import sys
import numpy as np
X = np.arange(30, dtype=np.float32).reshape(10, 3)

class Loaders:
    @staticmethod
    def make():
        return {"x": X, "label": np.arange(10)}

def batches():
    import neighbour
    for start in range(0, 10, 4):
        yield {"x": X[start:start + 4], "label": np.arange(10)[start:start + 4]}

def column_major(): return [{"x": np.asfortranarray(X)}]
def as_lists(): return {"x": X.tolist()}
def nothing(): return None
def no_arrays(): return {}
def no_batches(): return []
def bare(): return [X]
def objects(): return {"x": np.array([object()])}
def ragged(): return {"x": [[1, 2], [3]]}
def fails(): raise KeyError("no\\nsuch")
class Stop(BaseException): pass
class Hostile(dict):
    def items(self): raise Stop("here")
class Array:
    def __array__(self, *args, **kwargs): sys.exit(0)
def exits(): sys.exit(0)
def exits_late():
    yield {"x": X}
    sys.exit()
def stops(): raise Stop("not an Exception")
def hostile(): return Hostile(x=X)
def array(): return {"x": Array()}
def fails_late():
    yield {"x": X}
    raise RuntimeError("half way")
def uneven(): return [{"x": X, "label": np.arange(3)}]
def scalar(): return [{"x": np.float32(1)}]
def other_keys(): return [{"x": X}, {"z": X}]
def other_shape(): return [{"x": X}, {"x": X[:, :2]}]
def not_finite(): return {"x": X / np.float32(0) if False else np.full((2, 3), np.nan)}
number = 3
"""


@pytest.fixture(autouse=True)
def in_user_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "user_loader.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "broken_loader.py").write_text("1 / 0")
    (tmp_path / "exiting_loader.py").write_text("import sys; sys.exit(0)")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield
    assert sys.path == before
    for name in ("user_loader", "neighbour", "broken_loader", "exiting_loader"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["Loaders.make", "batches"])
def test_mappings_and_batches(name: str) -> None:
    with open_data(f"user_loader:{name}", [SPEC]) as data:
        assert len(data) == 10
        (batch,) = data.batches(10, indices=np.arange(10)[::-1])
    np.testing.assert_array_equal(batch.inputs["x"], X[::-1])
    np.testing.assert_array_equal(batch.labels, np.arange(10)[::-1])


def test_rows_of_batches_keep_their_order_in_memory() -> None:
    with open_data("user_loader:column_major", [SPEC]) as data:
        (batch,) = data.batches(10)
    np.testing.assert_array_equal(batch.inputs["x"], X)


def test_lists_are_arrays_of_float64() -> None:
    with open_data("user_loader:as_lists", [SPEC]) as data:
        (batch,) = data.batches(10)
    np.testing.assert_array_equal(batch.inputs["x"], X)
    assert batch.inputs["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_loader:nothing", r"is of type 'NoneType'"),
        ("user_loader:no_arrays", r"returned no arrays"),
        ("user_loader:no_batches", r"gave no batches"),
        ("user_loader:bare", r"batch 0 is of type 'ndarray'\. Yield mappings"),
        ("user_loader:objects", r"array 'x' holds object\. Return numbers"),
        ("user_loader:ragged", r"'x' is not an array"),
        ("user_loader:fails", r"raised KeyError \(.*\)\. Make it run in Python first"),
        ("user_loader:fails_late", r"raised RuntimeError \(half way\)"),
        ("user_loader:exits", r"raised SystemExit \(0\)\. Make it run"),
        ("user_loader:exits_late", r"raised SystemExit"),
        ("user_loader:stops", r"raised Stop \(not an Exception\)"),
        ("user_loader:hostile", r"raised Stop \(here\)"),
        ("user_loader:array", r"'x' is not an array"),
        ("exiting_loader:make", r"raised SystemExit \(0\)"),
        (
            "user_loader:uneven",
            r"batch 0: the arrays have different lengths \{'x': 10, 'label': 3\}",
        ),
        ("user_loader:scalar", r"batch 0: array 'x' is a single number"),
        ("user_loader:other_keys", r"batch 1: has the arrays 'z', batch 0 had 'x'"),
        ("user_loader:other_shape", r"batch 1: samples of array 'x' .* shape \(2,\)"),
        ("user_loader:number", r"is not a function"),
        ("user_loader:missing", r"raised AttributeError"),
        ("broken_loader:make", r"raised ZeroDivisionError"),
        ("missing_loader:make", r"raised ModuleNotFoundError"),
        ("missing_folder/a.npz", r"missing_folder/a\.npz: no such file or directory"),
        ("user_loader.py", r"user_loader\.py: is not data\. Give an \.npz or"),
    ],
)
def test_what_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_data(name, [SPEC])
    assert "\n" not in str(caught.value)


def test_values_are_checked_as_those_of_files() -> None:
    with (
        open_data("user_loader:not_finite", [SPEC]) as data,
        pytest.raises(DataError, match=r"user_loader:not_finite: sample 0 of array 'x' holds"),
    ):
        list(data.batches(2))


def test_a_full_disk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(scratch: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxqat.data.arrays.Scratch.new_file", refuse)
    with pytest.raises(DataError, match=r"\(No space left on device\)\. Set TMPDIR"):
        open_data("user_loader:batches", [SPEC])


def test_arrays_from_python_are_data_like_those_of_a_file(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    label = rng.integers(0, 10, 10)
    np.savez(tmp_path / "d.npz", images=images, label=label)
    spec = [InputSpec(name="x", shape=(None, 3, 8, 8), dtype="float32")]
    mean = Preprocessing(mean=(3.0,), scale=(0.5,))

    def batches():
        for part in np.split(np.arange(10), [3, 7]):
            yield {"images": images[part], "label": label[part]}

    sources = (tmp_path / "d.npz", {"images": images, "label": label}, batches())
    opened = [open_data(source, spec, preprocessing=mean) for source in sources]
    of_file, *others = (list(data.batches(4)) for data in opened)

    assert [repr(data) for data in opened[1:]] == [
        "DataSet('the data', 10 samples with labels, for 'x')"
    ] * 2
    assert opened[1].subset([0]).said == opened[0].said
    for found in others:
        for one, other in zip(found, of_file, strict=True):
            np.testing.assert_array_equal(one.inputs["x"], other.inputs["x"])
            np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Batch(inputs={}, labels=None, indices=np.arange(1), size=1)], "0 is of type 'Batch'"),
        (np.zeros((2, 3)), "is of type 'ndarray'"),
        ([], "gave no batches"),
    ],
)
def test_what_is_no_data_is_refused(given, message):
    spec = [InputSpec(name="x", shape=(None, 3), dtype="float32")]
    with pytest.raises(DataError, match=message):
        open_data(given, spec)
