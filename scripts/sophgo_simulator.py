"""Compile a model with Sophgo's compiler, tpu-mlir, and run it in the compiler's simulator.

The compiler is used by its command line, in an environment of its own: `VARIABLE` names its Python,
a 3.10 with the wheel tpu_mlir 1.30.2 and what it needs (docs/integer.md says how one is made).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from onnxqat.deploy import write_deployment
from onnxqat.model import Model
from onnxqat.rules import load_rule

__all__ = ["VARIABLE", "compiled", "simulated"]

VARIABLE = "ONNXQAT_TPU_MLIR"
SIMULATE = """
import sys, numpy as np
from tools.model_runner import mlir_inference
x, found = np.load("inputs.npz"), {}
count = int(sys.argv[1])
for i in range(len(x[x.files[0]])):
    one = {name: x[name][i : i + 1] for name in x.files}
    for name, values in mlir_inference(one, sys.argv[2], dump_all=i < count).items():
        found.setdefault(name, []).append(values)
np.savez("outputs.npz", **{name: np.concatenate(v) for name, v in found.items()})
"""


def environment(python: str) -> dict[str, str]:
    """Return the environment variables for the compiler's tools."""
    code = (
        "import importlib.util as u; print(u.find_spec('tpu_mlir').submodule_search_locations[0])"
    )
    root = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    base = Path(root.stdout.strip())
    paths = {
        "PATH": [base / "bin", base / "python/tools", Path(python).parent],
        "PYTHONPATH": [base, base / "python", base / "customlayer/python"],
        "LD_LIBRARY_PATH": [base / "lib", base / "lib/capi", base / "lib/third_party"],
    }
    joined = {
        key: os.pathsep.join([*map(str, added), *filter(None, [os.environ.get(key)])])
        for key, added in paths.items()
    }
    firmware = {"TPUKERNEL_CUSTOM_FIRMWARE_PATH": str(base / "lib/libcmodel_custom.so")}
    return os.environ | joined | firmware | {"TPUC_ROOT": str(base)}


def compiled(model: Model, python: str, folder: Path) -> str:
    """Strip and compile a model in ``folder`` by its script; return the name of its int8 file."""
    files = write_deployment(model, folder / "chip", table="sophgo").files
    variables = environment(python)
    tools = Path(variables["TPUC_ROOT"]) / "python/tools"
    for tool in ("model_transform.py", "model_deploy.py"):  # run them with the given interpreter
        call = folder / tool
        call.write_text(f'#!/bin/sh\nexec "{python}" "{tools / tool}" "$@"\n')
        call.chmod(0o755)
    done = subprocess.run(
        ["bash", str(files["compile.sh"]), "--debug", "--skip_validation"],
        env=variables | {"PATH": f"{folder}{os.pathsep}{variables['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"compile.sh failed:\n{done.stdout[-3000:]}")
    return f"model_{load_rule(model.plan.rule).target}_int8_sym_tpu.mlir"


def simulated(
    name: str, python: str, folder: Path, inputs: dict[str, Any], count: int
) -> dict[str, Any]:
    """Return results of the simulator: all tensors for ``count`` samples, outputs for all."""
    np.savez(folder / "inputs.npz", **inputs)
    words = [python, "-c", SIMULATE, str(count), name]
    variables = environment(python)
    done = subprocess.run(words, cwd=folder, env=variables, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"the simulator failed:\n{done.stderr[-3000:]}")
    with np.load(folder / "outputs.npz") as found:
        return {key: found[key] for key in found.files}
