"""ncnn's commands for an int8 model.

``ncnn2int8`` takes a model and a table (Tencent/ncnn
``docs/how-to-use-and-FAQ/quantized-int8-inference.md``). In an application,
``substract_mean_normalize`` takes mean and scale as they are here.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts, command, document, numbers

__all__ = ["ncnn2int8"]


def ncnn2int8(facts: Facts) -> dict[str, str]:
    """Return the conversion, the quantization, and how pixels are normalized."""
    paragraphs = [
        command("onnx2ncnn", facts.model, "model.param", "model.bin"),
        command("ncnn2int8", "model.param", "model.bin", "model-int8.param", "model-int8.bin",
                facts.files["table"]),
        "Names of layers must be those of the table: optimize the model neither before nor after.",
    ]  # fmt: skip
    if facts.images:
        paragraphs.append(
            f"Pixels: {facts.pixels}, substract_mean_normalize with mean {numbers(facts.mean)} and "
            f"norm {numbers(facts.scale)}."
        )
    return {"compile.txt": document(*paragraphs)}
