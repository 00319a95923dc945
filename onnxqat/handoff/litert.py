"""A script that makes an int8 .tflite file with LiteRT's converter.

Two maintained tools do the work: onnx2tf writes the float model as .tflite without TensorFlow, and
``litert-converter`` (google-ai-edge/LiteRT), in its mode for models with quantizers, converts it to
integers. In between, the script puts the scales and zero points of the table into the model.
``scripts/check_litert.py`` ran it with onnx2tf 2.6.9 and litert-converter 0.5.0.
"""

from __future__ import annotations

import shlex
from importlib.resources import files

from onnxqat.handoff.facts import Facts

__all__ = ["CONVERTER", "litert_converter"]

CONVERTER = "to_tflite.py"


def litert_converter(facts: Facts) -> dict[str, str]:
    """Return the script that converts the model with its table, and the Python file it runs."""
    if "table" not in facts.files:
        return {}
    words = " ".join(map(shlex.quote, (facts.model, facts.files["table"])))
    lines = [
        "#!/usr/bin/env bash",
        "# Makes the int8 model model.tflite. Needs a Python 3.12 with onnx2tf and",
        "# litert-converter (tested with 2.6.9 and 0.5.0); PYTHON names it.",
    ]
    if facts.images:
        lines += [f"# {facts.normalization}."]
    lines += [
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f'"${{PYTHON:-python3}}" {CONVERTER} {words} model.tflite',
    ]
    converter = files("onnxqat.handoff").joinpath(CONVERTER).read_text(encoding="utf-8")
    return {"compile.sh": "\n".join(lines) + "\n", CONVERTER: converter}
