"""The user's own loss as an ONNX file."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from onnxqat.errors import ModelError, TrainingError
from onnxqat.train.losses import read_loss
from tests.losses import check_loss, loss_and_gradients

RNG = np.random.default_rng(0)
GRID = RNG.normal(size=(3, 5, 4, 4)).astype(np.float32)
OBJECTNESS = RNG.integers(0, 2, (3, 1, 4, 4))
BOXES = (2 * RNG.normal(size=(3, 4, 4, 4))).astype(np.float32)
LOGITS = RNG.normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([0, 4, 1, 2, 3, 1])

# BCE with logits of channel 0, and smooth L1 of the others where there is an object
DETECTION = """
loss (float[N, 5, H, W] grid, float[N, 1, H, W] objectness, float[N, 4, H, W] boxes)
  => (float value)
<int64[2] sizes = {1, 4}, float half = {0.5}, float one = {1}, float five = {5}>
{
  logit, found = Split <axis = 1> (grid, sizes)
  soft = Softplus(logit)
  hit = Mul(logit, objectness)
  terms = Sub(soft, hit)
  bce = ReduceMean <keepdims = 0> (terms)
  difference = Sub(found, boxes)
  d = Abs(difference)
  is_near = Less(d, one)
  square = Mul(d, d)
  bowl = Mul(half, square)
  line = Sub(d, half)
  each = Where(is_near, bowl, line)
  counted = Mul(each, objectness)
  l1 = ReduceSum <keepdims = 0> (counted)
  count = ReduceSum <keepdims = 0> (objectness)
  mean = Div(l1, count)
  weighted = Mul(five, mean)
  value = Add(bce, weighted)
}
"""


def write(path, text, opset=17, ir=8):
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
    model = onnx.parser.parse_model(header + text)
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    onnx.save(model, path)
    return str(path)


@pytest.fixture
def loss(tmp_path):
    return lambda text, **versions: read_loss(write(tmp_path / "loss.onnx", text, **versions))


def detection_loss(grid):
    x, d = grid[:, :1], np.abs(grid[:, 1:] - BOXES)
    bce = (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * OBJECTNESS).mean()
    smooth = np.where(d < 1, d * d / 2, d - 0.5) * OBJECTNESS
    return float(bce + 5 * smooth.sum() / OBJECTNESS.sum())


@pytest.mark.parametrize("form_opset", [13, 17, 18, 21])
def test_a_detection_loss(loss, form_opset):
    check_loss(
        loss(DETECTION, opset=13),
        lambda y: detection_loss(y["grid"]),
        {"grid": GRID},
        arrays={"objectness": OBJECTNESS, "boxes": BOXES.astype(np.float64)},
        opset=form_opset,
    )


def test_a_file_is_one_term_among_others(tmp_path):
    path = write(tmp_path / "my loss.onnx", DETECTION)
    check_loss(
        read_loss(f"0.5*{path} + 2*mse"),
        lambda y: 0.5 * detection_loss(y["grid"]) + 2 * float(np.square(y["grid"] - 1).mean()),
        {"grid": GRID},
        arrays={"objectness": OBJECTNESS, "boxes": BOXES},
        teacher={"grid": np.ones_like(GRID)},
    )


TWO_HEADS = """
loss (float[N, 5] start, float[N, 5] end, int64[N] first, float[N, 5] "teacher/end")
  => (float value)
{
  a = SoftmaxCrossEntropyLoss <reduction = "mean", ignore_index = 4> (start, first)
  d = Sub(end, "teacher/end")
  s = Mul(d, d)
  b = ReduceMax <keepdims = 0> (s)
  value = Add(a, b)
}
"""


def nll(x, labels, ignored=None):
    log_q = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return -float(np.mean([r[k] for r, k in zip(log_q, labels, strict=True) if k != ignored]))


def two_heads():
    """Built by hand, as the parser has no name with a slash."""
    text = TWO_HEADS.replace('"teacher/end"', "taught")
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>{text}')
    for names in (*(n.input for n in model.graph.node),):
        for i, name in enumerate(names):
            names[i] = "teacher/end" if name == "taught" else name
    model.graph.input[3].name = "teacher/end"
    return model


def test_two_outputs_labels_and_the_teacher(tmp_path):
    onnx.save(two_heads(), tmp_path / "two.onnx")
    end = RNG.normal(size=(6, 5)).astype(np.float32)
    check_loss(
        read_loss(str(tmp_path / "two.onnx")),
        lambda y: nll(y["start"], LABELS, 4) + float(np.square(y["end"] - end).max()),
        {"start": LOGITS, "end": 2 * LOGITS},
        arrays={"first": LABELS.astype(np.int32)},
        teacher={"end": end},
    )


def test_names_of_the_form_do_not_collide(loss):
    """The loss calls its own values like the form's: 'h/y', 'loss', 'w'."""
    text = """
    loss (float[6, 5] y) => (float loss)
    { x = Mul(y, y)  w = Exp(x)  h = Sqrt(w)  loss = ReduceMean <keepdims = 0> (h) }
    """
    check_loss(loss(text), lambda y: float(np.exp(y["y"] ** 2 / 2).mean()), {"y": LOGITS})


def test_a_function_of_the_file_is_inlined(tmp_path):
    function = helper.make_function(
        "mine", "Square", ["x"], ["y"], [helper.make_node("Mul", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Square", ["y"], ["s"], domain="mine"),
            helper.make_node("ReduceSum", ["s"], ["value"], keepdims=0),
        ],
        "loss",
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, [])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    onnx.save(model, tmp_path / "f.onnx")
    check_loss(
        read_loss(str(tmp_path / "f.onnx")), lambda y: float((y["y"] ** 2).sum()), {"y": LOGITS}
    )


def test_a_model_input_can_be_read(loss):
    text = """
    loss (float[N, 5] y, float[N, 5] input) => (float value)
    { d = Sub(y, input)  s = Mul(d, d)  value = ReduceMean <keepdims = 0> (s) }
    """
    read = loss(text)
    read.graphs[read.terms[0].kind].graph.inputs[1].name = "x/y"  # the parser has no slash
    value, found = loss_and_gradients(read, {"y": LOGITS})  # y is the input, plus zeros

    assert value == 0
    assert not found["y"].any()


def test_a_weight_is_no_input(loss):
    text = """
    loss (float[N, 5] y, float[N, 5] weight) => (float value)
    { d = Sub(y, weight)  value = ReduceMean <keepdims = 0> (d) }
    """
    read = loss(text)
    read.graphs[read.terms[0].kind].graph.inputs[1].name = "w/y"
    with pytest.raises(TrainingError, match=r"input 'w/y' is neither an output"):
        loss_and_gradients(read, {"y": LOGITS})


REDUCED = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceL2": lambda x: np.sqrt(np.sum(x * x)),
    "ReduceSumSquare": lambda x: np.sum(x * x),
    "ReduceLogSumExp": lambda x: np.log(np.sum(np.exp(x))),
}


@pytest.mark.parametrize("reduce", REDUCED)
def test_what_is_computed_of_single_numbers(loss, reduce):
    text = f"""
    loss (float[N, 5] y) => (float value) <float two = {{2}}>
    {{ q = Mul(y, y)  r = {reduce} <keepdims = 0> (q)  s = Sqrt(r)  t = Softplus(s)  u = Log(t)
       m = ReduceMin <keepdims = 0> (y)  w = Mul(u, two)
       value = Add(w, m) }}
    """
    check_loss(
        loss(text),
        lambda y: float(
            2 * np.log(np.log1p(np.exp(np.sqrt(REDUCED[reduce](y["y"] ** 2))))) + y["y"].min()
        ),
        {"y": LOGITS},
    )


SCALAR = "{ value = ReduceMean <keepdims = 0> (y) }"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"loss (float[N, 5] y, float[N] wightd) => (float value) {SCALAR}",
            r"loss.onnx: input 'wightd' is neither an output .* The nearest: 'weighted'",
        ),
        (
            f"loss (float[N, 5] y, string[N] weighted) => (float value) {SCALAR}",
            "loss.onnx: input 'weighted' has the unsupported type STRING",
        ),
        (
            f"loss (float[N, 5] y, bfloat16[N] weighted) => (float value) {SCALAR}",
            "loss.onnx: input 'weighted' has the unsupported type BFLOAT16",
        ),
        (
            f"loss (double[N, 5] y) => (double value) {SCALAR}",
            "loss.onnx: input 'y' is DOUBLE, but it reads a value of type FLOAT",
        ),
        (
            f"loss (float[N, 7] y) => (float value) {SCALAR}",
            r"loss.onnx: input 'y' has shape \['N', 7\], but it reads a value of shape \[6, 5\]",
        ),
        (
            (
                "loss (float[N, 5] y) => (float value, float[N, 5] b) "
                "{ value = ReduceMean <keepdims = 0> (y)  b = Neg(y) }"
            ),
            "loss.onnx: has 2 outputs, 'value', 'b'. A loss must have one",
        ),
        (
            (
                "loss (float[N, 5] y) => (float[N] value) "
                "{ value = ReduceMean <axes = [1], keepdims = 0> (y) }"
            ),
            r"loss.onnx: its output 'value' is float32 of shape \[6\]. A loss must be one",
        ),
        (
            (
                "loss (float[N, 5] y) => (int64 value) "
                "{ m = ReduceMean <keepdims = 0> (y)  value = Cast <to = 7> (m) }"
            ),
            "loss.onnx: its output 'value' is int64",
        ),
        (
            (
                "loss (float[N, 5] y) => (float value) "
                "{ r = Neg(y)  d = Hardmax(r)  value = ReduceMean <keepdims = 0> (d) }"
            ),
            r"loss.onnx: node 'Hardmax_1' \(Hardmax: onnxqat has no gradient for it\). Compute",
        ),
        (
            (
                "loss (float[N] weighted) => (float value) "
                "{ value = ReduceMean <keepdims = 0> (weighted) }"
            ),
            "loss.onnx: reads no float output of the model",
        ),
        (
            (
                "loss (float[N, 5] y) => (float value) { m = ReduceMax <keepdims = 0> (y) "
                "i = IsNaN(m)  v = If (i) <then_branch = a () => (float t) { t = Neg(m) }, "
                "else_branch = b () => (float e) { e = Exp(m) }>  value = Neg(v) }"
            ),
            r"loss.onnx: node 'If_2' \(If: a loss cannot contain subgraphs\)",
        ),
    ],
)
def test_what_is_refused(loss, text, message):
    with pytest.raises(TrainingError, match=message):
        loss_and_gradients(
            loss(text, opset=17), {"y": LOGITS}, arrays={"weighted": np.zeros(6, np.float32)}
        )


def test_an_opset_above_that_of_the_model_must_mean_the_same(loss):
    text = "loss (float[N, 5] y) => (float value) { value = ReduceMean <keepdims = 0> (y) }"
    mean = loss(text, opset=18)
    check_loss(mean, lambda y: float(y["y"].mean()), {"y": LOGITS}, opset=13)
    with_axes = """
    loss (float[N, 5] y) => (float value) <int64[2] axes = {0, 1}>
    { value = ReduceMean <keepdims = 0> (y, axes) }
    """
    with pytest.raises(
        TrainingError, match=r"has opset 18, but the model 13, and the node .*Reduce"
    ):
        loss_and_gradients(loss(with_axes, opset=18), {"y": LOGITS}, opset=13)


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    for name, message in (("text", "not an ONNX file"), ("missing", "no such file")):
        with pytest.raises(ModelError, match=message):
            read_loss(str(tmp_path / f"{name}.onnx"))
