"""The ops of the training form that are ours: forward and gradient, as ONNX nodes.

Forward: a model-local function whose body is the deployed QuantizeLinear [, Clip],
DequantizeLinear, so that training computes what the chip's file computes, bit for bit.

Backward, with ``y = fake_quantize(x)`` and upstream gradient ``dy`` (straight-through estimator,
Bengio et al. 2013; LSQ, Esser et al. 2020, https://arxiv.org/abs/1902.08153, equation 3)::

    inside = qmin <= round(x / s) + z <= qmax
    dL/dx  = dy * inside
    dL/ds  = sum(dy * ((q - z) - x / s * inside)) = sum(dy * (y - x) + (dy - dL/dx) * x) / s

Up to 8 bits ``inside`` is built from |y - x| <= s / 2, which holds inside the clipping range and
nowhere else: a comparison and a cast to float cost more than the Conv beside them on a CPU. With
more levels the rounding of x and y in float32 blurs that, and the level itself is compared. A
gradient definition cannot read attributes, so that each variant is an op type of its own.

The sums are products of rows, which write one number where Mul writes a tensor for ReduceSum.
Inside the range ``dy - dL/dx`` is zero, so that no large sums cancel.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnxruntime.capi import _pybind_state as ort_internals

from onnxqat.errors import TrainingError

if not hasattr(ort_internals, "GradientGraphBuilder"):
    message = (
        "The onnxruntime that is installed cannot train: a plain onnxruntime package lies over "
        "onnxruntime-training-cpu. Run 'pip uninstall onnxruntime' and 'pip install "
        "--force-reinstall onnxruntime-training-cpu==1.19.2'."
    )
    raise TrainingError(message)

__all__ = ["DOMAIN", "LOWERED_DOMAIN", "CustomOp", "FakeQuantize", "register_relu_gradient"]

DOMAIN = "onnxqat"  # of fake-quantize
LOWERED_DOMAIN = "onnxqat.lowered"  # of what stands for an op of the model

# |y - x| exceeds s / 2 by float32 rounding of x / s and of q * s: each below 2^-16 * s for the
# 256 levels of 8 bits. A value is misjudged as inside only within this slack of the range's end.
HALF_LEVEL = 0.5 + 2**-14

KEEP_NO_AXES = ("keepdims", 0, "int", False)

# op type with its domain, inputs, outputs, attributes
Node = tuple[str, list[str], list[str], list[tuple[str, Any, str, bool]]]


@dataclass(frozen=True, kw_only=True)
class FakeQuantize:
    """One variant of the op.

    Attributes
    ----------
    dtype : str
        numpy name of the integers, ``int8`` or ``uint8``.
    qmin, qmax : int
        Quantized range.
    axis : int or None
        Of a per-axis scale.
    rank : int or None
        Of the tensor; it may be unknown where the scale is not per-axis.
    learns_x, learns_scale : bool
        Which gradients it has.
    """

    dtype: str
    qmin: int
    qmax: int
    axis: int | None
    rank: int | None
    learns_x: bool
    learns_scale: bool

    @property
    def op_type(self) -> str:
        """The op type that stands for this variant."""
        words = ["FakeQuantize", self.dtype, str(self.qmin).replace("-", "m"), str(self.qmax)]
        words += [f"axis{self.axis}"] if self.axis is not None else []
        words += [f"rank{self.rank}"] if self.rank is not None else []
        words += ["x"] if self.learns_x else []
        words += ["s"] if self.learns_scale else []
        return "_".join(words)

    @property
    def inputs(self) -> tuple[str, str, str]:
        """The formal inputs: onnxruntime needs the first to be one with a gradient."""
        return ("x", "s", "z") if self.learns_x or not self.learns_scale else ("s", "x", "z")

    def function(self, opset: int) -> onnx.FunctionProto:
        """Return the forward pass as a model-local function."""
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
        nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes)]
        integers = "q"
        stored = np.iinfo(self.dtype)
        if (self.qmin, self.qmax) != (stored.min, stored.max):
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
            for name, value in (("low", self.qmin), ("high", self.qmax)):
                tensor = helper.make_tensor(name, kind, [], [value])
                nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            nodes.append(helper.make_node("Clip", ["q", "low", "high"], ["c"]))
            integers = "c"
        nodes.append(
            helper.make_node("DequantizeLinear", [integers, "s", "z"], ["y"], **attributes)
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_function(DOMAIN, self.op_type, self.inputs, ["y"], nodes, opsets)

    def register(self) -> None:
        """Tell onnxruntime the gradient; its first registration holds for the process."""
        if self.learns_x or self.learns_scale:
            definition = _definitions(self._gradient())
            ort_internals.register_gradient_definition(f"{DOMAIN}::{self.op_type}", definition)

    def _gradient(self) -> list[Node]:
        x, s, z = (f"I({self.inputs.index(name)})" for name in "xsz")
        nodes: list[Node] = [
            *self._shaped({"x": x, "y": "O(0)", "dy": "GO(0)"}),
            *self._broadcast(s, "scale"),
            ("Sub", ["y", "x"], ["error"], []),
            *(self._inside() if self._has_few_levels else self._inside_by_level(z)),
            ("Mul", ["dy", "inside"], ["dx"], []),
        ]
        if self.learns_x:
            nodes.append(("Shape", [x], ["shape"], []))
            nodes.append(("Reshape", ["dx", "shape"], ["GI(0)"], []))
        if self.learns_scale:
            nodes += self._scale_gradient()
            nodes.append(("Div", ["total", s], [f"GI({self.inputs.index('s')})"], []))
        return nodes

    def _shaped(self, tensors: dict[str, str]) -> list[Node]:
        """Return nodes that make rows of tensors where the elements of a scale are rows.

        The products want them. And a kernel that broadcasts a scale is slow where the last axis has
        length 1, as in the weight of a 1x1 convolution.
        """
        if self.axis:
            return [("Identity", [tensor], [name], []) for name, tensor in tensors.items()]
        by_row = self.axis == 0 or (self.rank or 0) > 1
        rows = [0, 1, -1] if by_row else [1, 1, -1]
        return [
            ("Constant", [], ["rows"], [("value", rows, "int", True)]),
            *[("Reshape", [tensor, "rows"], [name], []) for name, tensor in tensors.items()],
        ]

    @property
    def _has_few_levels(self) -> bool:
        return self.qmax - self.qmin < 2**8

    def _inside(self) -> list[Node]:
        """Return the mask from |y - x| <= s / 2."""
        return [
            ("Abs", ["error"], ["distance"], []),
            _constant("half", HALF_LEVEL),
            ("Mul", ["scale", "half"], ["limit"], []),
            ("Sub", ["limit", "distance"], ["room"], []),
            _step("room", "inside"),
        ]

    def _inside_by_level(self, z: str) -> list[Node]:
        """Return the mask from the level that x rounds to, exact for any number of levels.

        The level is an integer, so that the distance to the first one outside is 1 or more
        inside, 0 or less outside.
        """
        return [
            ("Cast", [z], ["z"], [("to", onnx.TensorProto.FLOAT, "int", False)]),
            *self._broadcast("z", "offset"),
            ("Div", ["x", "scale"], ["position"], []),
            ("Round", ["position"], ["rounded"], []),
            ("Add", ["rounded", "offset"], ["level"], []),
            _constant("below", self.qmin - 1.0),
            _constant("above", self.qmax + 1.0),
            ("Sub", ["level", "below"], ["from_below"], []),
            ("Sub", ["above", "level"], ["from_above"], []),
            ("Min", ["from_below", "from_above"], ["nearest"], []),
            _constant("zero", 0.0),
            _constant("one", 1.0),
            ("Clip", ["nearest", "zero", "one"], ["inside"], []),
        ]

    def _broadcast(self, values: str, name: str) -> list[Node]:
        """Return nodes that align scale or zero_point with x as it is shaped."""
        if self.axis is None or self.rank is None:
            return [("Identity", [values], [name], [])]
        shape = [1] * (self.rank if self.axis else 3)
        shape[self.axis] = -1
        return [
            ("Constant", [], [f"{name}_shape"], [("value", shape, "int", True)]),
            ("Reshape", [values, f"{name}_shape"], [name], []),
        ]

    def _scale_gradient(self) -> list[Node]:
        """Return nodes that compute the ``total`` of each element of the scale, before / s."""
        nodes: list[Node] = [("Sub", ["dy", "dx"], ["outside"], [])]
        pairs = (("dy", "error", "of_error"), ("outside", "x", "of_x"))
        if self.axis:
            axes = [i for i in range(self.rank or 0) if i != self.axis]
            nodes += [("Mul", [a, b], [product], []) for a, b, product in pairs]
            nodes.append(("Constant", [], ["axes"], [("value", axes, "int", True)]))
            nodes.append(("Add", ["of_error", "of_x"], ["terms"], []))
            return [*nodes, ("ReduceSum", ["terms", "axes"], ["total"], [KEEP_NO_AXES])]
        product = "com.microsoft.FusedMatMul"
        across = ("transB", 1, "int", False)
        nodes += [(product, [a, b], [sums], [across]) for a, b, sums in pairs]
        nodes.append(("Add", ["of_error", "of_x"], ["sums"], []))
        if self.axis is None:
            return [*nodes, ("ReduceSum", ["sums"], ["total"], [KEEP_NO_AXES])]
        nodes.append(("Constant", [], ["flat"], [("value", [-1], "int", True)]))
        return [*nodes, ("Reshape", ["sums", "flat"], ["total"], [])]


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
    nodes: list[Node] = [_step("O(0)", "slope"), ("Mul", ["GO(0)", "slope"], ["GI(0)"], [])]
    ort_internals.register_gradient_definition("::Relu", _definitions(nodes))


def _step(source: str, target: str) -> Node:
    """Return 1 where the source is positive, 0 elsewhere, by one kernel."""
    steep = [("alpha", 1e30, "float", False), ("beta", 0.0, "float", False)]
    return ("HardSigmoid", [source], [target], steep)


def _constant(name: str, value: float) -> Node:
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
