"""The ops of the training form that are ours: forward and gradient, as ONNX nodes.

Forward: a model-local function whose body is the deployed QuantizeLinear [, Clip],
DequantizeLinear, so that training computes what the chip's file computes, bit for bit.

Backward, with ``y = fake_quantize(x)``, upstream gradient ``dy`` and the straight-through estimator
(Bengio et al. 2013)::

    inside = qmin <= round(x / s) + z <= qmax
    passed = dy * inside

==============  ===================================================================================
method
==============  ===================================================================================
lsq             ``dL/dx = passed``; ``dL/ds = sum(dy * y - passed * x) / s`` (Esser et al. 2020,
                https://arxiv.org/abs/1902.08153, equation 3). Where scales are powers of two, this
                is TQT (Jain et al. 2020, https://arxiv.org/abs/1903.08066)
lsq+            and ``dL/dz = -s * sum(dy - passed)``, where the spec is asymmetric (Bhalgat et al.
                2020, https://arxiv.org/abs/2004.09576, section 3, with beta = -z * s; z is rounded,
                since the chip's is an integer)
pact            ``dL/dx = passed``; only what is clipped moves the clipping range:
                ``dL/ds = sum((dy - passed) * y) / s`` (Choi et al. 2018,
                https://arxiv.org/abs/1805.06085, section 3, here at both ends)
dsq             the scale as of pact, and ``dL/dx = passed * slope``, the slope of a soft staircase
                (Gong et al. 2019, https://arxiv.org/abs/1908.05033, section 3; alpha is not
                learned): small on a level, large between two, 1 in the mean
moving-average  ``dL/dx = passed``; scale and zero_point follow what is observed, see
                `onnxqat.train.ranges`
ste             ``dL/dx = passed``; scale and zero_point stay
==============  ===================================================================================

Up to 8 bits ``inside`` is built from |y - x| <= s / 2, which holds inside the clipping range and
nowhere else: a comparison and a cast to float cost more than the Conv beside them on a CPU. With
more levels the rounding of x and y in float32 blurs that, and the level itself is compared. A
gradient definition cannot read attributes, so that each variant is an op type of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxruntime.capi import _pybind_state as ort_internals

from onnxqat.errors import TrainingError
from onnxqat.qparams import Method

if not hasattr(ort_internals, "GradientGraphBuilder"):
    message = (
        "The onnxruntime that is installed cannot train: a plain onnxruntime package lies over "
        "onnxruntime-training-cpu. Run 'pip uninstall onnxruntime' and 'pip install "
        "--force-reinstall onnxruntime-training-cpu==1.19.2'."
    )
    raise TrainingError(message)

__all__ = [
    "DOMAIN",
    "LEARNING",
    "LOWERED_DOMAIN",
    "CustomOp",
    "FakeQuantize",
    "register_relu_gradient",
]

DOMAIN = "onnxqat"  # of fake-quantize
LOWERED_DOMAIN = "onnxqat.lowered"  # of what stands for an op of the model

# |y - x| exceeds s / 2 by float32 rounding of x / s and of q * s: each below 2^-16 * s for the
# 256 levels of 8 bits. A value is misjudged as inside only within this slack of the range's end.
HALF_LEVEL = 0.5 + 2**-14

LEARNING: tuple[Method, ...] = ("lsq", "lsq+", "pact", "dsq")  # methods that learn the scale
DSQ_ALPHA = 0.4  # how much of a step's height the soft staircase lacks; as MQBench fixes it

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
    axis, rank : int or None
        Of a per-axis scale, and of the tensor it belongs to.
    learns_x : bool
        Whether it passes a gradient to x.
    method : Method
        How scale and zero_point move.
    moves_zero_point : bool
        The zero_point comes as a float32 that is rounded here, and not as the integer.
    """

    dtype: str
    qmin: int
    qmax: int
    axis: int | None
    rank: int | None
    learns_x: bool
    method: Method
    moves_zero_point: bool = False

    @property
    def learns_scale(self) -> bool:
        """Whether the scale has a gradient."""
        return self.method in LEARNING

    @property
    def learns_zero_point(self) -> bool:
        """Whether the zero_point has a gradient."""
        return self.method == "lsq+" and self.moves_zero_point

    @property
    def op_type(self) -> str:
        """The op type that stands for this variant."""
        words = ["FakeQuantize", self.dtype, str(self.qmin).replace("-", "m"), str(self.qmax)]
        words += [f"axis{self.axis}of{self.rank}"] if self.axis is not None else []
        words += ["x"] if self.learns_x else []
        words += [self.method.replace("+", "plus")] if self.learns_scale else []
        words += ["z"] if self.moves_zero_point else []
        return "_".join(words)

    @property
    def inputs(self) -> tuple[str, str, str]:
        """The formal inputs: onnxruntime needs the first to be one with a gradient."""
        return ("x", "s", "z") if self.learns_x or not self.learns_scale else ("s", "x", "z")

    def function(self, opset: int) -> onnx.FunctionProto:
        """Return the forward pass as a model-local function."""
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        nodes, z = [], "z"
        if self.moves_zero_point:
            nodes += self._integer_zero_point(kind)
            z = "integer_z"
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", z], ["q"], **attributes))
        integers, stored = "q", np.iinfo(self.dtype)
        if (self.qmin, self.qmax) != (stored.min, stored.max):
            nodes += self._limits("", kind)
            nodes.append(helper.make_node("Clip", ["q", "low", "high"], ["c"]))
            integers = "c"
        nodes.append(helper.make_node("DequantizeLinear", [integers, "s", z], ["y"], **attributes))
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_function(DOMAIN, self.op_type, self.inputs, ["y"], nodes, opsets)

    def _limits(self, suffix: str, kind: int) -> list[onnx.NodeProto]:
        """Return constants ``low`` and ``high``, the ends of the quantized range."""
        made = []
        for name, value in ((f"low{suffix}", self.qmin), (f"high{suffix}", self.qmax)):
            tensor = helper.make_tensor(name, kind, [], [value])
            made.append(helper.make_node("Constant", [], [name], value=tensor))
        return made

    def _integer_zero_point(self, kind: int) -> list[onnx.NodeProto]:
        """Return nodes that round a float32 zero_point to an integer within the range."""
        return [
            *self._limits("_z", TensorProto.FLOAT),
            helper.make_node("Round", ["z"], ["whole_z"]),
            helper.make_node("Clip", ["whole_z", "low_z", "high_z"], ["inner_z"]),
            helper.make_node("Cast", ["inner_z"], ["integer_z"], to=kind),
        ]

    def register(self) -> None:
        """Tell onnxruntime the gradient; its first registration holds for the process."""
        if self.learns_x or self.learns_scale:
            definition = _definitions(self._gradient())
            ort_internals.register_gradient_definition(f"{DOMAIN}::{self.op_type}", definition)

    def _gradient(self) -> list[Node]:
        x, s, z = (f"I({self.inputs.index(name)})" for name in "xsz")
        nodes: list[Node] = [
            *self._broadcast(s, "scale"),
            _constant("zero", 0.0),
            _constant("one", 1.0),
            *(self._inside(x) if self._has_few_levels else self._inside_by_level(x, z)),
            ("Mul", ["GO(0)", "inside"], ["passed"], []),
        ]
        if self.learns_x:
            nodes += self._slope(x) if self.method == "dsq" else []
            passed = "soft" if self.method == "dsq" else "passed"
            nodes.append(("Identity", [passed], ["GI(0)"], []))
        if self.method != "lsq":
            nodes.append(("Sub", ["GO(0)", "passed"], ["stopped"], []))
        if self.learns_scale:
            nodes += self._scale_gradient(x, s, f"GI({self.inputs.index('s')})")
        if self.learns_zero_point:
            nodes += [
                *self._sum("stopped", "shift"),
                ("Mul", ["shift", s], ["pull"], []),
                ("Neg", ["pull"], ["GI(2)"], []),
            ]
        return nodes

    @property
    def _has_few_levels(self) -> bool:
        return self.qmax - self.qmin < 2**8

    def _inside(self, x: str) -> list[Node]:
        """Return the mask from |y - x| <= s / 2."""
        return [
            ("Sub", ["O(0)", x], ["error"], []),
            ("Abs", ["error"], ["distance"], []),
            _constant("half", HALF_LEVEL),
            ("Mul", ["scale", "half"], ["limit"], []),
            ("Sub", ["limit", "distance"], ["room"], []),
            _constant("big", 1e30),
            ("Mul", ["room", "big"], ["steep"], []),
            ("Clip", ["steep", "zero", "one"], ["inside"], []),
        ]

    def _inside_by_level(self, x: str, z: str) -> list[Node]:
        """Return the mask from the level that x rounds to, exact for any number of levels.

        The level is an integer, so that the distance to the first one outside is 1 or more
        inside, 0 or less outside.
        """
        return [
            *self._whole_zero_point(z),
            *self._broadcast("whole_z", "offset"),
            ("Div", [x, "scale"], ["position"], []),
            ("Round", ["position"], ["rounded"], []),
            ("Add", ["rounded", "offset"], ["level"], []),
            _constant("below", self.qmin - 1.0),
            _constant("above", self.qmax + 1.0),
            ("Sub", ["level", "below"], ["from_below"], []),
            ("Sub", ["above", "level"], ["from_above"], []),
            ("Min", ["from_below", "from_above"], ["nearest"], []),
            ("Clip", ["nearest", "zero", "one"], ["inside"], []),
        ]

    def _whole_zero_point(self, z: str) -> list[Node]:
        """Return nodes that make a float32 of whole number of the zero_point."""
        if not self.moves_zero_point:
            return [("Cast", [z], ["whole_z"], [("to", TensorProto.FLOAT, "int", False)])]
        return [
            ("Round", [z], ["rounded_z"], []),
            _constant("least_z", float(self.qmin)),
            _constant("greatest_z", float(self.qmax)),
            ("Clip", ["rounded_z", "least_z", "greatest_z"], ["whole_z"], []),
        ]

    def _slope(self, x: str) -> list[Node]:
        """Return the gradient through the soft staircase.

        With k = log(2 / alpha - 1), which makes its steps 1 - alpha high, and d = |x - y| / s the
        distance from the level in levels::

            slope = k / (2 * (1 - alpha)) * (1 - tanh(k * (1 / 2 - d)) ** 2)
        """
        k = math.log(2 / DSQ_ALPHA - 1)
        return [
            ("Sub", ["O(0)", x], ["off"], []),
            ("Abs", ["off"], ["off_level"], []),
            ("Div", ["off_level", "scale"], ["d"], []),
            _constant("middle", 0.5),
            ("Sub", ["middle", "d"], ["to_middle"], []),
            _constant("k", k),
            ("Mul", ["to_middle", "k"], ["argument"], []),
            ("Tanh", ["argument"], ["tanh"], []),
            ("Mul", ["tanh", "tanh"], ["flat"], []),
            ("Sub", ["one", "flat"], ["steepness"], []),
            _constant("height", k / (2 * (1 - DSQ_ALPHA))),
            ("Mul", ["steepness", "height"], ["slope"], []),
            ("Mul", ["passed", "slope"], ["soft"], []),
        ]

    def _broadcast(self, values: str, name: str) -> list[Node]:
        """Return nodes that align scale or zero_point with x."""
        if self.axis is None or self.rank is None:
            return [("Identity", [values], [name], [])]
        shape = [1] * self.rank
        shape[self.axis] = -1
        return [
            ("Constant", [], [f"{name}_shape"], [("value", shape, "int", True)]),
            ("Reshape", [values, f"{name}_shape"], [name], []),
        ]

    def _scale_gradient(self, x: str, s: str, target: str) -> list[Node]:
        if self.method in ("lsq", "lsq+"):
            nodes: list[Node] = [
                ("Mul", ["GO(0)", "O(0)"], ["dy_y"], []),
                ("Mul", ["passed", x], ["passed_x"], []),
                ("Sub", ["dy_y", "passed_x"], ["terms"], []),
            ]
        else:
            nodes = [("Mul", ["stopped", "O(0)"], ["terms"], [])]
        return [*nodes, *self._sum("terms", "total"), ("Div", ["total", s], [target], [])]

    def _sum(self, terms: str, name: str) -> list[Node]:
        """Return nodes that sum over all elements that share a scale."""
        keep = ("keepdims", 0, "int", False)
        if self.axis is None or self.rank is None:
            return [("ReduceSum", [terms], [name], [keep])]
        axes = [i for i in range(self.rank) if i != self.axis]
        return [
            ("Constant", [], [f"{name}_axes"], [("value", axes, "int", True)]),
            ("ReduceSum", [terms, f"{name}_axes"], [name], [keep]),
        ]


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
    """Replace onnxruntime's ReluGrad, whose CPU kernel is 30 times slower than a Clip."""
    nodes: list[Node] = [
        _constant("big", 1e30),
        _constant("zero", 0.0),
        _constant("one", 1.0),
        ("Mul", ["O(0)", "big"], ["steep"], []),
        ("Clip", ["steep", "zero", "one"], ["slope"], []),
        ("Mul", ["GO(0)", "slope"], ["GI(0)"], []),
    ]
    ort_internals.register_gradient_definition("::Relu", _definitions(nodes))


def _constant(name: str, value: float) -> Node:
    return ("Constant", [], [name], [("value", value, "float", True)])


def _definitions(nodes: list[Node]) -> list[Any]:
    """Return onnxruntime's gradient node definitions for ``nodes``."""
    made = []
    for op_type, inputs, outputs, attributes in nodes:
        node = ort_internals.GradientNodeDefinition()
        node.op_type, node.domain = op_type, ""
        node.inputs, node.outputs = inputs, outputs
        node.attributes = [_attribute(*a) for a in attributes]
        made.append(node)
    return made


def _attribute(name: str, value: Any, dtype: str, is_tensor: bool) -> Any:
    attribute = ort_internals.GradientNodeAttributeDefinition()
    attribute.name, attribute.value_json = name, json.dumps(value)
    attribute.dtype, attribute.is_tensor = dtype, is_tensor
    return attribute
