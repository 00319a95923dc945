"""Export a model with integer weights, for a runtime."""

from __future__ import annotations

from onnxqat.camera import Camera, CameraFormat, YuvRange, take_yuv
from onnxqat.choices import check_choice
from onnxqat.errors import FormatError, OptionError
from onnxqat.formats import EXPORTS, with_int4_weights
from onnxqat.model import Model
from onnxqat.settings import stored_settings
from onnxqat.verbs.models import AnySource, quantized_model

__all__ = ["export"]


def export(
    model: AnySource,
    *,
    format_name: str,
    int4: bool = False,
    input_type_rt: CameraFormat | None = None,
    yuv_range: YuvRange = "full",
) -> Model:
    """Return the model with integer weights, like ``onnxqat export``.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        A calibrated or fine-tuned model. It is not changed.
    format_name : {"onnxruntime", "openvino", "qoperator", "rockchip", "tensorrt"}
        The form: Q/DQ with integer weights, or QLinear operators (``qoperator``).
    int4 : bool
        Store weights of 4 bits or fewer as INT4, two per byte (opset 21).
    input_type_rt : {"yuv444", "nv12"}, optional
        Format of the pixels that a camera feeds to the model: float nodes in front of it convert
        them to the RGB or BGR pixels of its training (default: no nodes).
    yuv_range : {"full", "video"}
        Range of the camera's values: 0 to 255, or 16 to 235 of Y and 16 to 240 of U and V.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, the model is not calibrated, or the format
        cannot express the plan.
    """
    check_choice("format_name", format_name, EXPORTS, FormatError)
    if int4 and format_name == "qoperator":
        raise OptionError("int4: QLinear operators do not support 4 bits. Leave it out.")
    loaded = quantized_model(model)
    exported = EXPORTS[format_name](loaded)
    if int4:
        exported = with_int4_weights(exported, loaded.plan)
    if input_type_rt is None:
        return exported
    camera = Camera(kind=input_type_rt, yuv_range=yuv_range)
    return take_yuv(exported, stored_settings(loaded).preprocessing(), camera)
