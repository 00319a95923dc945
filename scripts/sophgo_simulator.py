"""Compile a model with Sophgo's compiler, tpu-mlir, and run it in the compiler's simulator.

The compiler is used by its command line, in an environment of its own: `TOOL.variable` names its
Python, a 3.10 with the wheel tpu_mlir 1.30.2 and what it needs (docs/integer.md says how one is
made).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
from vendor_check import Environment, Feeds, Tool

from onnxqat.deploy import write_deployment
from onnxqat.model import Model

__all__ = ["TOOL", "compiled", "simulated"]

TOOL = Tool("tpu-mlir", "ONNXQAT_TPU_MLIR", "tpu_mlir")
SIMULATE = """
import os, sys, numpy as np
from tools.model_runner import mlir_inference
os.chdir("chip")
x, found = dict(np.load("inputs.npz")), {}
count = int(sys.argv[1])
for i in range(len(next(iter(x.values())))):
    one = {name: values[i : i + 1] for name, values in x.items()}
    for name, values in mlir_inference(one, sys.argv[2], dump_all=i < count).items():
        found.setdefault(name, []).append(values)
np.savez("outputs.npz", **{name: np.concatenate(v) for name, v in found.items()})
"""


@cache
def variables(environment: Environment) -> dict[str, str]:
    """Return the environment variables for the compiler's tools."""
    find = (
        "import importlib.util as u; print(u.find_spec('tpu_mlir').submodule_search_locations[0])"
    )
    base = Path(environment.run_code(find).splitlines()[-1])
    calls = environment.folder / "calls"  # run the tools with the given interpreter
    calls.mkdir(exist_ok=True)
    for tool in ("model_transform.py", "model_deploy.py"):
        call = calls / tool
        call.write_text(
            f'#!/bin/sh\nexec "{environment.python}" "{base}/python/tools/{tool}" "$@"\n'
        )
        call.chmod(0o755)
    paths = {
        "PATH": [calls, base / "bin", base / "python/tools", Path(environment.python).parent],
        "PYTHONPATH": [base, base / "python", base / "customlayer/python"],
        "LD_LIBRARY_PATH": [base / "lib", base / "lib/capi", base / "lib/third_party"],
    }
    outer = {key: os.environ.get(key, "") for key in ("PATH", "LD_LIBRARY_PATH")}
    joined = {
        key: os.pathsep.join([*map(str, added), *filter(None, [outer.get(key)])])
        for key, added in paths.items()
    }
    firmware = str(base / "lib/libcmodel_custom.so")
    return joined | {"TPUKERNEL_CUSTOM_FIRMWARE_PATH": firmware, "TPUC_ROOT": str(base)}


def compiled(model: Model, environment: Environment) -> str:
    """Strip and compile a model into ``chip`` by its script; return the name of its MLIR file."""
    files = write_deployment(model, environment.folder / "chip", table="sophgo").files
    words = ["bash", files["compile.sh"], "--debug", "--skip_validation"]
    environment.run(words, variables=variables(environment))
    (found,) = (environment.folder / "chip").glob("model_*_int[48]_*sym_tpu.mlir")
    return found.name


def simulated(name: str, environment: Environment, inputs: Feeds, count: int) -> Feeds:
    """Return results of the simulator: all tensors for ``count`` samples, outputs for all."""
    folder = environment.folder / "chip"
    np.savez(folder / "inputs.npz", **inputs)
    words = [environment.python, "-c", SIMULATE, str(count), name]
    environment.run(words, variables=variables(environment))
    with np.load(folder / "outputs.npz") as found:
        return {key: found[key] for key in found.files}
