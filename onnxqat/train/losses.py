"""Losses as ONNX nodes behind the outputs of a training form.

=================  ====================================================================
cross-entropy      mean of -log softmax(output)[label] over all label positions
kl                 mean over positions of KL(softmax(teacher) || softmax(output)), the last
                   axis being the classes (Hinton et al. 2015, temperature 1)
mse                mean squared difference from the teacher's output
=================  ====================================================================

Where a model ends in Softmax, the logarithm of its output stands for the logits.
A loss is a sum of these, as in ``cross-entropy+kl``. The teacher's outputs are inputs of the
training graph, so that any model, or a file of recorded outputs, can teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxqat.errors import TrainingError
from onnxqat.train.gradients import DOMAIN

__all__ = ["LABELS", "LOSSES", "add_loss", "parse_loss", "teacher_input"]

LOSSES = ("cross-entropy", "kl", "mse")
LABELS = "onnxqat/labels"
SMALLEST = 1e-4  # probability; a level of 8 bits is 1/255


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
            [_logits(graph, output.name, output.name), LABELS],
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
    symbols = {"student": output.name, "teacher": teacher, "loss": name}
    nodes: list[tuple[str, list[str], str, dict[str, Any]]]
    if term == "mse":
        nodes = [
            ("Sub", ["student", "teacher"], "difference", {}),
            ("Mul", ["difference", "difference"], "square", {}),
            ("ReduceMean", ["square"], "loss", {"keepdims": 0}),
        ]
    else:
        symbols["classes"] = _class_count(graph, output, name)
        symbols["student"] = _logits(graph, output.name, output.name)
        symbols["teacher"] = _logits(graph, output.name, teacher)
        nodes = [
            ("LogSoftmax", ["student"], "log_q", {"axis": -1}),
            ("LogSoftmax", ["teacher"], "log_p", {"axis": -1}),
            ("Softmax", ["teacher"], "p", {"axis": -1}),
            ("Sub", ["log_p", "log_q"], "ratio", {}),
            ("Mul", ["p", "ratio"], "terms", {}),
            ("ReduceMean", ["terms"], "mean", {"keepdims": 0}),  # over positions and classes
            ("Mul", ["mean", "classes"], "loss", {}),
        ]
    for op_type, inputs, result, attributes in nodes:
        tensors = [symbols.get(i, f"{name}/{i}") for i in (*inputs, result)]
        node = helper.make_node(op_type, tensors[:-1], tensors[-1:], **attributes)
        graph.node.append(node)
    return name


def _logits(graph: onnx.GraphProto, output: str, values: str) -> str:
    """Return what a softmax may be taken of: ``values``, or their logarithm.

    A model that ends in Softmax gives probabilities, whose logarithm is as good as its logits:
    softmax(log p) = p. Its lowest level is 0, which is raised to the smallest that still counts.
    """
    producers = {o: n for n in graph.node for o in n.output}
    producer = producers.get(output)
    while producer is not None and producer.domain == DOMAIN:  # fake-quantize
        source = next((i for i in producer.input if i in producers), "")
        producer = producers.get(source)
    if producer is None or producer.op_type != "Softmax":
        return values
    logits = f"onnxqat/log/{values}"
    if logits not in producers:
        floor = helper.make_tensor(f"{logits}/floor", TensorProto.FLOAT, [], [SMALLEST])
        graph.initializer.append(floor)
        graph.node.append(helper.make_node("Clip", [values, floor.name], [f"{logits}/raised"]))
        graph.node.append(helper.make_node("Log", [f"{logits}/raised"], [logits]))
    return logits


def _class_count(graph: onnx.GraphProto, output: onnx.ValueInfoProto, name: str) -> str:
    """Add a constant: the length of the class axis, which ReduceMean divided by."""
    shape = _shape(output)
    if not 2 <= len(shape) <= 3 or not isinstance(shape[-1], int):
        raise TrainingError(
            f"Output '{output.name}' has shape {shape}; kl needs (N, classes) or (N, positions, "
            "classes) with a fixed number of classes. Choose --loss mse."
        )
    count = helper.make_tensor(f"{name}/classes", TensorProto.FLOAT, [], [float(shape[-1])])
    graph.initializer.append(count)
    return count.name
