"""Reverse-mode differentiation of an ONNX graph, which adds gradients as ONNX nodes.

From the loss back to the inputs, the gradients of each node's outputs are turned into those of its
inputs (Griewank and Walther 2008, "Evaluating Derivatives", section 3.2). If several nodes read a
value, their gradients are summed, starting with the last node. Only float32 values on a path from a
learned input to the loss have a gradient; values computed only from integers, constants or inputs
that are not learned need none.
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
MIN_OPSET = 16  # the first opset in which ScatterElements can add
SMALL = 1024  # elements; larger constants are weights, whose values no definition reads

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
    model: onnx.ModelProto,
    learned: Collection[str],
    *,
    kernels: frozenset[str],
    wide: bool = False,
) -> onnx.ModelProto:
    """Return a model that computes the loss, and the gradients of some inputs.

    Parameters
    ----------
    model : onnx.ModelProto
        A model with sorted nodes, types and shapes of its values, and one output ``loss``, a
        float32 of shape (). If it calls a model-local function ``F`` between a learned input and
        the loss, a function ``F_gradient`` of the same domain defines the gradient of ``F``: it
        reads the inputs of ``F`` by name, the output of ``F`` as ``y`` and its gradient as ``dy``,
        and computes ``d<input>``.
    learned : collection of str
        Inputs whose gradients are wanted. An input with no path of float32 values to the loss gets
        no output.
    kernels : frozenset of str
        Gradient ops of the runtime that are used, see `onnxqat.gradients.kernels`.
    wide : bool
        Whether arithmetic costs little next to passes over memory, as on a GPU.

    Returns
    -------
    onnx.ModelProto
        Outputs: ``loss``, then ``<input>_grad`` in the order of the inputs.

    Raises
    ------
    TrainingError
        A node between a learned input and the loss has no gradient definition.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _raise_opset(made)
    graph = made.graph
    scope = Scope(
        opset=default_opset(made.opset_import) or MIN_OPSET,
        shapes=dict(_shapes(graph)),
        kernels=kernels,
        wide=wide,
        names=_names(graph),
        known=dict(_constants(graph)),
    )
    active = _active(graph, learned)
    functions = {(f.domain, f.name): f for f in made.functions}
    # for each value, the gradients from its readers so far
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
    """Raise the opset of an older graph to `MIN_OPSET` if this does not change its nodes."""
    opset = default_opset(model.opset_import) or MIN_OPSET
    if opset >= MIN_OPSET:
        return
    nodes = [n for holder in (model.graph, *model.functions) for n in holder.node]
    for node in nodes:
        if node.op_type == "RoiAlign":  # its former behaviour is now a mode
            mode = "coordinate_transformation_mode"
            node.attribute.append(helper.make_attribute(mode, "output_half_pixel"))
    others = (n for n in nodes if n.op_type != "RoiAlign")
    if (changed := changed_node(others, opset, MIN_OPSET)) is not None:
        raise TrainingError(
            f"Node '{changed.name}' ({changed.op_type}) differs between opset {opset} and "
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
    """Yield the small constants, such as axes, bounds or exponents."""
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
    """Return the float32 values on the paths from learned inputs to the loss."""
    others = other_types(graph) | {""}
    moving = set(learned)
    for node in graph.node:
        if moving.intersection(node.input):
            moving.update(name for name in node.output if name not in others)
    return leading_to({LOSS}, links(graph), moving.__contains__) & moving


def _total(scope: Scope, gradients: list[str], name: str) -> str:
    """Return the sum of the gradients of a value; empty if there are none."""
    if len(gradients) < 2:
        return _shaped(scope, gradients[0], name) if gradients else ""
    total = scope.name(f"gradient/{name}/total")
    scope.nodes.append(helper.make_node("Sum", gradients, [total], name=total))
    return _shaped(scope, total, name)


def _shaped(scope: Scope, gradient: str, name: str) -> str:
    """Record that a gradient has the shape of its value."""
    if name in scope.shapes:
        scope.shapes[gradient] = scope.shapes[name]
    return gradient


def _definition(b: Backward) -> Callable[[Backward], dict[int, str]]:
    found = DEFINITIONS.get(b.node.op_type) if b.node.domain in ONNX_DOMAINS else None
    if found is None:
        domain = f" of the domain '{b.node.domain}'" if b.node.domain else ""
        raise TrainingError(
            f"onnxqat has no gradient for node '{b.node.name or b.y}' ({b.node.op_type}{domain}). "
            "Rewrite the model without it."
        )
    return found


def _call(b: Backward, functions: Mapping[tuple[str, str], onnx.FunctionProto]) -> dict[int, str]:
    """Add the nodes of a gradient function in place of a call."""
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
    """Add the gradient of a convolution in place of a ConvGrad node."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    outputs = [*node.output, "", ""][:3]
    inputs = [local[name] for name in node.input]
    found = convolution(b, inputs, given.get, [bool(name) for name in outputs])
    local.update({outputs[i]: name for i, name in found.items()})


def _finish(model: onnx.ModelProto, scope: Scope, inputs: Iterable[str]) -> None:
    """Write the added nodes, constants and shapes into the model."""
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
    """Remove, in place, the nodes and constants that no output depends on."""
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
    """Yield the names that the subgraphs of a node read."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
