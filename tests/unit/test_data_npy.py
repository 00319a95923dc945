"""Arrays in .npy files, one file for all samples or one for each, against numpy."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import DataError

SPEC = InputSpec(name="x", shape=("n", 3, 4), dtype="float32")
ROWS = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)


def read(source, *specs, **options):
    with open_data(source, specs or (SPEC,), **options) as data:
        (batch,) = data.batches(100)
    return batch


def test_one_file_has_all_samples(tmp_path):
    path = tmp_path / "pixels.npy"
    np.save(path, ROWS)
    batch = read(path)

    np.testing.assert_array_equal(batch.inputs["x"], ROWS)
    assert batch.labels is None


def test_files_called_like_inputs_and_labels_are_whole_arrays(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    np.save(tmp_path / "y.npy", np.arange(5))
    np.save(tmp_path / "length.npy", ROWS[:, 0, :1])
    length = InputSpec(name="length", shape=("n", 1), dtype="float32")
    batch = read(tmp_path, SPEC, length)

    np.testing.assert_array_equal(batch.inputs["x"], ROWS)
    np.testing.assert_array_equal(batch.inputs["length"], ROWS[:, 0, :1])
    np.testing.assert_array_equal(batch.labels, np.arange(5))


@pytest.mark.parametrize("batch_axis", [False, True])
def test_other_files_are_one_sample_each(tmp_path, batch_axis):
    for number, row in enumerate(ROWS):
        np.save(tmp_path / f"{number}.npy", row[None] if batch_axis else row)

    np.testing.assert_array_equal(read(tmp_path).inputs["x"], ROWS)


def test_class_folders_of_files_have_labels(tmp_path):
    for number, (name, row) in enumerate(zip("abab", ROWS, strict=False)):
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / f"{number}.npy", row)
    batch = read(tmp_path, class_count=2)

    np.testing.assert_array_equal(batch.inputs["x"], ROWS[[0, 2, 1, 3]])
    np.testing.assert_array_equal(batch.labels, [0, 0, 1, 1])


def test_broken_files_are_skipped_where_asked(tmp_path):
    for number, row in enumerate(ROWS):
        np.save(tmp_path / f"{number}.npy", row)
    (tmp_path / "1.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"1\.npy: cannot be read .* Save it again"):
        read(tmp_path)
    np.testing.assert_array_equal(read(tmp_path, skip_broken=True).inputs["x"], ROWS[[0, 2, 3, 4]])


def test_files_that_differ_in_shape_are_named(tmp_path):
    np.save(tmp_path / "0.npy", ROWS[0])
    np.save(tmp_path / "1.npy", ROWS[0][:2])
    said = r"1\.npy: has float32 values of shape \(2, 4\), but another file .* Make them alike"
    with pytest.raises(DataError, match=said):
        read(tmp_path)


def hostile(path, what):
    np.save(path, ROWS)
    content = path.read_bytes()
    changed = {
        "cut": content[:-1],
        "longer": content + b"0",
        "claims": content.replace(b"(5, 3, 4)", b"(9, 3, 4)"),
        "negative": content.replace(b"(5, 3, 4)", b"(-5,3, 4)"),
        "version": content[:6] + b"\x03" + content[7:],
        "text": b"0.5 1.5",
    }
    path.write_bytes(changed[what])


@pytest.mark.parametrize("what", ["cut", "longer", "claims", "negative", "version", "text"])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, what):
    hostile(tmp_path / "a.npy", what)
    with pytest.raises(DataError, match=r"a\.npy: (claims shape|cannot be read)") as caught:
        read(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    np.save(tmp_path / "a.npy", np.array([Trap()], object))
    with pytest.raises(DataError, match="Python objects, which are never unpickled"):
        read(tmp_path / "a.npy")
    assert not (tmp_path / "trap").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "trap").exists()


def test_arrays_of_two_kinds_in_a_folder_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(tmp_path / "b.npz", x=ROWS)
    with pytest.raises(DataError, match=r"holds arrays .* Keep them in different directories"):
        read(tmp_path)


def test_a_model_of_two_inputs_takes_no_folder_of_samples(tmp_path):
    np.save(tmp_path / "0.npy", ROWS[0])
    other = InputSpec(name="z", shape=("n", 1), dtype="float32")
    with pytest.raises(DataError, match="feed one input, but the model has 'x', 'z'"):
        read(tmp_path, SPEC, other)
