"""Models with integer weights for runtimes that take Q/DQ with a few conditions of their own."""

from __future__ import annotations

import onnxruntime as ort

from onnxqat.errors import ModelError
from onnxqat.formats.format import Calibrated, refuse
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.formats.thresholds import require_symmetric
from onnxqat.locks import Scratch
from onnxqat.model import Model, load_model
from onnxqat.pairs import has_clip
from onnxqat.quantized import QuantizedModel
from onnxqat.runtime import LOG_FATAL_ONLY

__all__ = ["openvino_model", "qoperator_model", "tensorrt_model"]


def openvino_model(model: QuantizedModel) -> Model:
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


def tensorrt_model(model: QuantizedModel) -> Model:
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


def qoperator_model(model: QuantizedModel) -> Model:
    """Return the model with QLinearConv, QGemm and their like in place of Q/DQ pairs.

    onnxruntime's own optimizer makes them, at the level that knows no hardware; what it leaves in
    Q/DQ stays so. Besides ONNX's, the operators are of the domain ``com.microsoft``.

    Raises
    ------
    ModelError
        onnxruntime refuses the model.
    """
    data = integer_model(model).to_proto().SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = LOG_FATAL_ONLY
    with Scratch() as folder:
        path = folder / model.name
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the bindings raise a class per status code
            message = str(error).splitlines()[0]
            raise ModelError(f"onnxruntime cannot optimize the model: {message}") from error
        return load_model(path)


def _refuse_clips(model: QuantizedModel, runtime: str) -> None:
    clips = (
        f"'{point.tensor}' has a narrowed range"
        for point, params in Calibrated(model).points("activation")
        if has_clip(point, params)
    )
    refuse(clips, f"{runtime} reads plain Q/DQ pairs; use all of 8 bits for activations")
