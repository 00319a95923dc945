"""Run a vendor's tool in a Python environment of its own.

A tool runs with a ``pip`` on its path that always fails, without an index of packages, without a
proxy to a network, and with a limit in time: tools must not change their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = ["TIME_LIMIT", "Array", "Environment", "Feeds", "Tool"]

Array = NDArray[Any]
Feeds = dict[str, Array]

TIME_LIMIT = 1800.0  # seconds
CLOSED = "http://127.0.0.1:9"  # nothing listens on the discard port: every download fails at once
LOOP = """
from pathlib import Path
import numpy as np

def run_parts():
    for path in sorted(Path.cwd().glob("*.onnx")):
        run = load(path)
        with np.load(path.with_suffix(".npz")) as feeds:
            np.save(f"{path}.npy", run(dict(feeds)))

run_parts()
"""


class Tool(NamedTuple):
    """A vendor's tool.

    Attributes
    ----------
    name : str
        Name, as its vendor writes it.
    variable : str
        Environment variable that names the Python of an environment with the tool.
    package : str
        Distribution in that environment whose version is reported.
    """

    name: str
    variable: str
    package: str


@dataclass(frozen=True)
class Environment:
    """The Python of a tool's environment, and a folder in which the tool runs."""

    tool: Tool
    python: str
    folder: Path

    def run(
        self,
        words: Sequence[str | Path],
        *,
        variables: Mapping[str, str] | None = None,
        limit: float = TIME_LIMIT,
    ) -> str:
        """Run a command in the folder; return what it printed, or exit with its last lines."""
        refusing = self.folder / "refusing"
        refusing.mkdir(exist_ok=True)
        for name in ("pip", "pip3", "uv", "conda"):
            (refusing / name).write_text("#!/bin/sh\nexit 1\n")
            (refusing / name).chmod(0o755)
        added = {"PATH": os.environ.get("PATH", ""), **(variables or {})}
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        closed = {"PIP_NO_INDEX": "1", "PYTHONNOUSERSITE": "1", **proxies}
        path = {"PATH": f"{refusing}{os.pathsep}{added['PATH']}"}
        with subprocess.Popen(
            list(map(str, words)), cwd=self.folder, env=kept | closed | added | path, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed, _ = process.communicate(timeout=limit)
            except BaseException as error:  # an interrupt too must end what the tool started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    sys.exit(f"{self.tool.name} did not finish in {limit:g} seconds")
                raise
        if process.returncode:
            sys.exit(f"{self.tool.name} did not run:\n{printed[-3000:]}")
        return printed

    def run_code(self, code: str, *words: str | Path, limit: float = TIME_LIMIT) -> str:
        """Run Python code in the folder; ``words`` are its ``sys.argv[1:]``."""
        return self.run([self.python, "-c", code, *words], limit=limit)

    def version(self) -> str:
        """Return the version of the tool's distribution."""
        code = f"from importlib.metadata import version; print(version({self.tool.package!r}))"
        return self.run_code(code).splitlines()[-1]

    def put(self, stem: str, model: onnx.ModelProto, feeds: Feeds) -> None:
        """Write a model that `run_parts` runs on ``feeds``."""
        onnx.save(model, str(self.folder / f"{stem}.onnx"))
        np.savez(self.folder / f"{stem}.npz", **feeds)

    def run_parts(self, code: str, *words: str | Path, limit: float = TIME_LIMIT) -> None:
        """Run every model that was put.

        ``code`` defines ``load(path)``, which returns a function from a dict of arrays to the
        array of the first output. It sees ``words`` in ``sys.argv[1:]``.
        """
        self.run_code(code + LOOP, *words, limit=limit)

    def result(self, stem: str) -> Array:
        """Return the output of a model that `run_parts` ran."""
        return np.asarray(np.load(self.folder / f"{stem}.onnx.npy"))
