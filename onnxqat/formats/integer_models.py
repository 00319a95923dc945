"""Models with integer weights for runtimes that take Q/DQ with a few conditions of their own."""

from __future__ import annotations

from onnxqat.formats.format import Calibrated, refuse
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.formats.thresholds import require_symmetric
from onnxqat.model import Model

__all__ = ["openvino_model", "tensorrt_model"]


def openvino_model(model: Model) -> Model:
    """Return the model for OpenVINO: integer weights, float biases.

    OpenVINO reads Q/DQ as FakeQuantize. A per-axis pair carries its ``axis``; a per-tensor one has
    a scale of shape (). Its own quantizer keeps biases in float (openvinotoolkit/nncf
    ``src/nncf/common/hardware/setups/``). A Clip between Q and DQ, which fewer than 8 bits of an
    activation need, is not part of the pattern.

    Raises
    ------
    FormatError
        An activation has a Clip between Q and DQ.
    """
    _refuse_clips(model, "OpenVINO")
    return integer_model(model, biases=False)


def tensorrt_model(model: Model) -> Model:
    """Return the model for TensorRT: int8 weights, float biases, zero points of 0.

    NVIDIA TensorRT developer guide, Working with Quantized Types: symmetric int8 only, bias in
    float.

    Raises
    ------
    FormatError
        A zero point other than 0, unsigned integers, or other widths than 8 bits.
    """
    require_symmetric(Calibrated(model), "A model for TensorRT", weight_bits=range(2, 9))
    _refuse_clips(model, "TensorRT")
    return integer_model(model, biases=False)


def _refuse_clips(model: Model, runtime: str) -> None:
    nodes = {node.name for node in model.graph.nodes}
    clips = (
        f"'{p.tensor}' has a narrowed range"
        for p, _ in Calibrated(model).points("activation")
        if f"{p.tensor}/Clip" in nodes
    )
    refuse(clips, f"{runtime} reads plain Q/DQ pairs; use all of 8 bits for activations")
