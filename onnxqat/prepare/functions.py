"""Put the bodies of model-local functions where they are called.

::

    y = my.act<slope = 0.5>(x)     =>     r = Mul(x, c__1)
                                          y = LeakyRelu<alpha = 0.5>(r)

onnx's inliner does the work: values and nodes of the body are numbered, so that names stay unique;
what the call reads and writes keeps its name. Two things are done for it first. An attribute that
the call leaves out takes the function's default, which the inliner forgets; and a function that
imports another opset is inlined where each of its operators is the same in the model's.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.inliner

from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto, to_proto
from onnxqat.preserve import all_nodes
from onnxqat.versions import changed_node, default_opset

__all__ = ["inline_functions"]

Key = tuple[str, str, str]
MAX_DEPTH, MAX_NODES = 128, 10**6


def inline_functions(model: Model) -> Model:
    """Return the model without functions; the same object if it has none.

    Raises
    ------
    ModelError
        A function calls itself or means something else in the model's opset, or a million nodes
        would come out.
    """
    if not model.graph.functions:
        return model
    proto = to_proto(model)
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    _check_calls(proto.graph, functions, model.name)
    for function in proto.functions:
        _match_opset(function, model)
    for node in all_nodes(proto.graph.node, *(f.node for f in proto.functions)):
        if _key(node) in functions:
            _give_defaults(node, functions[_key(node)])
    try:
        inlined = onnx.inliner.inline_local_functions(proto)
    except Exception as error:  # C++ assertions, or a message above 2 GB
        text = str(error).splitlines()[0]
        raise ModelError(
            f"{model.name}: functions cannot be inlined ({text}). Export without them."
        ) from error
    del inlined.functions[:]  # those that nothing calls
    result = from_proto(inlined, name=model.name)
    result.metadata = dict(model.metadata)
    return result


def _key(node: onnx.NodeProto) -> Key:
    return node.domain, node.op_type, node.overload


def _check_calls(
    graph: onnx.GraphProto, functions: dict[Key, onnx.FunctionProto], name: str
) -> None:
    """Refuse functions that call themselves, and calls that multiply beyond all measure."""
    sizes: dict[Key, int] = {}
    open_ = dict(functions)

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        return sum(sizes.get(_key(node), 1) for node in all_nodes(nodes))

    for _ in range(MAX_DEPTH):
        leaves = [key for key, f in open_.items() if not _called(f) & open_.keys()]
        for key in leaves:
            sizes[key] = size(open_[key].node)
        for key in leaves:
            del open_[key]
    if open_:
        domain, function, _ = next(iter(open_))
        raise ModelError(
            f"{name}: function '{domain}.{function}' calls itself, or others more than {MAX_DEPTH} "
            "levels deep. Export without it."
        )
    if size(graph.node) > MAX_NODES:
        raise ModelError(
            f"{name}: inlining its functions would make {size(graph.node)} nodes, more than "
            f"{MAX_NODES}. Export without functions."
        )


def _called(function: onnx.FunctionProto) -> set[Key]:
    return {_key(node) for node in all_nodes(function.node)}


def _match_opset(function: onnx.FunctionProto, model: Model) -> None:
    """Let a function import the model's default opset, where this changes nothing."""
    opset = default_opset(function.opset_import) or model.graph.opset
    changed = None
    if opset != model.graph.opset:
        changed = changed_node(function.node, opset, model.graph.opset)
    if changed is not None:
        raise ModelError(
            f"{model.name}: function '{function.domain}.{function.name}' is of opset {opset}, the "
            f"model of {model.graph.opset}; its {changed.op_type} differs between them. Export "
            "again with one opset."
        )
    for entry in function.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = model.graph.opset


def _give_defaults(node: onnx.NodeProto, function: onnx.FunctionProto) -> None:
    given: Iterable[str] = {attribute.name for attribute in node.attribute}
    node.attribute.extend(a for a in function.attribute_proto if a.name not in given)
