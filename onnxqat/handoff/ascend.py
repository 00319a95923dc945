"""AMCT's and ATC's commands for an Ascend chip.

AMCT's ``convert_qat_model`` for ONNX converts a model with Q/DQ pairs into one that ATC compiles
(CANN documents, AMCT: "convert_qat_model"; ATC). AIPP normalizes image bytes on the chip by
``(pixel - mean_chn - min_chn) * var_reci_chn``. ``mean_chn`` must be an integer, so the mean is
written as ``min_chn``.
"""

from __future__ import annotations

from onnxqat.handoff.facts import NOT_RUN, Facts, command, document, numbers

__all__ = ["atc"]

AIPP = "aipp.cfg"
FORMATS = {"rgb": "RGB888_U8", "bgr": "RGB888_U8", "gray": "YUV400_U8"}


def atc(facts: Facts) -> dict[str, str]:
    """Return the calls of AMCT and ATC, and the AIPP configuration of an image input."""
    convert = 'import amct_onnx\namct_onnx.convert_qat_model("model.qdq.onnx", "ascend/model")'
    shapes = ";".join(f"{one.name}:{one.lengths(',')}" for one in facts.inputs)
    words = [
        "--framework=5",
        "--model=ascend/model_deploy_model.onnx",
        f"--input_shape={shapes}",
        f"--soc_version={facts.target}",
        "--output=ascend/model",
    ]
    files = {}
    if len(facts.images) == 1 and all(isinstance(n, int) for n in facts.images[0].size):
        words.append(f"--insert_op_conf={AIPP}")
        files[AIPP] = _aipp(facts)
    steps = [
        "In Python, with AMCT; model.qdq.onnx stands for the Q/DQ model that you gave to strip:",
        convert,
        "Then compile:",
        command("atc", *words),
        f"{facts.files['table']} has the same scales, for tools that take a record file.",
    ]
    if facts.target == "CHIP":
        steps.append("CHIP: the name that 'npu-smi info' prints, with Ascend before it.")
    return {"compile.txt": document(*steps), **files}


def _aipp(facts: Facts) -> str:
    height, width = facts.images[0].size
    values = "".join(
        f"  min_chn_{i}: {numbers((mean,))}\n  var_reci_chn_{i}: {numbers((scale,))}\n"
        for i, (mean, scale) in enumerate(zip(facts.mean, facts.scale, strict=True))
    )
    return (
        f"# {NOT_RUN}; the order of the colour channels is {facts.pixels}\n"
        "aipp_op {\n"
        "  aipp_mode: static\n"
        f"  input_format: {FORMATS[facts.pixels]}\n"
        f"  src_image_size_w: {width}\n"
        f"  src_image_size_h: {height}\n"
        "  csc_switch: false\n"
        f"{values}"
        "}\n"
    )
