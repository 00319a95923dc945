"""Qualcomm's commands for a model with quantization overrides.

The AI Runtime has ``qairt-converter`` and ``qairt-quantizer``; SNPE had ``snpe-onnx-to-dlc`` and
``snpe-dlc-quantize`` (docs.qualcomm.com 80-63442-10, "SNPE general tools" and "Qairt quantizer").
The converter takes the encodings; the quantizer quantizes tensors that have none.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts, command, document

__all__ = ["qairt"]


def qairt(facts: Facts) -> dict[str, str]:
    """Return the calls of converter and quantizer, of the AI Runtime and of SNPE."""
    model, table = facts.model, facts.files["table"]
    shapes = [word for one in facts.inputs for word in ("--input_dim", one.name, one.lengths(","))]
    lists = ["--input_dlc", "model.dlc", "--input_list", "input_list.txt"]
    paragraphs = [
        command("qairt-converter", "--input_network", model, "--quantization_overrides", table,
                "--output_path", "model.dlc"),
        command("qairt-quantizer", *lists, "--output_dlc", "model_quantized.dlc",
                "--act_bitwidth", str(facts.bits)),
        "Or, with SNPE:",
        command("snpe-onnx-to-dlc", "--input_network", model, *shapes,
                "--quantization_overrides", table, "--output_path", "model.dlc"),
        command("snpe-dlc-quantize", *lists, "--override_params", "--output_dlc",
                "model_quantized.dlc", "--act_bitwidth", str(facts.bits)),
        "input_list.txt lists raw float32 files of normalized inputs, one sample per line.",
    ]  # fmt: skip
    if facts.images:
        paragraphs.append(f"{facts.normalization}.")
    return {"compile.txt": document(*paragraphs)}
