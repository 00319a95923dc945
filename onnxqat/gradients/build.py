"""Reverse-mode differentiation of an ONNX graph, into an ONNX graph.

From the loss back, each node turns the gradients of its outputs into those of its inputs (Griewank
and Walther 2008, "Evaluating Derivatives", section 3.2). A value that several nodes read gets the
sum, in the order in which the nodes stand, from the last. Only values on a way from a learned
input to the loss have a gradient, and only float32 ones: what a node computes from integers, from
constants or from inputs that are not learned needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxqat.errors import TrainingError
from onnxqat.gradients.backward import CONTRIB, Array, Backward, Scope, Shape
from onnxqat.gradients.convolution import CONVOLUTIONS, convolution
from onnxqat.gradients.elementwise import ELEMENTWISE
from onnxqat.gradients.losses import LOSSES
from onnxqat.gradients.movement import MOVEMENT
from onnxqat.gradients.normalization import NORMALIZATIONS
from onnxqat.gradients.pooling import POOLING
from onnxqat.gradients.products import PRODUCTS
from onnxqat.gradients.reaching import leading_to, links, other_types
from onnxqat.gradients.reductions import REDUCTIONS
from onnxqat.gradients.selection import SELECTION
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.versions import changed_node, default_opset

__all__ = ["DEFINITIONS", "LOSS", "add_gradients", "drop_unread"]

LOSS = "loss"
MIN_OPSET = 16  # ScatterElements adds from there on
SMALL = 1024  # elements; larger constants are weights, and no definition reads their values

DEFINITIONS: dict[str, Callable[[Backward], dict[int, str]]] = {
    **CONVOLUTIONS,
    **ELEMENTWISE,
    **LOSSES,
    **MOVEMENT,
    **NORMALIZATIONS,
    **POOLING,
    **PRODUCTS,
    **REDUCTIONS,
    **SELECTION,
}


def add_gradients(
    model: onnx.ModelProto, learned: Collection[str], *, kernels: frozenset[str]
) -> onnx.ModelProto:
    """Return a model that computes the loss, and the gradients of some inputs.

    Parameters
    ----------
    model : onnx.ModelProto
        With types and shapes of its values, its nodes in order; its only output ``loss`` is a
        float32 of shape (). A function ``F`` of its own whose calls are on the way has its gradient
        in the function ``F_gradient`` of the same domain: that reads inputs of ``F`` by name,
        ``y``, its output, and ``dy``; and computes ``d<input>``.
    learned : collection of str
        Inputs. One from which no floats lead to the loss gets no output.
    kernels : frozenset of str
        Ops for gradients that the runtime has, see `onnxqat.gradients.kernels`.

    Returns
    -------
    onnx.ModelProto
        Outputs: ``loss``, then ``<input>_grad`` in the order of the inputs.

    Raises
    ------
    TrainingError
        A node on the way has no gradient here.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _raise_opset(made)
    graph = made.graph
    scope = Scope(
        opset=default_opset(made.opset_import) or MIN_OPSET,
        shapes=dict(_shapes(graph)),
        kernels=kernels,
        names=_names(graph),
        known=dict(_constants(graph)),
    )
    active = _active(graph, learned)
    functions = {(f.domain, f.name): f for f in made.functions}
    # by value, the gradients that its readers have given it so far
    given: dict[str, list[str]] = {LOSS: [scope.constant(1.0)]}
    for node in reversed(graph.node):
        dys = [_total(scope, given.pop(name, []), name) for name in node.output]
        wanted = frozenset(i for i, name in enumerate(node.input) if name in active)
        if not any(dys) or not wanted:
            continue
        backward = Backward(node=node, dys=dys, wanted=wanted, scope=scope)
        function = functions.get((node.domain, f"{node.op_type}_gradient"))
        found = _definition(backward)(backward) if function is None else _call(backward, functions)
        for index in sorted(wanted & found.keys()):
            given.setdefault(node.input[index], []).append(found[index])
    inputs = [v.name for v in graph.input if v.name in learned and v.name in given]
    for name in inputs:
        total, output = _total(scope, given[name], name), f"{name}_grad"
        scope.nodes.append(helper.make_node("Identity", [total], [output], name=output))
    _finish(made, scope, inputs)
    return made


def _raise_opset(model: onnx.ModelProto) -> None:
    """Let a graph of an older opset be one of `MIN_OPSET`, where its nodes mean the same."""
    opset = default_opset(model.opset_import) or MIN_OPSET
    if opset >= MIN_OPSET:
        return
    nodes = [n for holder in (model.graph, *model.functions) for n in holder.node]
    for node in nodes:
        if node.op_type == "RoiAlign":  # what it did before is a mode now
            mode = "coordinate_transformation_mode"
            node.attribute.append(helper.make_attribute(mode, "output_half_pixel"))
    others = (n for n in nodes if n.op_type != "RoiAlign")
    if (changed := changed_node(others, opset, MIN_OPSET)) is not None:
        raise TrainingError(
            f"Node '{changed.name}' ({changed.op_type}) of opset {opset} differs from that of "
            f"opset {MIN_OPSET}, which gradients need. Export with opset {MIN_OPSET} or higher."
        )
    for holder in (model, *model.functions):
        for imported in holder.opset_import:
            if imported.domain in ONNX_DOMAINS:
                imported.version = MIN_OPSET


def _shapes(graph: onnx.GraphProto) -> Iterator[tuple[str, Shape]]:
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            yield (
                value.name,
                tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim),
            )
    for tensor in graph.initializer:
        yield tensor.name, tuple(tensor.dims)


def _names(graph: onnx.GraphProto) -> set[str]:
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    return names | {v.name for v in (*graph.input, *graph.output, *graph.initializer)}


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, Array]]:
    """Yield the small constants, which may be axes, bounds or exponents."""
    for tensor in graph.initializer:
        size = 1
        for length in tensor.dims:
            size *= length
        if size <= SMALL:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield node.output[0], numpy_helper.to_array(node.attribute[0].t)


def _active(graph: onnx.GraphProto, learned: Collection[str]) -> set[str]:
    """Return the float32 values on a way from a learned input to the loss."""
    others = other_types(graph) | {""}
    moving = set(learned)
    for node in graph.node:
        if moving.intersection(node.input):
            moving.update(name for name in node.output if name not in others)
    return leading_to({LOSS}, links(graph), moving.__contains__) & moving


def _total(scope: Scope, gradients: list[str], name: str) -> str:
    """Return the sum of the gradients that a value was given, empty where there is none."""
    if len(gradients) < 2:
        return _shaped(scope, gradients[0], name) if gradients else ""
    total = scope.name(f"gradient/{name}/total")
    scope.nodes.append(helper.make_node("Sum", gradients, [total], name=total))
    return _shaped(scope, total, name)


def _shaped(scope: Scope, gradient: str, name: str) -> str:
    """Note that a gradient has the shape of its value."""
    if name in scope.shapes:
        scope.shapes[gradient] = scope.shapes[name]
    return gradient


def _definition(b: Backward) -> Callable[[Backward], dict[int, str]]:
    found = DEFINITIONS.get(b.node.op_type) if b.node.domain in ONNX_DOMAINS else None
    if found is None:
        domain = f" of the domain '{b.node.domain}'" if b.node.domain else ""
        raise TrainingError(
            f"Node '{b.node.name or b.y}' ({b.node.op_type}{domain}) has no gradient here. "
            "Rewrite the model without it."
        )
    return found


def _call(b: Backward, functions: Mapping[tuple[str, str], onnx.FunctionProto]) -> dict[int, str]:
    """Add the nodes of a function that is a gradient."""
    formal = functions[b.node.domain, b.node.op_type].input
    gradient = functions[b.node.domain, f"{b.node.op_type}_gradient"]
    local = dict(zip(formal, b.node.input, strict=False)) | {"y": b.y, "dy": b.dy, "": ""}
    for node in gradient.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            local[node.output[0]] = b.constant(_constant(node))
        elif node.op_type == "ConvGrad":
            _convolve(b, node, local)
        else:
            op_type = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            likes = ["" if name else None for name in node.output]
            outputs = b.ops(op_type, *(local[i] for i in node.input), likes=likes, **attributes)
            local.update(zip(node.output, outputs, strict=True))
    return {i: local[f"d{name}"] for i, name in enumerate(formal) if f"d{name}" in local}


def _constant(node: onnx.NodeProto) -> Array:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    return np.array(value, np.float32 if "float" in attribute.name else np.int64)


def _convolve(b: Backward, node: onnx.NodeProto, local: dict[str, str]) -> None:
    """Add the gradient of a convolution in the place of a ConvGrad."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    outputs = [*node.output, "", ""][:3]
    inputs = [local[name] for name in node.input]
    found = convolution(b, inputs, given.get, [bool(name) for name in outputs])
    local.update({outputs[i]: name for i, name in found.items()})


def _finish(model: onnx.ModelProto, scope: Scope, inputs: Iterable[str]) -> None:
    """Put what was added into the model."""
    graph = model.graph
    shapes = {value.name: value.type for value in graph.input}
    graph.node.extend(scope.nodes)
    graph.initializer.extend(scope.constants)
    graph.value_info.extend(scope.values)
    for name in inputs:
        output = graph.output.add(name=f"{name}_grad")
        output.type.CopyFrom(shapes[name])
    gradients = [f for f in model.functions if f.name.endswith("_gradient")]
    for function in gradients:
        model.functions.remove(function)
    if all(imported.domain != CONTRIB for imported in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def drop_unread(model: onnx.ModelProto) -> None:
    """Take away, in place, the nodes and constants that no output depends on."""
    graph = model.graph
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            read.update(node.input)
            read.update(_captured(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what the subgraphs of a node read."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
