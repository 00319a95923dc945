"""Output files are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from onnxqat.errors import DataError, OnnxQatError
from onnxqat.files import atomic_output, check_readable, check_writable, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text("half")
        raise error


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "größe\n")
    assert "größe\n".encode() == (tmp_path / "a.txt").read_bytes()
    assert names(tmp_path) == ["a.txt"]


def test_a_path_may_be_text(tmp_path: Path) -> None:
    write_text(str(tmp_path / "a.txt"), "x")
    assert names(tmp_path) == ["a.txt"]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("a.txt", "x")
    assert names(tmp_path) == ["a.txt"]


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OnnxQatError, match=r"a\.txt: already exists\. Pass --force"):
        write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new", force=True)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failing_block_changes_nothing(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error):
        write_half(path, error())
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OnnxQatError, match=r"a\.txt: cannot be written \(No space left"):
        write_half(tmp_path / "a.txt", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert names(tmp_path) == []


DATA = ("m.onnx.0123456789abcdef.data", "m.onnx.fedcba9876543210.data")


def write_with_data(folder: Path, data: str, *, force: bool = False) -> None:
    with atomic_output(folder / "m.onnx", force=force) as temporary:
        temporary.write_text(f"reads {data}")
        temporary.with_name(data).write_text("weights")


def test_data_of_the_output_come_along_and_those_it_replaces_go(tmp_path: Path) -> None:
    write_with_data(tmp_path, DATA[0])
    assert names(tmp_path) == ["m.onnx", DATA[0]]
    write_with_data(tmp_path, DATA[1], force=True)
    assert names(tmp_path) == ["m.onnx", DATA[1]]
    assert (tmp_path / DATA[1]).read_text() == "weights"
    write_text(tmp_path / "m.onnx", "without", force=True)
    assert names(tmp_path) == ["m.onnx"]


def test_data_of_a_renamed_output_stay(tmp_path: Path) -> None:
    write_with_data(tmp_path, DATA[0])
    (tmp_path / "m.onnx").rename(tmp_path / "best.onnx")
    write_with_data(tmp_path, DATA[1])
    write_with_data(tmp_path, DATA[1], force=True)
    assert names(tmp_path) == ["best.onnx", "m.onnx", *DATA]


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path: "is a directory",
        tmp_path / "missing" / "a.txt": r"directory '.*missing' does not exist\. Create it first",
        tmp_path / "file" / "a.txt": "does not exist",
        tmp_path / ("n" * 300): "cannot be written",
        tmp_path / "pipe": r"is not a regular file\. Choose another output",
    }
    for path, match in cases.items():
        with pytest.raises(OnnxQatError, match=match):
            check_writable(path, force=force)
        with pytest.raises(OnnxQatError, match=match):
            write_text(path, "x", force=force)
    assert names(tmp_path) == ["file", "pipe"]


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # patched, since the superuser may write everywhere
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OnnxQatError, match=r"is not writable\. Choose another output"):
        check_writable(tmp_path / "a.txt")


def test_what_can_be_written_passes(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("x")
    check_writable(tmp_path / "a.txt", force=True)
    assert (tmp_path / "a.txt").read_text() == "x"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")

    check_readable(tmp_path / "file")
    check_readable(tmp_path / "link")
    for path, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
        (str(tmp_path / "a\0b"), "null (byte|character)"),
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            check_readable(path, DataError)
