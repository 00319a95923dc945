"""Add the nodes of a loss to a training form."""

from __future__ import annotations

from collections.abc import Set

import onnx
from onnx import TensorProto, helper

from onnxqat.train.losses.graph import attach
from onnxqat.train.losses.kinds import NODES, balanced_mse, check_cross_entropy, cross_entropy
from onnxqat.train.losses.terms import KINDS, Loss, Term
from onnxqat.train.losses.values import Arrays, NoArrays, Values

__all__ = ["add_loss"]


def add_loss(
    form: onnx.ModelProto,
    loss: Loss,
    arrays: Arrays | None = None,
    parameters: Set[str] = frozenset(),
) -> onnx.ModelProto:
    """Return a copy of ``form`` whose only output is the scalar ``loss``.

    Parameters
    ----------
    form : onnx.ModelProto
        The training form, with types and shapes of the values that the loss reads.
    loss : Loss
        The loss to add.
    arrays : Arrays, optional
        The arrays of the data.
    parameters : set of str
        Inputs of the form that are not data.

    Raises
    ------
    TrainingError
        The loss reads a value that does not exist, or cannot be computed from it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(form)
    values = Values(model.graph, arrays or NoArrays(), parameters)
    parts = [
        part for i, term in enumerate(loss.terms) for part in _parts(model, values, term, i, loss)
    ]
    total = parts[0]
    for i, part in enumerate(parts[1:]):
        model.graph.node.append(helper.make_node("Add", [total, part], [f"onnxqat/sum{i}"]))
        total = f"onnxqat/sum{i}"
    model.graph.node.append(helper.make_node("Identity", [total], ["loss"], name="onnxqat/loss"))
    model.graph.value_info.extend(model.graph.output)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    return model


def _parts(
    model: onnx.ModelProto, values: Values, term: Term, number: int, loss: Loss
) -> list[str]:
    """Add the nodes of one term; return the name of a scalar for each output that it reads."""
    if term.is_file:
        parts = [attach(model, values, loss.graphs[term.kind], f"onnxqat/{number}/")]
    else:
        default = values.outputs[:1] if KINDS[term.kind] == "labels" else values.outputs
        read = default if term.output is None else [term.output]
        parts = [_part(model.graph, values, term, name, number, loss) for name in read]
    if term.weight == 1:
        return parts
    weight = helper.make_tensor(f"onnxqat/{number}/weight", TensorProto.FLOAT, [], [term.weight])
    model.graph.initializer.append(weight)
    for part in parts:
        node = helper.make_node("Mul", [part, weight.name], [f"{part}/weighted"])
        model.graph.node.append(node)
    return [f"{part}/weighted" for part in parts]


def _part(
    graph: onnx.GraphProto, values: Values, term: Term, name: str, number: int, loss: Loss
) -> str:
    student = values.student(name)
    result = f"onnxqat/{number}/{term.kind}/{name}"
    if term.kind == "cross-entropy":
        check_cross_entropy(student)
        shape = (student.shape[0], *student.shape[2:])
        if term.array is None:
            labels = values.labels(shape)
        else:
            labels = values.array(term.array, TensorProto.INT64, shape)
        return cross_entropy(graph, student, labels, result, loss)
    if term.array is None:
        target = values.teacher(name)
    else:
        target = values.array(term.array, TensorProto.FLOAT, student.shape)
    if term.balance is not None:
        return balanced_mse(graph, student, target, result, term.balance)
    return NODES[term.kind](graph, student, target, result)
