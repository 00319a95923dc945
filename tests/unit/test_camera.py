"""YUV pixels in front of a model: against the coefficients of BT.601 as printed, and Pillow."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxqat import export, strip
from onnxqat.camera import Camera, take_yuv
from onnxqat.data import Preprocessing
from onnxqat.errors import OptionError
from onnxqat.model import from_proto
from onnxqat.settings import Settings, settle
from tests.networks import convnet, quantized
from tests.oracles import run_ort

MEAN, SCALE = (123.675, 116.28, 103.53), (0.0171248, 0.017507, 0.0174292)
# R, G, B of Y, Cb, Cr, to six digits: ITU-T T.871 for the full range, BT.601 for the video range
PRINTED = {
    "full": ([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], [0, 128, 128]),
    "video": (
        [[1.164384, 0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0]],
        [16, 128, 128],
    ),
}
NCHW = '<ir_version: 8, opset_import: ["": 17]> m (float[N, 3, h, w] x) => (float[N, 3, h, w] y) {'
NHWC = NCHW.replace("3, h, w", "h, w, 3")


def pixels(shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)


@pytest.mark.parametrize("yuv_range", PRINTED)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_input_is_converted_and_normalized(yuv_range, order, layout):
    text = (NCHW if layout == "nchw" else NHWC) + " y = Identity(x) }"
    given = Preprocessing(mean=MEAN, scale=SCALE, pixel_format=order)
    model = from_proto(onnx.parser.parse_model(text))
    made = take_yuv(model, given, Camera(kind="nv12", yuv_range=yuv_range))
    yuv = pixels((2, 4, 6, 3))
    matrix, offset = PRINTED[yuv_range]
    rgb = (yuv.astype(np.float64) - offset) @ np.transpose(matrix)
    expected = ((rgb if order == "rgb" else rgb[..., ::-1]) - MEAN) * SCALE
    axes = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
    (found,) = run_ort(made.to_proto(), {"x_yuv": np.ascontiguousarray(yuv.transpose(axes))})

    np.testing.assert_allclose(found, expected.transpose(axes), atol=3e-5)
    assert [t.name for t in model.graph.inputs] == ["x"]


def test_the_full_range_is_that_of_pillow():
    rgb = pixels((8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(rgb).convert("YCbCr")
    yuv, back = (np.asarray(one, np.float32) for one in (image, image.convert("RGB")))
    model = from_proto(onnx.parser.parse_model(NHWC + " y = Identity(x) }"))
    made = take_yuv(model, Preprocessing(), Camera(kind="yuv444"))
    (found,) = run_ort(made.to_proto(), {"x_yuv": yuv[None]})

    assert np.abs(np.clip(found[0], 0, 255) - back).max() < 1.01  # Pillow gives integers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NCHW.replace("h, w] x", "5, 6] x") + " y = Identity(x) }", "'x' is 5 x 6; U and V of"),
        (NCHW.replace("3, h, w", "1, h, w") + " y = Identity(x) }", "the model has none"),
        (NCHW.replace("float[N, 3, h, w] x", "float[N, 3, h, w] x, float[N, 3, h, w] z")
         + " y = Add(x, z) }", r"the model has 'x' \(float32\), 'z' \(float32\)"),
        (NCHW.replace("float[", "float16[") + " y = Identity(x) }", r"the model has 'x' \(float16"),
    ],
)  # fmt: skip
def test_what_cannot_take_yuv_is_refused(text, said):
    model = from_proto(onnx.parser.parse_model(text))
    with pytest.raises(OptionError, match=said):
        take_yuv(model, Preprocessing(), Camera(kind="nv12"))


def test_names_that_exist_are_left_alone():
    text = NCHW + " x_yuv = Relu(x) y = Neg(x_yuv) }"
    made = take_yuv(from_proto(onnx.parser.parse_model(text)), Preprocessing(),
                    Camera(kind="yuv444"))  # fmt: skip

    assert [t.name for t in made.graph.inputs] == ["x_yuv_"]


@pytest.mark.parametrize("kind", ["nv12", "yuv444"])
def test_strip_writes_the_nodes_and_what_hb_mapper_needs_to_know(kind, tmp_path):
    _, model = quantized(convnet(), "horizon-bernoulli2", ("op:Gemm.quantize=false",))
    settle(model, Settings(mean=MEAN, scale=SCALE, pixel_format="bgr"))
    plain = strip(model, tmp_path / "plain").files
    camera = strip(model, tmp_path / "camera", input_type_rt=kind, yuv_range="video").files
    yuv = pixels((2, 3, 8, 8))
    matrix, offset = PRINTED["video"]
    rgb = np.einsum("ij,njhw->nihw", matrix, yuv - np.reshape(offset, (3, 1, 1)))
    bgr = (rgb[:, ::-1] - np.reshape(MEAN, (3, 1, 1))) * np.reshape(SCALE, (3, 1, 1))
    (found,) = run_ort(onnx.load(camera["model"]), {"input_yuv": yuv})
    (expected,) = run_ort(onnx.load(plain["model"]), {"input": bgr.astype(np.float32)})
    lines = camera["hb_mapper.yaml"].read_text().splitlines()
    entries = {k: json.loads(v) for k, v in (line.strip().split(": ", 1) for line in lines[1:]
                                             if line.startswith("  "))}  # fmt: skip

    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert camera["table"].read_bytes() == plain["table"].read_bytes()
    assert entries["input_name"] == "input_yuv"
    assert (entries["input_type_train"], entries["input_type_rt"]) == ("yuv444", kind)
    assert entries["norm_type"] == "no_preprocess"
    assert not {"mean_value", "scale_value"} & entries.keys()
    assert ("input_space_and_range" in entries) == (kind == "nv12")
    assert "(video range)" in camera["compile.txt"].read_text()


def test_export_puts_the_nodes_in_front_of_integer_weights():
    _, model = quantized(convnet())
    settle(model, Settings(mean=MEAN, scale=SCALE, pixel_format="bgr"))
    given = {"format_name": "onnxruntime", "input_type_rt": "nv12", "yuv_range": "video"}
    yuv = pixels((2, 3, 8, 8))
    matrix, offset = PRINTED["video"]
    rgb = np.einsum("ij,njhw->nihw", matrix, yuv - np.reshape(offset, (3, 1, 1)))
    bgr = (rgb[:, ::-1] - np.reshape(MEAN, (3, 1, 1))) * np.reshape(SCALE, (3, 1, 1))
    (found,) = run_ort(export(model, **given).to_proto(), {"input_yuv": yuv})
    plain = export(model, format_name="onnxruntime").to_proto()
    (expected,) = run_ort(plain, {"input": bgr.astype(np.float32)})

    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_only_horizons_hand_off_takes_it(tmp_path):
    _, model = quantized(convnet(), "sophgo-bm1684x")
    with pytest.raises(OptionError, match="works only with the table 'horizon', not with 'sophgo'"):
        strip(model, tmp_path / "chip", input_type_rt="nv12")

    assert not (tmp_path / "chip").exists()
