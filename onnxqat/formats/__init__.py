"""Files for deployment targets: calibration tables, and models with integer weights."""

from collections.abc import Callable, Mapping

from onnxqat.formats.amct import AMCT
from onnxqat.formats.axera import AXERA
from onnxqat.formats.cambricon import CAMBRICON
from onnxqat.formats.encodings import ENCODINGS, ENCODINGS_1
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written
from onnxqat.formats.horizon import HORIZON
from onnxqat.formats.int4 import with_int4_weights
from onnxqat.formats.integer_models import openvino_model, qoperator_model, tensorrt_model
from onnxqat.formats.mindspore import MINDSPORE
from onnxqat.formats.mnn import MNN
from onnxqat.formats.ncnn import NCNN
from onnxqat.formats.neutral import NEUTRAL
from onnxqat.formats.onnxruntime_calibration import ONNXRUNTIME_CALIBRATION
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.formats.rockchip import ROCKCHIP, rockchip_model
from onnxqat.formats.sophgo_names import SOPHGO
from onnxqat.formats.tengine import TENGINE
from onnxqat.formats.tensorrt import TENSORRT
from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Calibrated",
    "Format",
    "Found",
    "Table",
    "Written",
    "with_int4_weights",
]

# Calibration tables, by the name used in --format and in rule files.
FORMATS: Mapping[str, Format] = {
    "amct": AMCT,
    "axera": AXERA,
    "cambricon": CAMBRICON,
    "horizon": HORIZON,
    "mindspore": MINDSPORE,
    "mnn": MNN,
    "ncnn": NCNN,
    "onnxqat": NEUTRAL,
    "onnxruntime-calibration": ONNXRUNTIME_CALIBRATION,
    "qnn": ENCODINGS,
    "qnn-1.0.0": ENCODINGS_1,
    "rockchip": ROCKCHIP,
    "sophgo": SOPHGO,
    "tengine": TENGINE,
    "tensorrt": TENSORRT,
}

# Models with integer weights.
EXPORTS: Mapping[str, Callable[[QuantizedModel], Model]] = {
    "onnxruntime": integer_model,
    "openvino": openvino_model,
    "qoperator": qoperator_model,
    "rockchip": rockchip_model,
    "tensorrt": tensorrt_model,
}
