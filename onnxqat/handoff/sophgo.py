"""tpu-mlir's commands for a Sophgo chip, as a script.

The script calls ``model_transform.py`` and ``model_deploy.py`` (sophgo/tpu-mlir python/tools, quick
start and user guide). ``--mean`` and ``--scale`` normalize by ``(pixel - mean) * scale``, as in
onnxqat. ``scripts/check_tpu_mlir.py`` ran the script with tpu-mlir 1.30.2. ``--quantize INT4`` is
the mode of ops that the qtable does not name; the qtable names those of 8 bits. Its tolerance is
the compiler's default for ``INT8``.
"""

from __future__ import annotations

import shlex

from onnxqat.formats.sophgo_names import int4_ops, is_asymmetric
from onnxqat.handoff.facts import Facts, numbers

__all__ = ["tpu_mlir"]


def tpu_mlir(facts: Facts) -> dict[str, str]:
    """Return the script that compiles the model with its table."""
    shapes = ",".join(f"[{one.lengths(',')}]" for one in facts.inputs)
    transform = [
        f"--model_name model --model_def {shlex.quote(facts.model)}",
        f"--input_shapes {shlex.quote(f'[{shapes}]')}",
        *_preprocessing(facts),
        "--mlir model.mlir",
    ]
    small = int4_ops(facts.quantized, facts.rule)
    mode = "INT4 --tolerance 0.90,0.80" if small else "INT8"  # INT4 has no tolerance of its own
    asymmetric = " --asymmetric" if is_asymmetric(facts.quantized.plan) else ""
    deploy = [
        f"--mlir model.mlir --quantize {mode}{asymmetric}",
        f"--calibration_table {shlex.quote(facts.files['table'])}",
        f"--processor {facts.target} --model model_{facts.target}.{_suffix(facts.target)}",
    ]
    if "qtable" in facts.files:
        deploy.insert(2, f"--quantize_table {shlex.quote(facts.files['qtable'])}")
    lines = [
        "#!/usr/bin/env bash",
        "# Compiles the model with tpu-mlir (tested with 1.30.2). Run it where tpu-mlir is",
        "# installed. Its arguments are passed to model_deploy.py, such as --fuse_preprocess.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        _command("model_transform.py", transform),
        _command("model_deploy.py", [*deploy, '"$@"']),
    ]
    return {"compile.sh": "\n".join(lines) + "\n"}


def _preprocessing(facts: Facts) -> list[str]:
    if not facts.images:
        return []
    words = [
        f"--mean {numbers(facts.mean)} --scale {numbers(facts.scale)}",
        f"--pixel_format {facts.pixels}",
    ]
    size = facts.preprocessing.resize_dims
    if size is not None:
        words.append(f"--resize_dims {size[0]},{size[1]}")
    if facts.preprocessing.keep_aspect_ratio:
        words.append(f"--keep_aspect_ratio --pad_value {round(facts.preprocessing.pad_value)}")
    if facts.images[0].layout == "nhwc":
        words.append("--channel_format nhwc")
    return words


def _suffix(target: str) -> str:
    return "cvimodel" if target.startswith("cv18") else "bmodel"


def _command(name: str, words: list[str]) -> str:
    return " \\\n    ".join((name, *words))
