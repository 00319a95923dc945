"""MindSpore's conversion command, and the numbers for its quantized export.

``mindspore.export(net, ..., mean=, std_dev=)`` of r1.5 sets the scale of the first layer's input to
``1 / std_dev`` and its zero point to ``round(mean)`` (mindspore-ai/mindspore
``mindspore/compression/export/quant_export.py``). Its quantization-aware training takes the widths
as ``quant_dtype`` (``mindspore/compression/quant/qat.py``).
"""

from __future__ import annotations

from pathlib import PurePath

from onnxqat.handoff.facts import Facts, command, document, numbers

__all__ = ["mindspore"]


def mindspore(facts: Facts) -> dict[str, str]:
    """Return the command that converts the float model, and the numbers of the first layer."""
    shapes = ";".join(f"{one.name}:{one.lengths(',')}" for one in facts.inputs)
    convert = command(
        "converter_lite",
        "--fmk=ONNX",
        f"--modelFile={facts.model}",
        f"--outputFile={PurePath(facts.model).stem}",
        f"--inputShape={shapes}",
    )
    paragraphs = [
        "Convert the float model:",
        convert,
        f"{facts.files['table']} has the ranges and widths of every layer, for MindSpore networks.",
        "converter_lite does not read this file.",
    ]
    points = facts.quantized.plan.grid_points()
    widths = sorted({point.spec.bits for point in points if point.role == "weight"})
    paragraphs.append(
        f"As quant_dtype of QuantizationAwareTraining: QuantDtype.INT{facts.bits} for activations, "
        f"{' or '.join(f'QuantDtype.INT{bits}' for bits in widths)} for weights."
    )
    if facts.images:
        paragraphs.append(
            "Pass these numbers to mindspore.export, for pixels as input: "
            f"mean {numbers(facts.mean)}, std_dev {numbers(facts.std)}."
        )
    return {"compile.txt": document(*paragraphs)}
