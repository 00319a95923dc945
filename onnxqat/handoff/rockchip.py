"""RKNN-Toolkit2's calls for a Rockchip chip, as a Python script.

The calls are those of airockchip/rknn-toolkit2 ``doc/03_Rockchip_RKNPU_API_Reference_RKNN_
Toolkit2_V2.3.2_EN.pdf``. It normalizes by ``(pixel - mean) / std``. ``scripts/check_rknn.py`` ran
the script with rknn_toolkit2 2.5.0.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts, numbers

__all__ = ["COMPILE", "rknn_toolkit"]

COMPILE = "compile.py"
SCRIPT = '''#!/usr/bin/env python3
"""Compiles the model with RKNN-Toolkit2 (tested with 2.5.0). Run it where that is installed.

An argument replaces the chip: python compile.py {target}
"""

import sys
from pathlib import Path

from rknn.api import RKNN

{comment}folder = Path(__file__).resolve().parent
chip = sys.argv[1] if len(sys.argv) > 1 else "{target}"


def check(call, code):
    if code != 0:
        sys.exit(f"{{call}} failed")


tool = RKNN()
# Level 3 fuses operations, which changes results.{pixels}
tool.config(target_platform=chip, optimization_level=2{normalization})
check(
    "load_onnx",
    tool.load_onnx(
        model=str(folder / {table!r}),
        inputs={names!r},
        input_size_list=[{shapes}],
    ),
)
check("build", tool.build(do_quantization=False))
check("export_rknn", tool.export_rknn(str(folder / f"model_{{chip}}.rknn")))
tool.release()
'''


def rknn_toolkit(facts: Facts) -> dict[str, str]:
    """Return the script that compiles the model."""
    lengths = sorted({n for one in facts.inputs for n in one.shape if isinstance(n, str)})
    text = SCRIPT.format(
        target=facts.target,
        comment=f"# Fill in {', '.join(lengths)} below.\n" if lengths else "",
        pixels=f" The input is pixels: {facts.pixels}." if facts.images else "",
        normalization=_normalization(facts),
        table=facts.files["table"],
        names=[one.name for one in facts.inputs],
        shapes=", ".join(f"[{one.lengths(', ')}]" for one in facts.inputs),
    )
    return {COMPILE: text}


def _normalization(facts: Facts) -> str:
    if not facts.images or len(facts.images) < len(facts.inputs):
        return ""  # config takes values for all inputs, or for none
    lists = {"mean_values": facts.mean, "std_values": facts.std}
    rows = {
        name: ", ".join([f"[{numbers(v, ', ')}]"] * len(facts.inputs)) for name, v in lists.items()
    }
    return "".join(f", {name}=[{row}]" for name, row in rows.items())
