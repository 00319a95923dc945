"""The kinds of loss as ONNX nodes; ``s`` is the student's value and ``t`` the target's.

=================  ====================================================================
cross-entropy      mean of -log softmax(s)[label] over all label positions, with the classes along
                   axis 1
kl                 mean over positions of KL(softmax(t) || softmax(s)) over the axis of the classes
                   (Hinton et al. 2015, temperature 1)
mse, l1            mean of (s - t)^2; mean of |s - t|
smooth-l1          mean of d^2 / 2 where d = |s - t| < 1, and of d - 1/2 elsewhere (Girshick 2015,
                   equation 3)
bce                mean of -t log sigmoid(s) - (1 - t) log sigmoid(-s)
=================  ====================================================================

The axis of the classes is that of a Softmax, LogSoftmax or ArgMax at the output, see
`onnxqat.outputs`; without one, it is the last axis. If a model ends in Softmax, the logarithm of
its output is used as logits. If it ends in Sigmoid, each value is the probability of one class
alone, and ``kl`` is the mean over positions of the sum over classes of
KL(Bernoulli(t) || Bernoulli(s)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import TrainingError
from onnxqat.outputs import OutputTracer, Scores
from onnxqat.train.fake_quantize import DOMAIN
from onnxqat.train.losses.terms import Balance, Loss
from onnxqat.train.losses.values import Value

__all__ = ["NODES", "balanced_mse", "check_cross_entropy", "cross_entropy"]

SMALLEST = 1e-4  # the smallest probability; a level of 8 bits is 1/255
# Both sides of a Sigmoid's probabilities are mixed with this: half a level of 8 bits, below which
# they are rounded to 0. This keeps the logarithms finite, and values rounded to 0 still learn.
DOUBT = 1 / 512

Nodes = list[tuple[str, list[str], str, dict[str, Any]]]

MEAN = {"keepdims": 0}  # the mean over all axes
MSE: Nodes = [
    ("Sub", ["student", "target"], "difference", {}),
    ("Mul", ["difference", "difference"], "square", {}),
    ("ReduceMean", ["square"], "loss", MEAN),
]
BALANCED: Nodes = [
    *MSE[:2],
    ("Mul", ["square", "weights"], "weighted", {}),
    ("ReduceMean", ["weighted"], "loss", MEAN),
]
L1: Nodes = [
    ("Sub", ["student", "target"], "difference", {}),
    ("Abs", ["difference"], "distance", {}),
    ("ReduceMean", ["distance"], "loss", MEAN),
]
# with m = min(d, 1): m^2 / 2 + d - m
SMOOTH_L1: Nodes = [
    *L1[:2],
    ("Min", ["distance", "one"], "near", {}),
    ("Mul", ["near", "near"], "square", {}),
    ("Mul", ["square", "half"], "bowl", {}),
    ("Sub", ["distance", "near"], "far", {}),
    ("Add", ["bowl", "far"], "terms", {}),
    ("ReduceMean", ["terms"], "loss", MEAN),
]
# max(s, 0) - s t + log(1 + exp(-|s|)), with max(s, 0) = (s + |s|) / 2: no exponent is above 0, and
# the gradient is also correct at s = 0, a frequent quantized value
BCE: Nodes = [
    ("Abs", ["student"], "size", {}),
    ("Add", ["student", "size"], "twice", {}),
    ("Mul", ["twice", "half"], "positive", {}),
    ("Mul", ["student", "target"], "product", {}),
    ("Sub", ["positive", "product"], "linear", {}),
    ("Neg", ["size"], "exponent", {}),
    ("Exp", ["exponent"], "power", {}),
    ("Add", ["power", "one"], "sum", {}),
    ("Log", ["sum"], "curved", {}),
    ("Add", ["linear", "curved"], "terms", {}),
    ("ReduceMean", ["terms"], "loss", MEAN),
]
BERNOULLI_KL: Nodes = [
    ("Mul", ["student", "sure"], "q_sure", {}),
    ("Add", ["q_sure", "doubt"], "q", {}),
    ("Sub", ["one", "q"], "not_q", {}),
    ("Mul", ["target", "sure"], "p_sure", {}),
    ("Add", ["p_sure", "doubt"], "p", {}),
    ("Sub", ["one", "p"], "not_p", {}),
    ("Div", ["p", "q"], "ratio", {}),
    ("Log", ["ratio"], "log_ratio", {}),
    ("Mul", ["p", "log_ratio"], "found", {}),
    ("Div", ["not_p", "not_q"], "not_ratio", {}),
    ("Log", ["not_ratio"], "log_not_ratio", {}),
    ("Mul", ["not_p", "log_not_ratio"], "missed", {}),
    ("Add", ["found", "missed"], "terms", {}),
    ("ReduceMean", ["terms"], "mean", MEAN),
    ("Mul", ["mean", "classes"], "loss", {}),
]


def _kl_nodes(axis: int) -> Nodes:
    return [
        ("LogSoftmax", ["student"], "log_q", {"axis": axis}),
        ("LogSoftmax", ["target"], "log_p", {"axis": axis}),
        ("Softmax", ["target"], "p", {"axis": axis}),
        ("Sub", ["log_p", "log_q"], "ratio", {}),
        ("Mul", ["p", "ratio"], "terms", {}),
        ("ReduceMean", ["terms"], "mean", MEAN),  # over positions and classes
        ("Mul", ["mean", "classes"], "loss", {}),
    ]


# (1 - e) * nll + e * mean of -log softmax over the classes of all positions that are not ignored
SMOOTHING: Nodes = [
    ("LogSoftmax", ["logits"], "log_q", {"axis": 1}),
    ("ReduceMean", ["log_q"], "even", MEAN),
    ("Mul", ["even", "minus_share"], "smooth", {}),
    ("Mul", ["nll", "kept"], "sharp", {}),
    ("Add", ["sharp", "smooth"], "loss", {}),
]
# the sum over these positions is divided here, because runtimes' means differ if there are none
COUNTED: Nodes = [
    ("Equal", ["labels", "ignored"], "is_ignored", {}),
    ("Not", ["is_ignored"], "counts", {}),
    ("Cast", ["counts"], "mask", {"to": TensorProto.FLOAT}),
    ("ReduceSum", ["mask"], "count", {"keepdims": 0}),
    ("Max", ["count", "one"], "at_least_one", {}),
    ("Div", ["total", "at_least_one"], "nll", {}),
]
SMOOTHING_WITHOUT_IGNORED: Nodes = [
    ("ReduceMean", ["mask"], "fraction", MEAN),
    ("Max", ["fraction", "tiny"], "divisor", {}),  # if all positions are ignored
    ("Unsqueeze", ["mask", "class_axis"], "masks", {}),
    ("LogSoftmax", ["logits"], "log_q", {"axis": 1}),
    ("Mul", ["log_q", "masks"], "masked", {}),
    ("ReduceMean", ["masked"], "mean", MEAN),
    ("Div", ["mean", "divisor"], "even", {}),
    *SMOOTHING[2:],
]


def _emit(graph: onnx.GraphProto, name: str, nodes: Nodes, symbols: Mapping[str, str]) -> str:
    """Add nodes, with ``loss`` replaced by ``name`` and other names by ``symbols``."""
    names = {"loss": name, **symbols}
    for op_type, inputs, result, attributes in nodes:
        tensors = [names.get(i, f"{name}/{i}") for i in (*inputs, result)]
        graph.node.append(helper.make_node(op_type, tensors[:-1], tensors[-1:], **attributes))
    return name


def _number(graph: onnx.GraphProto, name: str, value: float) -> str:
    graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    return name


def _pointwise(nodes: Nodes) -> Callable[[onnx.GraphProto, Value, Value, str], str]:
    def make(graph: onnx.GraphProto, student: Value, target: Value, name: str) -> str:
        read = {i for _, inputs, _, _ in nodes for i in inputs}
        numbers = {"one": 1.0, "half": 0.5}
        made = {k: _number(graph, f"{name}/{k}", v) for k, v in numbers.items() if k in read}
        return _emit(graph, name, nodes, {"student": student.name, "target": target.name, **made})

    return make


def _kl(graph: onnx.GraphProto, student: Value, target: Value, name: str) -> str:
    shape, scores = student.shape, _scores(graph, student)
    length = shape[scores.axis] if scores and len(shape) > scores.axis else None
    if scores is None or not isinstance(length, int):
        raise TrainingError(
            f"Output '{student.name}' has shape {list(shape)}; kl needs (N, classes) or (N, "
            "positions, classes) with a fixed number of classes, or a Softmax, Sigmoid or ArgMax "
            f"that shows the axis of the classes. Choose --loss mse:{student.name}."
        )
    classes = _number(graph, f"{name}/classes", float(length))  # undoes the division by ReduceMean
    if scores.kind == "independent":
        numbers = {"one": 1.0, "sure": 1 - 2 * DOUBT, "doubt": DOUBT}
        made = {k: _number(graph, f"{name}/{k}", v) for k, v in numbers.items()}
        values = {"student": student.name, "target": target.name, "classes": classes}
        return _emit(graph, name, BERNOULLI_KL, values | made)
    symbols = {
        "classes": classes,
        "student": _logits(graph, student.name, student.name),
        "target": _logits(graph, student.name, target.name),
    }
    return _emit(graph, name, _kl_nodes(scores.axis), symbols)


def _scores(graph: onnx.GraphProto, student: Value) -> Scores | None:
    """Return the class scores of an output, by default along the last axis."""
    rank, tracer = len(student.shape), OutputTracer(graph, rounding=DOMAIN)
    found = tracer.explicit(student.name)
    if found is not None or rank < 2:
        return found
    axis = tracer.readers_axis(student.name)
    if axis is None and rank <= 3:
        axis = rank - 1
    return None if axis is None else Scores(kind="logits", axis=axis)


def balanced_mse(
    graph: onnx.GraphProto, student: Value, target: Value, name: str, balance: Balance
) -> str:
    """Add the nodes of mse with a weight for each part, and return the name of the result."""
    weights = np.repeat(np.array(balance.weights, np.float32), balance.sizes)
    shape = [1] * len(student.shape)
    shape[balance.axis] = -1
    values = numpy_helper.from_array(weights.reshape(shape), f"{name}/weights")
    graph.initializer.append(values)
    symbols = {"student": student.name, "target": target.name, "weights": values.name}
    return _emit(graph, name, BALANCED, symbols)


# The kinds that compare two values of the same shape: each adds its nodes, and returns the result.
NODES: dict[str, Callable[[onnx.GraphProto, Value, Value, str], str]] = {
    "kl": _kl,
    "mse": _pointwise(MSE),
    "l1": _pointwise(L1),
    "smooth-l1": _pointwise(SMOOTH_L1),
    "bce": _pointwise(BCE),
}


def check_cross_entropy(output: Value) -> None:
    """Refuse an output without a class axis."""
    if len(output.shape) < 2:
        raise TrainingError(
            f"Output '{output.name}' has shape {list(output.shape)}; cross-entropy needs (N, "
            "classes). Choose --loss mse."
        )


def cross_entropy(
    graph: onnx.GraphProto, output: Value, labels: Value, name: str, loss: Loss
) -> str:
    """Add the nodes of cross-entropy, and return the name of the result."""
    logits, share = _logits(graph, output.name, output.name), loss.label_smoothing
    nll = f"{name}/nll" if share else name
    ignored = loss.ignore_index
    given: dict[str, Any] = {"reduction": "mean"}
    if ignored is not None:
        given = {"reduction": "sum", "ignore_index": ignored}
    total = nll if ignored is None else f"{name}/total"
    inputs, outputs = [logits, labels.name], [total, f"{name}/log_prob"]  # read by the gradient
    graph.node.append(
        helper.make_node("SoftmaxCrossEntropyLoss", inputs, outputs, name=name, **given)
    )
    symbols = {"logits": logits, "labels": labels.name, "nll": nll}
    if ignored is not None:
        integer = helper.make_tensor(f"{name}/ignored", TensorProto.INT64, [], [ignored])
        graph.initializer.append(integer)
        _number(graph, f"{name}/one", 1.0)
        _emit(graph, name, COUNTED, symbols)
    if not share:
        return name
    symbols["minus_share"] = _number(graph, f"{name}/minus_share", -share)
    symbols["kept"] = _number(graph, f"{name}/kept", 1.0 - share)
    if ignored is None:
        return _emit(graph, name, SMOOTHING, symbols)
    _number(graph, f"{name}/tiny", 1e-30)
    axis = helper.make_tensor(f"{name}/class_axis", TensorProto.INT64, [1], [1])
    graph.initializer.append(axis)
    return _emit(graph, name, SMOOTHING_WITHOUT_IGNORED, symbols)


def _logits(graph: onnx.GraphProto, output: str, values: str) -> str:
    """Return logits: ``values``, or the logarithm of ``values`` if they are probabilities.

    The logarithm of a Softmax's output can replace its logits, because softmax(log p) = p. A
    probability of 0 is raised to `SMALLEST`.
    """
    scores = OutputTracer(graph, rounding=DOMAIN).explicit(output)
    if scores is None or scores.kind != "probabilities":
        return values
    logits = f"onnxqat/log/{values}"
    if all(logits not in node.output for node in graph.node):
        floor = helper.make_tensor(f"{logits}/floor", TensorProto.FLOAT, [], [SMALLEST])
        graph.initializer.append(floor)
        graph.node.append(helper.make_node("Clip", [values, floor.name], [f"{logits}/raised"]))
        graph.node.append(helper.make_node("Log", [f"{logits}/raised"], [logits]))
    return logits
