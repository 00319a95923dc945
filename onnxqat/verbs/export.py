"""A model with integer weights, for a runtime."""

from __future__ import annotations

from onnxqat.choices import check_choice
from onnxqat.errors import FormatError, OptionError
from onnxqat.formats import EXPORTS, with_int4_weights
from onnxqat.model import Model
from onnxqat.verbs.models import AnySource, quantized_model

__all__ = ["export"]


def export(model: AnySource, *, format_name: str, int4: bool = False) -> Model:
    """Return the model with integer weights, as ``onnxqat export`` does.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        Calibrated or fine-tuned. It is not changed.
    format_name : {"onnxruntime", "openvino", "qoperator", "tensorrt"}
        Integer weights behind Q/DQ, or in QLinear operators (``qoperator``).
    int4 : bool
        Store weights of 4 bits and fewer two to a byte (opset 21).

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, the model is not calibrated, or the format
        cannot say what the plan says.
    """
    check_choice("format_name", format_name, EXPORTS, FormatError)
    if int4 and format_name == "qoperator":
        raise OptionError("int4: needs Q/DQ; QLinear operators have no 4 bits. Leave it out.")
    loaded = quantized_model(model)
    exported = EXPORTS[format_name](loaded)
    return with_int4_weights(exported, loaded.plan) if int4 else exported
