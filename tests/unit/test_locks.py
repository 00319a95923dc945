"""Folders of running processes, and what is left when one is killed at any moment."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxqat.errors import OnnxQatError
from onnxqat.files import atomic_output, check_readable, write_text
from onnxqat.locks import Scratch, claimed

# Forks for every system call that changes a folder or opens a file, and dies at that one.
KILLED_AT_EVERY_CALL = """
import json, os, signal, sys
from pathlib import Path

from onnxqat.files import atomic_outputs

os.fsync = lambda handle: None  # the processes are killed, not the machine
CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
data = {"A": "m.onnx.aaaaaaaaaaaaaaaa.data", "B": "m.onnx.bbbbbbbbbbbbbbbb.data"}


def write(folder, letter):
    paths, other = [folder / "m.onnx", folder / "m_table"], folder / "m_other"
    with atomic_outputs(*paths, outdated=(*paths[1:], other), force=True) as (model, table):
        model.write_text(letter + " reads " + data[letter])
        model.with_name(data[letter]).write_text(letter)
        table.write_text(letter)


def left(folder):
    return {p.name: p.read_text() if p.is_file() else "" for p in sorted(folder.iterdir())}


def die_at(number):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in CALLS:  # the kill is an event too
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


results = []
for number in range(1, 1000):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    write(folder, "A")
    (folder / "m_other").write_text("A")
    child = os.fork()
    if child == 0:
        die_at(number)
        write(folder, "B")
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    after = left(folder)
    letter = "AB"[number % 2]
    write(folder, letter)
    again = {"letter": letter, "files": left(folder)}
    results.append({"killed": killed, "after": after, "again": again})
    if not killed:
        break
print(json.dumps(results))
"""


def test_killed_at_any_call_files_are_never_mixed_or_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT_EVERY_CALL, str(tmp_path)]
    results = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    *killed, whole = results
    assert len(killed) > 20
    assert not whole["killed"]
    data = {"A": "m.onnx.aaaaaaaaaaaaaaaa.data", "B": "m.onnx.bbbbbbbbbbbbbbbb.data"}
    assert whole["after"].keys() == {"m.onnx", "m_table", data["B"]}
    letters = set()
    for result in results:
        after = result["after"]
        letter = after["m.onnx"][0]
        letters.add(letter)
        assert after[data[letter]] == letter
        assert after.get("m_table", letter) == letter
        assert after.get("m_other", letter) == letter
        last = result["again"]["letter"]
        assert result["again"]["files"] == {
            "m.onnx": f"{last} reads {data[last]}",
            data[last]: last,
            "m_table": last,
        }
    assert letters == {"A", "B"}


def hold(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds an output until it is told to end."""
    code = (
        "import sys; from onnxqat.locks import Scratch, claimed\n"
        "with claimed(sys.argv[1]), Scratch() as folder:\n"
        "    (folder / 'x').touch(); print(folder, flush=True); input()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def folder_of(holding: subprocess.Popen[str]) -> Path:
    assert holding.stdout is not None
    return Path(holding.stdout.readline().strip())


def test_another_run_on_the_same_output_is_refused_while_it_lives(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    output = tmp_path / "a.onnx"
    with hold(output) as holding:
        unpacked = folder_of(holding)
        for alias in (output, tmp_path / "link" / "a.onnx", tmp_path / "tmp" / ".." / "a.onnx"):
            with pytest.raises(OnnxQatError, match=r"another run is writing it"):
                write_text(alias, "x")
        write_text(tmp_path / "b.onnx", "another output")
        Scratch().close()
        assert (unpacked / "x").exists()  # nothing of a live run was taken for a dead one's
        holding.kill()
        holding.wait()
        assert (unpacked / "x").exists()
        write_text(tmp_path / "b.onnx", "whatever the next run writes", force=True)
        Scratch().close()

    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.onnx", "link", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_is_not_of_a_dead_run_stays(tmp_path: Path) -> None:
    (tmp_path / ".onnxqat-notes").mkdir()
    (tmp_path / ".onnxqat-notes" / "mine").touch()
    (tmp_path / ".onnxqat-file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / ".onnxqat-link").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / ".onnxqat-notes" / "mine").exists()
    assert (tmp_path / ".onnxqat-file").exists()
    assert (tmp_path / ".onnxqat-link" / "lock").exists()


def test_a_claim_can_be_repeated_and_ends(tmp_path: Path) -> None:
    with claimed(tmp_path / "a"), claimed(tmp_path / "a"):
        write_text(tmp_path / "a", "x")
    write_text(tmp_path / "a", "y", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_written_to(tmp_path, monkeypatch, caplog, number) -> None:
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_text(tmp_path / "a", "x")
    assert "its file system does not support locks. Do not start a second run" in caplog.text
    assert (tmp_path / "a").read_text() == "x"


def test_a_file_that_is_read_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    (tmp_path / "b.onnx").symlink_to("a.onnx")
    os.link(tmp_path / "a.onnx", tmp_path / "c.onnx")
    data = tmp_path / "a.onnx.0123456789abcdef.data"
    data.touch()
    with claimed(tmp_path / "a.onnx"):
        for name in ("a.onnx", "b.onnx", "c.onnx", data.name):
            with pytest.raises(
                OnnxQatError, match=r"is an input, and the output .* would replace it"
            ):
                check_readable(tmp_path / name)
    check_readable(tmp_path / "a.onnx")


def test_a_folder_that_is_emptied_meanwhile_is_written_to(tmp_path: Path) -> None:
    with claimed(tmp_path / "a"):
        subprocess.run(["rm", "-r", *tmp_path.iterdir()], check=True)
        write_text(tmp_path / "a", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_output(tmp_path / "a") as temporary:
            temporary.write_text("new")
            (tmp_path / "a").write_text("appeared")

    with pytest.raises(OnnxQatError, match="a: already exists"):
        write()
    assert (tmp_path / "a").read_text() == "appeared"


def test_files_are_on_the_disk_before_they_are_moved(tmp_path, monkeypatch) -> None:
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda h: (done.append(str(Path(f"/proc/self/fd/{h}").readlink())), sync(h))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b)), rename(a, b)))
    write_text(tmp_path / "a", "x")
    written, folder, moved, after = done
    assert (Path(written).name, folder) == ("a", str(tmp_path))
    assert (moved, after) == (tmp_path / "a", str(tmp_path))
