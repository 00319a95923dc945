"""Gradients by the builder of onnxruntime's training build, an oracle for our gradients."""

from __future__ import annotations

import json
from typing import Any

import onnx
import onnxruntime
from onnx import AttributeProto, helper

from onnxqat.train.fake_quantize import DOMAIN as FAKE_QUANTIZE

try:
    from onnxruntime.capi import _pybind_state as internals

    HAS_BUILDER = hasattr(internals, "GradientGraphBuilder")
except ImportError:
    HAS_BUILDER = False

FATAL = 4


def built(model: onnx.ModelProto, learned: set[str]) -> onnx.ModelProto:
    """Return the graph with gradients added by onnxruntime's builder.

    A function of the model that has a gradient function is registered with the nodes of that
    gradient, until the process ends.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    functions = {(f.domain, f.name): f for f in plain.functions}
    for (domain, name), forward in functions.items():
        gradient = functions.get((domain, f"{name}_gradient"))
        if gradient is not None:
            if domain == FAKE_QUANTIZE:
                plain.functions.remove(gradient)
            put_learned_first(plain.graph, forward, gradient)
            register(forward, gradient)
    if all(imported.domain != "com.microsoft" for imported in plain.opset_import):
        plain.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = FATAL  # the builder logs all its passes
    data = plain.SerializeToString()
    builder = internals.GradientGraphBuilder(data, {"loss"}, learned, "loss", quiet)
    builder.build()
    return onnx.load_model_from_string(builder.get_model())


def put_learned_first(
    graph: onnx.GraphProto, forward: onnx.FunctionProto, gradient: onnx.FunctionProto
) -> None:
    """Reorder the inputs of a function and of its calls, because the first must have a gradient."""
    names = list(forward.input)
    order = sorted(range(len(names)), key=lambda i: f"d{names[i]}" not in gradient.output)
    calls = [n for n in graph.node if (n.domain, n.op_type) == (forward.domain, forward.name)]
    for holder in (forward, *calls):
        inputs = list(holder.input)
        del holder.input[:]
        holder.input.extend(inputs[i] for i in order)


def register(forward: onnx.FunctionProto, gradient: onnx.FunctionProto) -> None:
    """Register a call of the gradient function, or its nodes if the builder would drop outputs."""
    roles = {name: f"I({i})" for i, name in enumerate(forward.input)}
    roles |= {f"d{name}": f"GI({i})" for i, name in enumerate(forward.input)}
    roles |= {"y": "O(0)", "dy": "GO(0)"}
    nodes = []
    whole = [
        helper.make_node(gradient.name, gradient.input, gradient.output, domain=forward.domain)
    ]
    for given in gradient.node if forward.domain == FAKE_QUANTIZE else whole:
        names = [[roles.get(n, n) for n in tensors] for tensors in (given.input, given.output)]
        if given.op_type == "Constant":
            attributes = [constant(given.attribute[0])]
        else:
            attributes = [attribute(a) for a in given.attribute]
        nodes.append(node(given.op_type, given.domain, *names, attributes))
    internals.register_gradient_definition(f"{forward.domain}::{forward.name}", nodes)


def node(
    op_type: str, domain: str, inputs: list[str], outputs: list[str], attributes: list[Any]
) -> Any:
    made = internals.GradientNodeDefinition()
    made.op_type, made.domain, made.attributes = op_type, domain, attributes
    made.inputs, made.outputs = inputs, outputs
    return made


def constant(given: AttributeProto) -> Any:
    value = helper.get_attribute_value(given)
    if given.name == "value_float":
        return definition("value", value, "float", is_tensor=True)
    return definition("value", list(value), "int", is_tensor=True)


def attribute(given: AttributeProto) -> Any:
    kinds = {AttributeProto.FLOAT: "float", AttributeProto.STRING: "string"}
    value = helper.get_attribute_value(given)
    value = value.decode() if isinstance(value, bytes) else value
    value = list(value) if given.type == AttributeProto.INTS else value
    return definition(given.name, value, kinds.get(given.type, "int"))


def definition(name: str, value: Any, dtype: str, *, is_tensor: bool = False) -> Any:
    made = internals.GradientNodeAttributeDefinition()
    made.name, made.value_json = name, json.dumps(value)
    made.dtype, made.is_tensor = dtype, is_tensor
    return made
