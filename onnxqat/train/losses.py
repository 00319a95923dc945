"""Losses as ONNX nodes behind the outputs of a training form.

=================  ====================================================================
cross-entropy      mean of -log softmax(output)[label] over all label positions
kl                 mean over positions of KL(softmax(teacher) || softmax(output)), the last
                   axis being the classes (Hinton et al. 2015, temperature 1)
mse                mean squared difference from the teacher's output
=================  ====================================================================

A loss is a sum of these, as in ``cross-entropy+kl``. The teacher's outputs are inputs of the
training graph, so that any model, or a file of recorded outputs, can teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxqat.errors import TrainingError

__all__ = ["LABELS", "LOSSES", "add_loss", "parse_loss", "teacher_input"]

LOSSES = ("cross-entropy", "kl", "mse")
LABELS = "onnxqat/labels"


def teacher_input(output: str) -> str:
    """Return the name of the input that takes the teacher's value of ``output``."""
    return f"onnxqat/teacher/{output}"


def parse_loss(text: str) -> tuple[str, ...]:
    """Read ``a+b``.

    Raises
    ------
    TrainingError
        A part is not one of `LOSSES`.

    Examples
    --------
    >>> parse_loss("cross-entropy+kl")
    ('cross-entropy', 'kl')
    """
    parts = tuple(part.strip() for part in text.split("+"))
    for part in parts:
        if part not in LOSSES:
            raise TrainingError(f"Unknown loss '{part}'. One of {', '.join(LOSSES)}, joined by +.")
    return parts


def add_loss(form: onnx.ModelProto, terms: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of ``form`` whose only output is the scalar ``loss``.

    Cross-entropy and kl read every output with at least two axes; ``labels`` belong to the first.
    """
    model = onnx.ModelProto()
    model.CopyFrom(form)
    outputs = list(model.graph.output)
    parts: list[str] = []
    for term in terms:
        if term == "cross-entropy":
            parts.append(_cross_entropy(model.graph, outputs[0]))
        else:
            parts += [_from_teacher(model.graph, output, term) for output in outputs]
    total = parts[0]
    for i, part in enumerate(parts[1:]):
        model.graph.node.append(helper.make_node("Add", [total, part], [f"onnxqat/sum{i}"]))
        total = f"onnxqat/sum{i}"
    model.graph.node.append(helper.make_node("Identity", [total], ["loss"], name="onnxqat/loss"))
    model.graph.value_info.extend(outputs)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    return model


def _shape(value: onnx.ValueInfoProto) -> list[int | str | None]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]


def _cross_entropy(graph: onnx.GraphProto, output: onnx.ValueInfoProto) -> str:
    shape = _shape(output)
    if len(shape) < 2:
        raise TrainingError(
            f"Output '{output.name}' has shape {shape}; cross-entropy needs (N, classes). "
            "Choose --loss mse."
        )
    labels = helper.make_tensor_value_info(LABELS, TensorProto.INT64, [shape[0], *shape[2:]])
    graph.input.append(labels)
    name = f"onnxqat/cross-entropy/{output.name}"
    graph.node.append(
        helper.make_node(
            "SoftmaxCrossEntropyLoss",
            [output.name, LABELS],
            [name, f"{name}/log_prob"],  # its gradient reads the second output
            name=name,
            reduction="mean",
        )
    )
    return name


def _from_teacher(graph: onnx.GraphProto, output: onnx.ValueInfoProto, term: str) -> str:
    teacher = teacher_input(output.name)
    if all(value.name != teacher for value in graph.input):
        info = helper.make_tensor_value_info(teacher, TensorProto.FLOAT, _shape(output))
        graph.input.append(info)
    name = f"onnxqat/{term}/{output.name}"
    nodes: list[tuple[str, list[str], str, dict[str, Any]]]
    if term == "mse":
        nodes = [
            ("Sub", [output.name, teacher], "difference", {}),
            ("Mul", ["difference", "difference"], "square", {}),
            ("ReduceMean", ["square"], "", {"keepdims": 0}),
        ]
    else:
        nodes = [
            ("LogSoftmax", [output.name], "log_q", {"axis": -1}),
            ("LogSoftmax", [teacher], "log_p", {"axis": -1}),
            ("Softmax", [teacher], "p", {"axis": -1}),
            ("Sub", ["log_p", "log_q"], "ratio", {}),
            ("Mul", ["p", "ratio"], "terms", {}),
            ("ReduceMean", ["terms"], "mean", {"keepdims": 0}),  # over positions and classes
            ("Mul", ["mean", _class_count(graph, output, name)], "", {}),
        ]
    local = {n[2] for n in nodes} - {""}
    for op_type, inputs, result, attributes in nodes:
        inputs = [f"{name}/{i}" if i in local else i for i in inputs]
        target = f"{name}/{result}" if result else name
        graph.node.append(helper.make_node(op_type, inputs, [target], **attributes))
    return name


def _class_count(graph: onnx.GraphProto, output: onnx.ValueInfoProto, name: str) -> str:
    """Add a constant: the length of the class axis, which ReduceMean divided by."""
    shape = _shape(output)
    if len(shape) < 2 or not isinstance(shape[-1], int):
        raise TrainingError(
            f"Output '{output.name}' has shape {shape}; kl needs a last axis of fixed length. "
            "Choose --loss mse."
        )
    count = helper.make_tensor(f"{name}/classes", TensorProto.FLOAT, [], [float(shape[-1])])
    graph.initializer.append(count)
    return count.name
