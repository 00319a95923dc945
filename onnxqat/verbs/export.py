"""Export a model with integer weights, for a runtime."""

from __future__ import annotations

from onnxqat.choices import check_choice
from onnxqat.errors import FormatError, OptionError
from onnxqat.formats import EXPORTS, with_int4_weights
from onnxqat.model import Model
from onnxqat.verbs.models import AnySource, quantized_model

__all__ = ["export"]


def export(model: AnySource, *, format_name: str, int4: bool = False) -> Model:
    """Return the model with integer weights, like ``onnxqat export``.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        A calibrated or fine-tuned model. It is not changed.
    format_name : {"onnxruntime", "openvino", "qoperator", "rockchip", "tensorrt"}
        The form: Q/DQ with integer weights, or QLinear operators (``qoperator``).
    int4 : bool
        Store weights of 4 bits or fewer as INT4, two per byte (opset 21).

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
    return with_int4_weights(exported, loaded.plan) if int4 else exported
