"""ncnn's commands for an int8 model.

``ncnn2int8`` takes a model and a table (Tencent/ncnn
``docs/how-to-use-and-FAQ/quantized-int8-inference.md``). In an application,
``substract_mean_normalize`` takes the same mean and scale.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts, command, document, numbers

__all__ = ["ncnn2int8"]


def ncnn2int8(facts: Facts) -> dict[str, str]:
    """Return the commands that convert and quantize, and the normalization of pixels."""
    paragraphs = [
        command("onnx2ncnn", facts.model, "model.param", "model.bin"),
        command("ncnn2int8", "model.param", "model.bin", "model-int8.param", "model-int8.bin",
                facts.files["table"]),
        "Do not optimize the model before or after: its layers must keep the names in the table.",
    ]  # fmt: skip
    if facts.images:
        paragraphs.append(
            f"Pixels: {facts.pixels}, substract_mean_normalize with mean {numbers(facts.mean)} and "
            f"norm {numbers(facts.scale)}."
        )
    return {"compile.txt": document(*paragraphs)}
