"""onnxruntime's calls for an exported model, as a Python script.

The script lets onnxruntime fuse the Q/DQ pairs of the model that ``onnxqat export --format
onnxruntime`` writes to integer kernels once, and saves the result (onnxruntime.ai, "Graph
Optimizations", offline mode). It was run with onnxruntime 1.19.2.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts
from onnxqat.handoff.openvino import INTEGERS

__all__ = ["onnxruntime"]

SCRIPT = '''#!/usr/bin/env python3
"""Fuses the integer model with onnxruntime (tested with 1.19.2) and saves it for this kind of CPU.

Write {integers} into this folder first: onnxqat export QDQ --format onnxruntime -o {integers}
{normalization}"""

import sys
from pathlib import Path

import onnxruntime

folder = Path(__file__).resolve().parent
if not (folder / {integers!r}).is_file():
    sys.exit({integers!r} + " is missing. Write it with: onnxqat export QDQ --format onnxruntime")
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
options.optimized_model_filepath = str(folder / "model.fused.onnx")
onnxruntime.InferenceSession(
    folder / {integers!r}, options, providers=["CPUExecutionProvider"]
)
'''


def onnxruntime(facts: Facts) -> dict[str, str]:
    """Return the script that fuses the exported model."""
    told = f"{facts.normalization}, computed by your application.\n" if facts.images else ""
    return {"compile.py": SCRIPT.format(integers=INTEGERS, normalization=told)}
