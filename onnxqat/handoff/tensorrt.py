"""trtexec's command for a calibration cache.

NVIDIA TensorRT developer guide, "trtexec": ``--int8 --calib=FILE`` reads a cache. Implicit
quantization is deprecated since 10.1; a Q/DQ model replaces it.
"""

from __future__ import annotations

from onnxqat.handoff.facts import Facts, command, document

__all__ = ["trtexec"]


def trtexec(facts: Facts) -> dict[str, str]:
    """Return the call with the cache, and the call with a Q/DQ model."""
    shapes = ",".join(f"{one.name}:{one.lengths('x')}" for one in facts.inputs)
    paragraphs = [
        "TensorRT below 10, with the calibration cache:",
        command("trtexec", f"--onnx={facts.model}", "--int8", f"--calib={facts.files['table']}",
                f"--shapes={shapes}", "--saveEngine=model.engine"),
        "TensorRT 10 and newer, with the model from 'onnxqat export --format tensorrt':",
        command("trtexec", "--onnx=model.int8.onnx", "--int8", f"--shapes={shapes}",
                "--saveEngine=model.engine"),
    ]  # fmt: skip
    if facts.images:
        paragraphs.append(f"{facts.normalization}, computed by your application.")
    return {"compile.txt": document(*paragraphs)}
