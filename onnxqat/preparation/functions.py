"""Inline model-local functions where they are called.

::

    y = my.act<slope = 0.5>(x)     =>     r = Mul(x, c__1)
                                          y = LeakyRelu<alpha = 0.5>(r)

onnx's inliner does the work. It appends numbers to the names of the body's values and nodes, so
that names stay unique; the inputs and outputs of the call keep their names. Two preparations come
first: an attribute that the call omits gets the function's default, which the inliner forgets; and
a function that imports another opset is changed to the model's opset if all of its operators are
the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxqat import native
from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.preserve import all_nodes
from onnxqat.validate.calls import called_key
from onnxqat.versions import changed_node, default_opset

__all__ = ["inline_functions"]


def inline_functions(model: Model) -> Model:
    """Return the model without functions; the same object if it has none.

    Raises
    ------
    ModelError
        An operator of a function differs in the model's opset, or onnx cannot inline the function.
    """
    if not model.graph.functions:
        return model
    proto = model.to_proto()
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    for function in proto.functions:
        _match_opset(function, model)
    for node in all_nodes(proto.graph.node, *(f.node for f in proto.functions)):
        if called_key(node) in functions:
            _give_defaults(node, functions[called_key(node)])
    try:
        inlined = native.inline_functions(proto)
    except native.NativeError as error:
        raise ModelError(
            f"{model.name}: functions cannot be inlined ({error}). Export without them."
        ) from error
    del inlined.functions[:]  # the remaining ones, which nothing calls
    result = from_proto(inlined, name=model.name)
    result.metadata = dict(model.metadata)
    return result


def _match_opset(function: onnx.FunctionProto, model: Model) -> None:
    """Make a function import the model's default opset if this changes no operator."""
    opset = default_opset(function.opset_import) or model.graph.opset
    changed = None
    if opset != model.graph.opset:
        changed = changed_node(function.node, opset, model.graph.opset)
    if changed is not None:
        raise ModelError(
            f"{model.name}: function '{function.domain}.{function.name}' has opset {opset}, "
            f"but the model {model.graph.opset}, and its {changed.op_type} differs between them. "
            "Export again with one opset."
        )
    for entry in function.opset_import:
        if entry.domain in ONNX_DOMAINS:
            entry.version = model.graph.opset


def _give_defaults(node: onnx.NodeProto, function: onnx.FunctionProto) -> None:
    given: Iterable[str] = {attribute.name for attribute in node.attribute}
    node.attribute.extend(a for a in function.attribute_proto if a.name not in given)
