"""What outputs mean, by how the graph ends."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxqat.model import from_proto
from onnxqat.outputs import Joined, Output, Scores, outputs_of
from onnxqat.preparation import prepare

HEADER = '<ir_version: 8, opset_import: ["" : 17]> '
W = "<float[4, 5] w, float[5] b> "
GRID = "net (float[N, 4, 6, 6] x) => "
ROWS = "net (float[N, 4] x) => "
TOKENS = "net (int64[N, 7] x) => (float[N, 7, 5] y) <float[11, 4] e, float[4, 5] w, float[5] b> "


def outputs(text: str) -> tuple[Output, ...]:
    """Parse a network, whose weights get values, and return what its outputs are."""
    model = onnx.parser.parse_model(HEADER + text)
    for weight in model.graph.value_info:  # without values, the parser takes it for a result
        shape = [d.dim_value for d in weight.type.tensor_type.shape.dim]
        values = np.full(shape, 0.5, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, weight.name))
    del model.graph.value_info[:]
    return outputs_of(prepare(from_proto(model)).graph)


def kinds(text: str) -> dict[str, tuple[str, int] | None]:
    found = outputs(text)
    return {o.name: o.scores and (o.scores.kind, o.scores.axis) for o in found}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ROWS + "(float[N, 5] y) " + W + "{ y = Gemm(x, w, b) }", ("logits", 1)),
        (ROWS + "(float[N, 5] y) " + W + "{ h = MatMul(x, w) y = Add(b, h) }", ("logits", 1)),
        (
            ROWS + "(float[N, 5] y) " + W + "{ h = MatMul(x, w) y = Softmax(h) }",
            ("probabilities", 1),
        ),
        (ROWS + "(float[N, 5] y) " + W + "{ h = MatMul(x, w) y = Sigmoid(h) }", ("independent", 1)),
        # a regression: cut off, squashed, of one value, normalized
        (ROWS + "(float[N, 5] y) " + W + "{ h = MatMul(x, w) y = Relu(h) }", None),
        (ROWS + "(float[N, 5] y) " + W + "{ h = MatMul(x, w) y = Tanh(h) }", None),
        (ROWS + "(float[N, 1] y) <float[4, 1] w> { y = MatMul(x, w) }", None),
        (
            ROWS + "(float[N, 5] y) " + W + "{ h = MatMul(x, w) "
            "n = ReduceL2 <axes = [1], keepdims = 1> (h) y = Div(h, n) }",
            None,
        ),
        # grids and boxes
        (GRID + "(float[N, 9, 6, 6] y) <float[9, 4, 1, 1] w> { y = Conv(x, w) }", None),
        (
            GRID + "(float[N, 9, 36] y) <float[9, 4, 1, 1] w, int64[3] s = {0, 9, -1}> "
            "{ h = Conv(x, w) y = Reshape(h, s) }",
            None,
        ),
        (
            GRID + "(float[N, 36, 9] y) <float[9, 4, 1, 1] w, int64[3] s = {0, 9, -1}> "
            "{ h = Conv(x, w) r = Reshape(h, s) y = Transpose <perm = [0, 2, 1]> (r) }",
            None,
        ),
        (
            GRID + "(float[N, 36, 9] y) <float[9, 4, 1, 1] w, int64[3] s = {0, 9, -1}> "
            "{ h = Conv(x, w) p = Sigmoid(h) r = Reshape(p, s) "
            "y = Transpose <perm = [0, 2, 1]> (r) }",
            ("independent", 2),
        ),
        (
            GRID + "(float[N, 9, 36] y) <float[9, 4, 1, 1] w, int64[3] s = {0, 9, -1}> "
            "{ h = Conv(x, w) r = Reshape(h, s) y = Sigmoid(r) }",
            ("independent", 1),
        ),
        # segmentation, by its Softmax, moved or not
        (
            GRID + "(float[N, 9, 6, 6] y) <float[9, 4, 1, 1] w> "
            "{ h = Conv(x, w) y = Softmax <axis = 1> (h) }",
            ("probabilities", 1),
        ),
        (
            GRID + "(float[N, 6, 6, 9] y) <float[9, 4, 1, 1] w> "
            "{ h = Conv(x, w) p = LogSoftmax <axis = 1> (h) "
            "y = Transpose <perm = [0, 2, 3, 1]> (p) }",
            ("log-probabilities", 3),
        ),
        (
            GRID + "(float[N, 9, 36] y) <float[9, 4, 1, 1] w, int64[3] s = {0, 9, -1}> "
            "{ h = Conv(x, w) p = Softmax <axis = 1> (h) y = Reshape(p, s) }",
            ("probabilities", 1),
        ),
        (
            GRID + "(float[N, 9] y) <float[9, 4, 6, 6] w> "
            "{ h = Conv(x, w) p = Softmax <axis = 1> (h) y = Flatten(p) }",
            ("probabilities", 1),
        ),
        # tokens
        (
            TOKENS + "{ t = Gather(e, x) h = MatMul(t, w) y = Add(h, b) }",
            ("logits", 2),
        ),
        (
            "net (float[N, 7, 4] x) => (float[N, 7, 5] y) " + W + "{ h = MatMul(x, w) "
            "y = Add(h, b) }",
            None,
        ),
    ],
)
def test_one_output(text, expected):
    assert kinds(text) == {"y": expected}


def test_what_reads_an_output_says_which_axis_its_classes_are():
    found = kinds(
        GRID + "(float[N, 9, 6, 6] y, int64[N, 1, 6, 6] best) <float[9, 4, 1, 1] w> "
        "{ y = Conv(x, w) best = ArgMax <axis = 1> (y) }"
    )

    assert found["y"] == ("logits", 1)


def test_beside_probabilities_a_bare_output_is_a_regression():
    text = ROWS + "(float[N, 5] y, float[N, 5] z) <float[4, 5] w, float[4, 5] v> "

    assert kinds(text + "{ z = MatMul(x, v) h = MatMul(x, w) y = Softmax(h) }") == {
        "y": ("probabilities", 1),
        "z": None,
    }
    assert kinds(text + "{ z = MatMul(x, v) y = MatMul(x, w) }") == {
        "y": ("logits", 1),
        "z": ("logits", 1),
    }
    # logits that are given out beside their own probabilities stay logits
    assert kinds(text + "{ z = MatMul(x, v) y = Softmax(z) }")["z"] == ("logits", 1)


def test_where_answers_start_and_end():
    text = (
        "net (int64[N, 7] x) => (float[N, 7] start, float[N, 7] end) "
        "<float[11, 4] e, float[4, 2] w, int64[1] last = {-1}> { t = Gather(e, x) "
        "h = MatMul(t, w) a, b = Split <axis = -1> (h) start = Squeeze(a, last) "
        "end = Squeeze(b, last) }"
    )

    assert kinds(text) == {"start": ("logits", 1), "end": ("logits", 1)}


def test_of_an_index_the_tensor_is_known_that_it_follows_from():
    (best,) = outputs(
        GRID + "(int64[N, 6, 6] best) <float[9, 4, 1, 1] w> "
        "{ y = Conv(x, w) i = ArgMax <axis = 1, keepdims = 0> (y) best = Identity(i) }"
    )

    assert (best.learned, best.source) == (False, "y")
    assert best.source_scores == Scores(kind="logits", axis=1)


BESIDE = "c = Concat <axis = 1> (a, p)"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        # as YOLOv8: boxes and scores along axis 1
        ("y = Concat <axis = 1> (a, p) ", {Joined(axis=1, sizes=(4, 5))}),
        (
            f"{BESIDE} y = Transpose <perm = [0, 2, 1]> (c) ",
            {Joined(axis=2, sizes=(4, 5))},
        ),
        # as YOLOv5: of several maps, side by side along the positions
        (
            f"{BESIDE} t = Transpose <perm = [0, 2, 1]> (c) y = Concat <axis = 1> (t, t) ",
            {Joined(axis=2, sizes=(4, 5)), Joined(axis=1, sizes=(36, 36))},
        ),
        # one of several along the axis says nothing of the others
        (f"{BESIDE} y = Concat <axis = 1> (c, a) ", {Joined(axis=1, sizes=(9, 4))}),
        ("y = Concat <axis = 0> (a, a) ", set()),
        ("y = Add(a, a) ", set()),
    ],
)
def test_parts_that_lie_side_by_side(nodes, expected):
    (output,) = outputs(
        "net (float[N, 4, 36] x, float[N, 5, 36] z) => (float[N, K, M] y) "
        "{ a = Tanh(x) p = Sigmoid(z) " + nodes + "}"
    )

    assert set(output.joined) == expected
    assert output.scores is None
