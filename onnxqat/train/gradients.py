"""Gradients of our own, told to onnxruntime as ONNX nodes.

A gradient definition cannot read the attributes of the node it is of, so that each variant of an op
is an op type of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx

try:
    from onnxruntime.capi import _pybind_state

    # None without a training build; onnxqat.gradients is used then
    ort_internals: Any = _pybind_state if hasattr(_pybind_state, "GradientGraphBuilder") else None
except ImportError:
    ort_internals = None

__all__ = [
    "LOWERED_DOMAIN",
    "CustomOp",
    "Node",
    "constant",
    "ort_internals",
    "register_gradient",
    "register_relu_gradient",
    "step",
]

LOWERED_DOMAIN = "onnxqat.lowered"  # of what stands for an op of the model

# op type with its domain, inputs, outputs, attributes
Node = tuple[str, list[str], list[str], list[tuple[str, Any, str, bool]]]


@dataclass(frozen=True, kw_only=True)
class CustomOp:
    """An op whose forward pass and gradient are two model-local functions.

    Attributes
    ----------
    forward : onnx.FunctionProto
        Its inputs that have gradients come first; its only output is ``y``.
    gradient : onnx.FunctionProto
        Reads any of the forward's inputs, ``y`` and the upstream gradient ``dy``; its outputs
        are the gradients of the first inputs, in order. As one node it is free of the rule that
        drops the outputs of each gradient node by the forward's inputs.
    """

    forward: onnx.FunctionProto
    gradient: onnx.FunctionProto

    @property
    def op_type(self) -> str:
        """The op type."""
        return self.forward.name

    def register(self) -> None:
        """Tell onnxruntime the gradient; its first registration holds for the process."""
        if ort_internals is None:
            return
        roles = {name: f"I({i})" for i, name in enumerate(self.forward.input)}
        roles |= {"y": "O(0)", "dy": "GO(0)"}
        node = ort_internals.GradientNodeDefinition()
        node.op_type, node.domain = self.gradient.name, LOWERED_DOMAIN
        node.inputs = [roles[name] for name in self.gradient.input]
        node.outputs = [f"GI({i})" for i in range(len(self.gradient.output))]
        node.attributes = []
        key = f"{LOWERED_DOMAIN}::{self.op_type}"
        ort_internals.register_gradient_definition(key, [node])


def register_relu_gradient() -> None:
    """Replace onnxruntime's ReluGrad, whose CPU kernel is 30 times slower than a step."""
    nodes: list[Node] = [step("O(0)", "slope"), ("Mul", ["GO(0)", "slope"], ["GI(0)"], [])]
    register_gradient("::Relu", nodes)


def register_gradient(key: str, nodes: list[Node]) -> None:
    """Tell onnxruntime the gradient of ``domain::op_type``; the first one holds for the process.

    ``I(k)``, ``O(k)`` and ``GO(k)`` name an input, an output and its upstream gradient, ``GI(k)``
    the gradient to write. Input 0 needs a gradient.
    """
    if ort_internals is not None:
        ort_internals.register_gradient_definition(key, _definitions(nodes))


def step(source: str, target: str) -> Node:
    """Return 1 where the source is positive, 0 elsewhere, by one kernel."""
    steep = [("alpha", 1e30, "float", False), ("beta", 0.0, "float", False)]
    return ("HardSigmoid", [source], [target], steep)


def constant(name: str, value: float) -> Node:
    """Return a float32 of shape ()."""
    return ("Constant", [], [name], [("value", value, "float", True)])


def _definitions(nodes: list[Node]) -> list[Any]:
    """Return onnxruntime's gradient node definitions for ``nodes``."""
    made = []
    for op_type, inputs, outputs, attributes in nodes:
        node = ort_internals.GradientNodeDefinition()
        node.domain, _, node.op_type = op_type.rpartition(".")
        node.inputs, node.outputs = inputs, outputs
        node.attributes = [_attribute(*a) for a in attributes]
        made.append(node)
    return made


def _attribute(name: str, value: Any, dtype: str, is_tensor: bool) -> Any:
    attribute = ort_internals.GradientNodeAttributeDefinition()
    attribute.name, attribute.value_json = name, json.dumps(value)
    attribute.dtype, attribute.is_tensor = dtype, is_tensor
    return attribute
