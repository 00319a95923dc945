"""Models with integer weights for runtimes that restrict which Q/DQ pairs they take."""

from __future__ import annotations

import onnxruntime as ort

from onnxqat.device import LOG_FATAL_ONLY
from onnxqat.errors import ModelError
from onnxqat.formats.format import Calibrated, refuse
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.formats.thresholds import require_symmetric
from onnxqat.locks import Scratch
from onnxqat.model import Model, load_model
from onnxqat.pairs import has_clip
from onnxqat.quantized import QuantizedModel

__all__ = ["openvino_model", "qoperator_model", "tensorrt_model"]


def openvino_model(model: QuantizedModel) -> Model:
    """Return the model for OpenVINO: integer weights, float biases.

    OpenVINO reads Q/DQ as FakeQuantize. A per-axis pair carries its ``axis``; a per-tensor one has
    a scale of shape (). OpenVINO's own quantizer keeps biases in float (openvinotoolkit/nncf
    ``src/nncf/common/hardware/setups/``). OpenVINO does not match a pair with a Clip between Q and
    DQ, which an activation of fewer than 8 bits needs.

    Raises
    ------
    FormatError
        An activation has a Clip between Q and DQ.
    """
    _refuse_clips(model, "OpenVINO")
    return integer_model(model, biases=False)


def tensorrt_model(model: QuantizedModel) -> Model:
    """Return the model for TensorRT: int8 weights, float biases, every zero_point 0.

    NVIDIA TensorRT developer guide, Working with Quantized Types: symmetric int8 only, bias in
    float.

    Raises
    ------
    FormatError
        A zero point is not 0, integers are unsigned, an activation does not have 8 bits, or a
        weight has more.
    """
    require_symmetric(Calibrated(model), "A model for TensorRT", weight_bits=range(2, 9))
    _refuse_clips(model, "TensorRT")
    return integer_model(model, biases=False)


def qoperator_model(model: QuantizedModel) -> Model:
    """Return the model with QLinearConv, QGemm and similar operators instead of Q/DQ pairs.

    onnxruntime's optimizer replaces the pairs, at its extended level, which is independent of the
    hardware. Pairs that it does not replace stay. Some of the operators are in the domain
    ``com.microsoft``.

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
            raise ModelError(
                f"{model.name}: onnxruntime cannot write QLinear operators ({message}). Export "
                "with Q/DQ."
            ) from error
        return load_model(path)


def _refuse_clips(model: QuantizedModel, runtime: str) -> None:
    clips = (
        f"'{point.tensor}' needs a Clip between Q and DQ"
        for point, params in Calibrated(model).points("activation")
        if has_clip(point, params)
    )
    refuse(clips, f"{runtime} reads plain Q/DQ pairs; use the full range of 8 bits")
