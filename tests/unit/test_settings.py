from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.data import Preprocessing
from onnxqat.errors import DataError, ModelError
from onnxqat.model import from_proto
from onnxqat.settings import (
    KEY,
    Settings,
    adopt,
    class_count,
    input_specs,
    settle,
    stored_settings,
)
from tests.networks import convnet

EVERYTHING = Settings(
    mean=(1.5, 2.0, 3.0),
    scale=(0.1,),
    resize_dims=(10, 12),
    crop=(8, 8),
    keep_aspect_ratio=True,
    pad_value=7.0,
    pixel_format="bgr",
    label="truth",
    input_map={"input": "images"},
    classes={"cat": 0, "dog": 1},
)


@pytest.fixture
def model():
    return from_proto(convnet(), name="model.onnx")


def test_what_is_said_once_is_stored(model):
    assert settle(model, EVERYTHING) == EVERYTHING
    assert stored_settings(model) == EVERYTHING
    assert settle(model, Settings()) == EVERYTHING


def test_saying_nothing_stores_nothing(model):
    settle(model, Settings())

    assert KEY not in model.metadata
    assert stored_settings(model) == Settings()


def test_only_what_was_said_is_stored(model):
    settle(model, Settings(mean=(128.0,)))

    assert json.loads(model.metadata[KEY]) == {"mean": [128.0]}


def test_later_commands_add(model):
    settle(model, Settings(mean=(128.0,)))
    joined = settle(model, Settings(scale=(0.5,)))

    assert joined == Settings(mean=(128.0,), scale=(0.5,))
    assert stored_settings(model) == joined


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (1.0,)}, "--mean is 1.0 now, but was 1.5,2.0,3.0 when"),
        ({"resize_dims": (9, 9)}, "--resize-dims is 9,9 now, but was 10,12 when"),
        ({"keep_aspect_ratio": False}, "--keep-aspect-ratio is False now, but was True"),
        ({"pixel_format": "rgb"}, "--pixel-format is rgb now, but was bgr"),
        ({"label": "y"}, "Leave --label out, or run 'onnxqat insert' again"),
        ({"input_map": {"input": "x"}}, "--input is input=x now, but was input=images"),
    ],
)
def test_contradictions_name_the_option(model, change, message):
    settle(model, EVERYTHING)
    before = dict(model.metadata)
    with pytest.raises(DataError, match=message):
        settle(model, Settings(**change))

    assert model.metadata == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Settings(scale=(0.0,)), "--scale"),
        (Settings(resize_dims=(4, 4), crop=(8, 8)), "--crop"),
        (Settings(mean=(float("nan"),)), "--mean"),
        (Settings(pad_value=1.0), "--pad-value"),
    ],
)
def test_values_out_of_range_are_not_stored(model, given, message):
    with pytest.raises(DataError, match=message):
        settle(model, given)

    assert KEY not in model.metadata


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"mean": "many"}',
        '{"mean": [null]}',
        '{"scale": [0.0]}',
        '{"crop": [1]}',
        '{"sharpness": 3}',
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_model(model, text):
    model.metadata[KEY] = text
    with pytest.raises(ModelError, match=r"model.onnx: metadata 'onnxqat.data' cannot be read"):
        stored_settings(model)


def test_preprocessing_takes_the_layout_of_the_data_at_hand():
    expected = Preprocessing(mean=(1.0,), crop=(3, 4), layout="nhwc")

    assert Settings(mean=(1.0,), crop=(3, 4), label="y").preprocessing("nhwc") == expected
    assert Settings().preprocessing() == Preprocessing()
    assert "layout" not in Settings.__struct_fields__


def test_class_indices_are_stored_and_compared(model):
    settle(model, Settings(classes={"cat": 0, "dog": 4}))
    settle(model, Settings(classes={"cat": 0, "dog": 4}))

    assert stored_settings(model).classes == {"cat": 0, "dog": 4}
    with pytest.raises(DataError, match=r"--classes is dog=1 now, but was dog=4 when"):
        settle(model, Settings(classes={"cat": 0, "dog": 1}))
    with pytest.raises(DataError, match=r"--classes is emu=3 now, but was emu=None when"):
        settle(model, Settings(classes={"cat": 0, "dog": 4, "emu": 3}))


def test_names_in_order_that_earlier_versions_stored_are_read(model):
    model.metadata[KEY] = '{"classes": ["cat", "dog"]}'

    assert stored_settings(model).classes == {"cat": 0, "dog": 1}


def test_a_class_that_the_model_lacks_is_refused(model):
    assert class_count(model) == 5
    with pytest.raises(DataError, match=r"class 'emu' has the index 5, but the model has 5 cl"):
        settle(model, Settings(classes={"cat": 0, "emu": 5}))


def test_names_that_are_not_text_are_refused(model):
    with pytest.raises(DataError, match="not UTF-8"):
        settle(model, Settings(classes={"cat": 0, "d\udcffg": 1}))

    assert KEY not in model.metadata


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Settings(mean=(1.0, 2.0)), "input 'input' has 3 channels, but --mean has 2 values"),
        (Settings(scale=(1.0,) * 4), "input 'input' has 3 channels, but --scale has 4 values"),
        (Settings(pixel_format="gray"), "has 3 channels, but --pixel-format is 'gray'"),
    ],
)
def test_preprocessing_that_the_model_cannot_take_is_refused_at_once(model, given, message):
    with pytest.raises(DataError, match=message):
        settle(model, given)

    assert KEY not in model.metadata


def test_pixel_formats_and_options_need_an_image_with_their_channels(model):
    model.graph.inputs[0].shape = ("N", 8, 8, 1)
    settle(model.copy(), Settings(pixel_format="gray", mean=(1.0,)))
    with pytest.raises(DataError, match="has 1 channels, but --pixel-format is 'bgr'"):
        settle(model, Settings(pixel_format="bgr"))
    model.graph.inputs[0].shape = ("N", 8)
    for given in (Settings(mean=(1.0,)), Settings(crop=(2, 2))):
        with pytest.raises(DataError, match=r"image input \(rank 4\), which the model lacks"):
            settle(model, given)


def test_a_reference_tells_what_it_knows(model):
    other = from_proto(convnet(), name="other.onnx")
    settle(other, Settings(mean=(128.0,)))
    settle(model, Settings(scale=(0.5,)))
    adopt(model, other)

    assert stored_settings(model) == Settings(mean=(128.0,), scale=(0.5,))
    assert stored_settings(other) == Settings(mean=(128.0,))
    settle(other, Settings(scale=(0.25,)))
    with pytest.raises(DataError, match=r"model.onnx: .* scale = 0.5, but other.onnx with 0.25"):
        adopt(model, other)


def test_inputs_as_the_data_want_them(model):
    (spec,) = input_specs(model)

    assert (spec.name, spec.shape, spec.dtype) == ("input", ("N", 3, 8, 8), "float32")


def test_models_that_run_beside_each_other_take_the_batch_of_the_one_that_is_fixed(model):
    other = model.copy()
    other.name = "other.onnx"
    other.graph.inputs[0].shape = (2, 3, 8, 8)
    for pair in ((model, other), (other, model)):
        assert input_specs(*pair)[0].shape == (2, 3, 8, 8)
    model.graph.inputs[0].shape = (4, 3, 8, 8)
    with pytest.raises(ModelError, match=r"needs batches of 4, but in other\.onnx batches of 2"):
        input_specs(model, other)


def lookup(*nodes, kind=TensorProto.INT64):
    """Return a model of two tables, of 10 and 7 rows, that ``nodes`` read by the input ``t``."""
    tables = {"ten": np.zeros((10, 4), np.float32), "seven": np.zeros((7, 4), np.float32)}
    integers = {"shape": np.int64([-1, 2]), "repeats": np.int64([1, 3])}
    graph = helper.make_graph(
        [helper.make_node(op, names, [out], **attrs) for op, names, out, attrs in nodes],
        "g",
        [helper.make_tensor_value_info("t", kind, ["N", 2])],
        [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (tables | integers).items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return from_proto(helper.make_model(graph, ir_version=8, opset_imports=opsets))


TEN = ("Gather", ["ten", "t"], "a", {})
CAST = ("Cast", ["t"], "c", {"to": TensorProto.INT64})
MOVED = ("Reshape", ["c", "shape"], "r", {})


@pytest.mark.parametrize(
    ("nodes", "rows"),
    [
        ([TEN], 10),
        ([TEN, ("Gather", ["seven", "t"], "b", {})], 7),
        ([("Gather", ["ten", "t"], "a", {"axis": 1})], 4),
        ([("Gather", ["ten", "t"], "a", {"axis": -1})], 4),
        ([CAST, MOVED, ("Gather", ["seven", "r"], "a", {})], 7),
        ([("Tile", ["t", "repeats"], "r", {}), ("Gather", ["seven", "r"], "a", {})], 7),
        ([CAST, ("Add", ["c", "c"], "r", {}), ("Gather", ["seven", "r"], "a", {})], None),
        ([CAST, ("Gather", ["t", "c"], "r", {}), ("Cast", ["r"], "a", {"to": 1})], None),
        ([("GatherElements", ["ten", "t"], "a", {})], 10),
        ([("Cast", ["t"], "a", {"to": 1})], None),
    ],
)
def test_inputs_know_the_table_that_they_look_up(nodes, rows):
    (spec,) = input_specs(lookup(*nodes))

    assert spec.rows == rows
