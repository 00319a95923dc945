"""Write the commands of the vendor's compiler for a deployed model, with all values filled in.

One module per vendor. The keys of `HANDOFFS` are names of calibration tables; where several tools
read one table, the key is the ``target`` of the rule. ``compile.sh`` and ``compile.py`` are written
only for tools that were run with such a script. ``compile.txt`` is not confirmed by a run, and its
first line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnxqat.handoff.ascend import AIPP, atc
from onnxqat.handoff.axera import PULSAR2, pulsar2
from onnxqat.handoff.cambricon import magicmind
from onnxqat.handoff.facts import Facts, facts_of
from onnxqat.handoff.horizon import CONFIG, hb_mapper
from onnxqat.handoff.litert import CONVERTER, litert_converter
from onnxqat.handoff.mindspore import mindspore
from onnxqat.handoff.ncnn import ncnn2int8
from onnxqat.handoff.onnxruntime import onnxruntime
from onnxqat.handoff.openvino import openvino
from onnxqat.handoff.qnn import qairt
from onnxqat.handoff.rockchip import COMPILE, rknn_toolkit
from onnxqat.handoff.sophgo import tpu_mlir
from onnxqat.handoff.tensorrt import trtexec

__all__ = ["HANDOFFS", "HANDOFF_FILES", "facts_of"]

HANDOFFS: Mapping[str, Callable[[Facts], dict[str, str]]] = {
    "amct": atc,
    "axera": pulsar2,
    "cambricon": magicmind,
    "horizon": hb_mapper,
    "litert": litert_converter,
    "mindspore": mindspore,
    "ncnn": ncnn2int8,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "qnn": qairt,
    "qnn-1.0.0": qairt,
    "rockchip": rknn_toolkit,
    "sophgo": tpu_mlir,
    "tensorrt": trtexec,
}
# All files that they write; `strip` removes those of an earlier model.
HANDOFF_FILES = ("compile.sh", "compile.txt", COMPILE, CONVERTER, AIPP, CONFIG, PULSAR2)
