"""OpenVINO's calls for an exported model, as a Python script.

The script adds the normalization of pixels to the model that ``onnxqat export --format openvino``
writes, and saves it in OpenVINO's own format (docs.openvino.ai, "Preprocessing API" and "Model
Preparation"). ``scale`` of that API divides. The script was run with OpenVINO 2026.4.1: its model
computes what the exported one does.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts, Input, numbers

__all__ = ["INTEGERS", "openvino"]

INTEGERS = "model.int8.onnx"
SCRIPT = '''#!/usr/bin/env python3
"""Compiles the integer model with OpenVINO (tested with 2026.4.1). Run it where that is installed.

Write {integers} into this folder first: onnxqat export QDQ --format openvino -o {integers}
"""

import sys
from pathlib import Path

import openvino
from openvino.preprocess import PrePostProcessor

folder = Path(__file__).resolve().parent
if not (folder / {integers!r}).is_file():
    sys.exit({integers!r} + " is missing. Write it with: onnxqat export QDQ --format openvino")
model = openvino.Core().read_model(folder / {integers!r})
model.reshape({{{shapes}}})  # -1 is a free length
steps = PrePostProcessor(model)
{images}openvino.save_model(steps.build(), folder / "model.xml", compress_to_fp16=False)
'''
IMAGE = """# {name!r} takes bytes of images in NHWC: {pixels}.
image = steps.input({name!r})
image.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
image.model().set_layout(openvino.Layout({layout!r}))
to_float = image.preprocess().convert_element_type(openvino.Type.f32)
to_float.mean([{mean}]).scale([{std}])
"""


def openvino(facts: Facts) -> dict[str, str]:
    """Return the script that compiles the exported model."""
    shapes = ", ".join(f"{one.name!r}: {_lengths(one)}" for one in facts.inputs)
    images = [
        IMAGE.format(
            name=one.name,
            pixels=facts.pixels,
            layout=str(one.layout).upper(),
            mean=numbers(facts.mean, ", "),
            std=numbers(facts.std, ", "),
        )
        for one in facts.images
    ]
    text = SCRIPT.format(integers=INTEGERS, shapes=shapes, images="".join(images))
    return {"compile.py": text}


def _lengths(one: Input) -> list[int]:
    return [n if isinstance(n, int) else -1 for n in one.shape]
