from __future__ import annotations

import os
from typing import Any

# Two processes run the tests on two cores. A pool of threads in each of them would take the cores
# from the other while it waits for work. (numpy reads this when it is imported.)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import onnxruntime
import pytest


class OneThreadByDefault(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Session options for which no number of threads means one, not all cores."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "intra_op_num_threads":
            value = value or 1
        super().__setattr__(name, value)


def pytest_configure(config: pytest.Config) -> None:
    onnxruntime.SessionOptions = OneThreadByDefault


@pytest.fixture(scope="module")
def one_core():
    """Let jobs that do not say how many threads they use use one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in golden/")
