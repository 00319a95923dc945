"""Arrays in npz files: names, concatenation, hostile archives."""

from __future__ import annotations

import io
import struct
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxqat.data import DataSet, InputSpec, open_data
from onnxqat.errors import DataError

RNG = np.random.default_rng(0)
VECTOR = InputSpec(name="x", shape=("n", 5), dtype="float32")


def floats(count: int, *shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal((count, *shape)).astype(np.float32)


def all_of(data: DataSet, name: str = "x", batch_size: int = 3) -> NDArray[Any]:
    return np.concatenate([batch.inputs[name] for batch in data.batches(batch_size)])


def member(shape: tuple[int, ...], payload: bytes, descr: str = "<f4") -> bytes:
    header = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_and_labels_come_back_in_batches(tmp_path: Path, save: Any) -> None:
    x, y = floats(10, 5), RNG.integers(0, 7, 10)
    save(tmp_path / "a.npz", x=x, y=y)
    with open_data(tmp_path / "a.npz", [VECTOR]) as data:
        batches = list(data.batches(4))
        assert len(data) == 10
        assert data.has_labels
        assert data.classes is None
    assert [len(batch.indices) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in batches]), x)
    np.testing.assert_array_equal(
        np.concatenate([b.labels for b in batches if b.labels is not None]), y
    )
    np.testing.assert_array_equal(np.concatenate([b.indices for b in batches]), np.arange(10))
    assert all(b.inputs["x"].flags.c_contiguous for b in batches)
    assert all(b.labels is not None and b.labels.dtype == np.int64 for b in batches)


def test_fortran_order_and_big_endian(tmp_path: Path) -> None:
    x = floats(6, 5)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x))
    np.savez(tmp_path / "b.npz", x=x.astype(">f4"))
    for name in "ab":
        with open_data(tmp_path / f"{name}.npz", [VECTOR]) as data:
            read = all_of(data)
        assert read.dtype == np.dtype("float32")
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, x)


def test_files_of_a_directory_are_joined_in_sorted_order(tmp_path: Path) -> None:
    parts = {"c": floats(3, 5), "a": floats(4, 5), "b": floats(0, 5), "d": floats(2, 5)}
    for name, x in parts.items():
        np.savez(tmp_path / f"{name}.npz", x=x, label=np.arange(len(x)))
    (tmp_path / "README.md").write_text("notes")
    expected = np.concatenate([parts[name] for name in "abcd"])
    order = RNG.permutation(9)
    with open_data(tmp_path, [VECTOR]) as data:
        np.testing.assert_array_equal(all_of(data, batch_size=4), expected)
        shuffled = list(data.batches(9, indices=order))
    np.testing.assert_array_equal(shuffled[0].inputs["x"], expected[order])
    labels = np.concatenate([np.arange(n) for n in (4, 0, 3, 2)])
    np.testing.assert_array_equal(shuffled[0].labels, labels[order])


def test_a_single_input_takes_the_only_array(tmp_path: Path) -> None:
    x = floats(4, 5)
    np.savez(tmp_path / "a.npz", pictures=x, labels=np.arange(4))
    with open_data(tmp_path / "a.npz", [VECTOR]) as data:
        np.testing.assert_array_equal(all_of(data), x)


def test_the_exact_name_wins_over_others(tmp_path: Path) -> None:
    x = floats(4, 5)
    np.savez(tmp_path / "a.npz", other=floats(4, 9), x=x, names=np.array(["a", "b"]))
    with open_data(tmp_path / "a.npz", [VECTOR]) as data:
        assert not data.has_labels
        np.testing.assert_array_equal(all_of(data), x)


@pytest.mark.parametrize("labels", [True, False])  # whether the caller can use labels
def test_labels_that_are_not_wanted_are_no_input(tmp_path: Path, labels: bool) -> None:
    x = floats(4, 5)
    np.savez(tmp_path / "a.npz", pictures=x, labels=np.arange(4))
    with open_data(tmp_path / "a.npz", [VECTOR], label="none", labels=labels) as data:
        np.testing.assert_array_equal(all_of(data), x)
        assert not data.has_labels


def test_an_input_named_like_labels_is_an_input(tmp_path: Path) -> None:
    y = floats(4, 5)
    np.savez(tmp_path / "a.npz", y=y)
    spec = InputSpec(name="y", shape=(None, 5), dtype="float32")
    with open_data(tmp_path / "a.npz", [spec]) as data:
        assert not data.has_labels
        np.testing.assert_array_equal(all_of(data, "y"), y)


def test_arrays_are_named_by_the_user(tmp_path: Path) -> None:
    a, b = floats(4, 5), floats(4, 2)
    np.savez(tmp_path / "a.npz", a=a, b=b, target=np.arange(4), label=np.zeros(4, np.int64))
    specs = [VECTOR, InputSpec(name="z", shape=("n", 2), dtype="float32")]
    with open_data(
        tmp_path / "a.npz", specs, label="target", input_map={"x": "a", "z": "b"}
    ) as data:
        (batch,) = data.batches(4)
    np.testing.assert_array_equal(batch.inputs["x"], a)
    np.testing.assert_array_equal(batch.inputs["z"], b)
    np.testing.assert_array_equal(batch.labels, np.arange(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no array for model input 'x'\. It has 'a', 'b', 'y'\. Name one with --input"),
        ({"label": "z"}, r"no array 'z' for the labels\. It has 'a', 'b', 'y'\."),
        ({"input_map": {"x": "q"}}, r"no array 'q'\. It has 'a', 'b', 'y'\."),
        ({"input_map": {"q": "a"}}, r"no model input 'q'\. The model has 'x'\."),
    ],
)
def test_names_that_match_nothing(tmp_path: Path, options: Any, message: str) -> None:
    np.savez(tmp_path / "a.npz", a=floats(4, 5), b=floats(4, 5), y=np.arange(4))
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "a.npz", [VECTOR], **options)


def test_two_arrays_that_could_be_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5), y=np.arange(4), label=np.arange(4))
    with pytest.raises(DataError, match=r"'label', 'y' could all be labels\. Choose with --label"):
        open_data(tmp_path / "a.npz", [VECTOR])


@pytest.mark.parametrize("labels", [np.zeros(4), np.zeros((4, 3), np.int64), np.zeros((4, 1), int)])
def test_labels_are_one_integer_per_sample(tmp_path: Path, labels: NDArray[Any]) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5), y=labels)
    with pytest.raises(DataError, match=r"labels 'y' are .* Store one integer class index"):
        open_data(tmp_path / "a.npz", [VECTOR])


def test_a_negative_label_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5), y=np.array([0, 1, -1, 2]))
    with (
        open_data(tmp_path / "a.npz", [VECTOR]) as data,
        pytest.raises(DataError, match=r"a\.npz: sample 2 of array 'y' is -1\."),
    ):
        list(data.batches(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    x = floats(6, 5)
    np.savez(tmp_path / "a.npz", x=x)
    x[4, 2] = bad
    np.savez(tmp_path / "b.npz", x=x)
    with (
        open_data(tmp_path, [VECTOR]) as data,
        pytest.raises(DataError, match=r"b\.npz: sample 4 of array 'x' holds NaN or infinity"),
    ):
        list(data.batches(4))


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((2, 5), 1e300))
    with (
        open_data(tmp_path / "a.npz", [VECTOR]) as data,
        pytest.raises(DataError, match=r"sample 0 of array 'x' holds NaN or infinity"),
    ):
        list(data.batches(2))


def test_integer_inputs_keep_their_values(tmp_path: Path) -> None:
    ids = RNG.integers(0, 30000, (4, 7))
    spec = InputSpec(name="ids", shape=("n", "sequence"), dtype="int32")
    np.savez(tmp_path / "a.npz", ids=ids)
    with open_data(tmp_path / "a.npz", [spec]) as data:
        read = all_of(data, "ids")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)
    ids[3, 0] = 2**40
    np.savez(tmp_path / "b.npz", ids=ids)
    with (
        open_data(tmp_path / "b.npz", [spec]) as data,
        pytest.raises(DataError, match=r"sample 3 of array 'ids' holds a value outside int32"),
    ):
        all_of(data, "ids")


def test_floats_do_not_feed_an_integer_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5))
    spec = InputSpec(name="x", shape=("n", 5), dtype="int64")
    with pytest.raises(DataError, match=r"'x' is float32, but model input 'x' is int64\."):
        open_data(tmp_path / "a.npz", [spec])


@pytest.mark.parametrize("dtype", ["bfloat16", "object", "str"])
def test_model_dtypes_without_numbers(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5))
    with pytest.raises(DataError, match="model input 'x'"):
        open_data(tmp_path / "a.npz", [InputSpec(name="x", shape=("n", 5), dtype=dtype)])


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 1), (4,)])
def test_the_wrong_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(shape, np.float32))
    with pytest.raises(DataError, match=r"do not fit model input 'x' of shape \('n', 5\)"):
        open_data(tmp_path / "a.npz", [VECTOR])


def test_a_scalar_has_no_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.float32(1))
    with pytest.raises(DataError, match="'x' is a single number"):
        open_data(tmp_path / "a.npz", [VECTOR])


def test_lengths_must_agree_in_each_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5), y=np.arange(5))
    np.savez(tmp_path / "b.npz", x=floats(5, 5), y=np.arange(4))
    with pytest.raises(DataError, match=r"a\.npz: array 'y' has 5 samples, array 'x' has 4\."):
        open_data(tmp_path, [VECTOR])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": np.zeros((2, 5), np.float64)}, r"b\.npz: samples of array 'x' are float64"),
        ({"x": np.zeros((2, 6), np.float32)}, r"b\.npz: samples of array 'x' are .*\(6,\)"),
        ({"z": np.zeros((2, 5), np.float32)}, r"b\.npz: has the arrays 'z', but .*a\.npz' has 'x'"),
    ],
)
def test_files_must_be_alike(tmp_path: Path, second: Any, message: str) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5))
    np.savez(tmp_path / "b.npz", **second)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, [VECTOR])


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(0, 5))
    with pytest.raises(DataError, match="holds no samples"):
        open_data(tmp_path, [VECTOR])
    np.savez(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"no array for model input 'x'\. It has none\."):
        open_data(tmp_path, [VECTOR])


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "unpickled",))

    np.savez(tmp_path / "a.npz", x=np.array([[Bomb()] * 5], dtype=object))
    with pytest.raises(DataError, match="'x' holds Python objects, which are never unpickled"):
        open_data(tmp_path / "a.npz", [VECTOR])
    assert not (tmp_path / "unpickled").exists()


def test_unused_objects_are_left_alone(tmp_path: Path) -> None:
    x = floats(2, 5)
    np.savez(tmp_path / "a.npz", x=x, names=np.array([{}, {}], dtype=object))
    with open_data(tmp_path / "a.npz", [VECTOR]) as data:
        np.testing.assert_array_equal(all_of(data), x)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 100])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read \(.*\)\. Save it again"):
        open_data(tmp_path / "a.npz", [VECTOR])


def test_a_truncated_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(100, 5))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.npz: cannot be read"):
        open_data(tmp_path / "a.npz", [VECTOR])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_member(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", x=floats(1000, 5))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    with (
        open_data(tmp_path / "a.npz", [VECTOR]) as data,
        pytest.raises(DataError, match=r"a\.npz: cannot be read"),
    ):
        list(data.batches(10))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (member((10**12, 5), b"\0" * 40), r"claims shape \(1000000000000, 5\)"),
        (member((2, 5), b"\0" * 41), r"claims shape \(2, 5\), \d+ bytes, but holds"),
        (member((-2, -5), b"\0" * 40), r"a\.npz: .*\(-2, -5\)"),
        (member((2, 5), b"\0" * 40, descr="<U1"), r"'x' holds <U1\. Save it as numbers"),
        (member((2, 5), b"\0" * 40, descr="nonsense"), r"a\.npz: cannot be read"),
        (b"\x93NUMPY\x03\x00" + b"\0" * 100, r"format version \(3, 0\)"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, r"a\.npz: cannot be read"),
        (b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 8192, r"a\.npz: cannot be read"),
        (b"", r"a\.npz: cannot be read"),
        (b"garbage, and no header at all", r"a\.npz: cannot be read"),
    ],
)
def test_hostile_headers(tmp_path: Path, raw: bytes, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", raw)
    with pytest.raises(DataError, match=message) as caught:
        open_data(tmp_path / "a.npz", [VECTOR])
    assert "\n" not in str(caught.value)


def test_a_declared_size_beyond_what_compression_can_do(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member((2**28, 5), b"\0" * 40))
    content = bytearray(buffer.getvalue())
    directory = content.index(b"PK\x01\x02")
    claimed = struct.pack("<I", 2**32 - 100)
    content[22 + 4 : 26 + 4] = content[22:26]  # the local header is not what is believed
    content[directory + 24 : directory + 28] = claimed
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"'x' claims 4294967196 bytes, .* which is impossible"):
        open_data(tmp_path / "a.npz", [VECTOR])


def test_other_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", member((2, 5), b"\0" * 40))
    with pytest.raises(DataError, match="is compressed by method 14"):
        open_data(tmp_path / "a.npz", [VECTOR])


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with (
        open_data(tmp_path / "a.npz", [VECTOR]) as data,
        pytest.raises(DataError, match=r"where 10 are free\. Set TMPDIR"),
    ):
        list(data.batches(4))


def test_member_names_do_not_choose_where_files_go(tmp_path: Path) -> None:
    x = floats(2, 5)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../../escaped.npy", member((2, 5), x.tobytes()))
    with open_data(tmp_path / "a.npz", [VECTOR]) as data:
        np.testing.assert_array_equal(all_of(data), x)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", x=floats(4, 5))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with open_data(tmp_path / "a.npz", [VECTOR]) as data:
        view = data.subset([1])
        list(data.batches(2))
        view.close()
        assert len(list(temporary.glob("*/*.npy"))) == 1
        list(view.batches(2))
    assert list(temporary.iterdir()) == []
    with pytest.raises(ValueError, match="after close"):
        list(data.batches(2))
    data = open_data(tmp_path / "a.npz", [VECTOR])
    list(data.batches(2))
    del data, view
    assert list(temporary.iterdir()) == []
    with pytest.raises(DataError, match="do not fit"):
        open_data(tmp_path / "a.npz", [InputSpec(name="x", shape=(1, 9), dtype="float32")])
    assert list(temporary.iterdir()) == []


def test_iterators_may_share_the_files(tmp_path: Path) -> None:
    x = floats(64, 5)
    for part in range(8):
        np.savez(tmp_path / f"{part}.npz", x=x[part * 8 : part * 8 + 8])
    found: list[NDArray[Any]] = []
    with open_data(tmp_path, [VECTOR]) as data:
        threads = [threading.Thread(target=lambda: found.append(all_of(data))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(np.array_equal(each, x) for each in found)


def test_memory_is_that_of_a_few_batches(tmp_path: Path) -> None:
    x = np.zeros((4000, 1000), np.float32)
    np.savez_compressed(tmp_path / "a.npz", x=x)
    spec = InputSpec(name="x", shape=("n", 1000), dtype="float32")
    tracemalloc.start()
    try:
        with open_data(tmp_path / "a.npz", [spec]) as data:
            assert sum(len(batch.indices) for batch in data.batches(40)) == 4000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 2


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    length = 2**30
    raw = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + b" " * 2**26
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", raw)
    del raw
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.npz: cannot be read"):
            open_data(tmp_path / "a.npz", [VECTOR])
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(10**12, 0), (10**12, 5, 0), (0, 10**18)])
def test_samples_that_hold_nothing_cannot_be_any_number(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member(shape, b""))
    spec = InputSpec(name="x", shape=("n", *shape[1:]), dtype="float32")
    with pytest.raises(DataError, match="which takes no bytes"):
        open_data(tmp_path / "a.npz", [spec])


def test_an_index_that_a_table_lacks_names_the_sample(tmp_path: Path) -> None:
    ids = np.zeros((6, 2), np.int64)
    ids[:, 1] = [9, 8, -10, 10, 3, -11]
    np.savez(tmp_path / "a.npz", ids=ids)
    spec = InputSpec(name="ids", shape=("n", 2), dtype="int64", rows=10)
    with open_data(tmp_path / "a.npz", [spec]) as data:
        (batch,) = data.subset([0, 1, 2, 4]).batches(4)
        np.testing.assert_array_equal(batch.inputs["ids"], ids[[0, 1, 2, 4]])
        for row, value in ((3, "10"), (5, "-11")):
            text = rf"sample {row} of array 'ids' holds {value}, but .* of 10 rows, 0 to 9"
            with pytest.raises(DataError, match=text):
                list(data.subset([0, row]).batches(2))
