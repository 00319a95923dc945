"""The commands that write tensors and compare them, on a bundled model."""

from __future__ import annotations

from tests.digits import write_digits
from tests.integration.test_cli import LENET, NORM, document, error, invoke, run


def test_dumps_of_two_modes_are_written_and_compared(tmp_path):
    write_digits(tmp_path / "d.npz", 8)
    run("insert", LENET, *NORM, "--rules", "sophgo-bm1684x", "--data", tmp_path / "d.npz",
        "-o", tmp_path / "q.onnx")  # fmt: skip
    for mode in ("float", "qdq", "integer"):
        words = ("dump", tmp_path / "q.onnx", tmp_path / "d.npz", "--mode", mode, "--samples", 2)
        said = document(*words, "-o", tmp_path / mode)
        assert (said["samples"], said["mode"], said["level"]) == (2, mode, 2)
    compared = document("compare-dumps", tmp_path / "integer", tmp_path / "float",
                        "--min-cosine", 0.9)  # fmt: skip
    table = run("compare-dumps", tmp_path / "qdq", tmp_path / "qdq")
    failed = invoke("compare-dumps", tmp_path / "qdq", tmp_path / "float", "--min-sqnr", 90)

    assert compared["passed"]
    assert {"input", "output"} <= {one["tensor"] for one in compared["tensors"]}
    assert compared["more"] == []
    assert "equal" in table
    assert failed.exit_code == 1
    assert "tensors; the first one is 'input'." in failed.stderr
    assert sum(line.endswith("FAILED") for line in failed.stdout.splitlines()) > 1
    assert "already exists" in error(*words, "-o", tmp_path / "qdq")
