"""Nodes in front of a float model that let it take a camera's YUV pixels.

A model that was trained on RGB or BGR gets a Conv (if it is NHWC, a MatMul and an Add) that
computes its input from values of Y, U and V from 0 to 255. Conversion and normalization are both
affine, so one matrix and one bias are enough. Values outside of 0 to 255 after the conversion are
not clipped.

The conversion is that of ITU-R BT.601-7, with kr = 0.299 and kb = 0.114::

    R = Y + 2 (1 - kr) V        G = (Y - kr R - kb B) / (1 - kr - kb)        B = Y + 2 (1 - kb) U

with U and V around 0. In the full range, Y is 0 to 255, and U and V are 128 +- 127.5 (JPEG's range,
ITU-T T.871). In the video range Y is 16 to 235, and U and V are 128 +- 112.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.choices import check_choice
from onnxqat.data import Preprocessing
from onnxqat.data.feeds import model_layout
from onnxqat.errors import OptionError
from onnxqat.model import Model
from onnxqat.settings import input_specs

__all__ = ["Camera", "CameraFormat", "YuvRange", "take_yuv", "yuv_to_rgb"]

CameraFormat: TypeAlias = Literal["yuv444", "nv12"]
YuvRange: TypeAlias = Literal["full", "video"]

KR, KB = 0.299, 0.114
OPTION = "--input-type-rt"


@dataclass(frozen=True, kw_only=True)
class Camera:
    """The pixels that a deployed model is fed.

    Attributes
    ----------
    kind : {"yuv444", "nv12"}
        Format of the camera's pixels. With ``nv12``, the chip enlarges U and V to the size of Y
        before the model reads them.
    yuv_range : {"full", "video"}
        Range of the values.
    """

    kind: CameraFormat
    yuv_range: YuvRange = "full"

    def __post_init__(self) -> None:
        check_choice("input_type_rt", self.kind, get_args(CameraFormat), OptionError)
        check_choice("yuv_range", self.yuv_range, get_args(YuvRange), OptionError)


def yuv_to_rgb(yuv_range: YuvRange) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return matrix and offset of the conversion: ``rgb = matrix @ (yuv - offset)``.

    Returns
    -------
    matrix : float64 of shape (3, 3)
    offset : float64 of shape (3,)
    """
    red, blue, kg = 2 * (1 - KR), 2 * (1 - KB), 1 - KR - KB
    matrix = np.array(
        [[1, 0, red], [1, -KB * blue / kg, -KR * red / kg], [1, blue, 0]], dtype=np.float64
    )
    if yuv_range == "full":
        return matrix, np.array([0.0, 128, 128])
    return matrix * np.array([255 / 219, 255 / 224, 255 / 224]), np.array([16.0, 128, 128])


def take_yuv(model: Model, preprocessing: Preprocessing, camera: Camera) -> Model:
    """Return a model whose image input takes YUV pixels.

    The new input has the name of the old one plus ``_yuv``, and the same shape and layout. The old
    input becomes an inner tensor with the same name, so its calibration table entry still applies.

    Parameters
    ----------
    model : Model
        A float model; it is not changed.
    preprocessing : Preprocessing
        Preprocessing of the images that the model was trained with.
    camera : Camera
        What the new input takes.

    Raises
    ------
    OptionError
        The model does not have exactly one image input of float32 with three channels, or its
        height or width is odd.
    """
    made = model.copy()
    (spec,) = specs if len(specs := _images(made)) == 1 else (None,)
    if spec is None or spec.dtype != "float32":
        found = ", ".join(f"'{one.name}' ({one.dtype})" for one in specs) or "none"
        raise OptionError(
            f"{OPTION}: YUV needs one float32 image input of three channels; the model has "
            f"{found}. Leave the option out."
        )
    layout = model_layout(spec)
    sizes = spec.shape[1:3] if layout == "nhwc" else spec.shape[2:]
    if any(isinstance(n, int) and n % 2 for n in sizes):
        raise OptionError(
            f"{OPTION}: '{spec.name}' is {sizes[0]} x {sizes[1]}; U and V of {camera.kind} need an "
            "even height and width. Export the model at another size."
        )
    weight, bias = _affine(preprocessing, camera.yuv_range)
    graph = made.graph
    (old,) = (tensor for tensor in graph.inputs if tensor.name == spec.name)
    new = gs.Variable(_free(graph, f"{old.name}_yuv"), dtype=old.dtype, shape=old.shape)
    graph.inputs[graph.inputs.index(old)] = new
    for node in _nodes(graph, new, old, weight, bias, nhwc=layout == "nhwc"):
        graph.nodes.insert(0, node)
    graph.toposort()
    return made


def _images(model: Model) -> list[Any]:
    def channels(spec: Any) -> Any:
        return spec.shape[3 if model_layout(spec) == "nhwc" else 1]

    return [s for s in input_specs(model) if model_layout(s) and channels(s) == 3]


def _affine(
    preprocessing: Preprocessing, yuv_range: YuvRange
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weight and bias: model input = weight @ yuv + bias, rounded once."""
    matrix, offset = yuv_to_rgb(yuv_range)
    if preprocessing.pixel_format == "bgr":
        matrix = matrix[::-1]
    scale = np.broadcast_to(np.asarray(preprocessing.scale, np.float64), 3)
    mean = np.broadcast_to(np.asarray(preprocessing.mean, np.float64), 3)
    weight = scale[:, None] * matrix
    bias = -scale * mean - weight @ offset
    return weight.astype(np.float32), bias.astype(np.float32)


def _nodes(
    graph: gs.Graph, new: gs.Variable, old: gs.Variable, weight: Any, bias: Any, *, nhwc: bool
) -> list[gs.Node]:
    """Return the nodes from the new input to the tensor that the old one was, last node first."""
    name = _free(graph, f"{old.name}_from_yuv")
    bias = gs.Constant(f"{name}/bias", bias)
    if not nhwc:
        kernel = gs.Constant(f"{name}/weight", weight.reshape(3, 3, 1, 1))
        return [gs.Node("Conv", name, inputs=[new, kernel, bias], outputs=[old])]
    product = gs.Variable(f"{name}/product", dtype=np.float32, shape=new.shape)
    matrix = gs.Constant(f"{name}/weight", np.ascontiguousarray(weight.T))
    return [
        gs.Node("Add", name, inputs=[product, bias], outputs=[old]),
        gs.Node("MatMul", f"{name}/matrix", inputs=[new, matrix], outputs=[product]),
    ]


def _free(graph: gs.Graph, name: str) -> str:
    """Return a name that no tensor or node has."""
    taken = {*graph.tensors(), *(node.name for node in graph.nodes)}
    while name in taken:
        name += "_"
    return name
