"""Fake-quantize, the op that stands for a Q/DQ pair: forward and gradient, as ONNX nodes.

Forward: a model-local function whose body is the deployed QuantizeLinear [, Clip],
DequantizeLinear, so that training computes what the chip's file computes, bit for bit.

Backward, with ``y = fake_quantize(x)``, upstream gradient ``dy`` and the straight-through estimator
(Bengio et al. 2013)::

    inside = qmin <= round(x / s) + z <= qmax
    passed = dy * inside

==============  ===================================================================================
method
==============  ===================================================================================
lsq             ``dL/dx = passed``; ``dL/ds = sum(dy * (y - x) + (dy - passed) * x) / s`` (Esser et
                al. 2020, https://arxiv.org/abs/1902.08153, equation 3). Where scales are powers of
                two, this is TQT (Jain et al. 2020, https://arxiv.org/abs/1903.08066)
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
more levels the rounding of x and y in float32 blurs that, and the level itself is compared.

The sums are products of rows, which write one number where Mul writes a tensor for ReduceSum.
Inside the range ``dy - passed`` is zero, so that no large sums cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxqat.qparams import Method
from onnxqat.train.gradients import Node, constant, register_gradient, step

__all__ = ["DOMAIN", "FakeQuantize"]

DOMAIN = "onnxqat"

# |y - x| exceeds s / 2 by float32 rounding of x / s and of q * s: each below 2^-16 * s for the
# 256 levels of 8 bits. A value is misjudged as inside only within this slack of the range's end.
HALF_LEVEL = 0.5 + 2**-14

LEARNING = ("lsq", "lsq+", "pact", "dsq")  # methods that learn the scale
DSQ_ALPHA = 0.4  # how much of a step's height the soft staircase lacks; as MQBench fixes it

KEEP_NO_AXES = ("keepdims", 0, "int", False)


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
        words += [f"axis{self.axis}"] if self.axis is not None else []
        words += [f"rank{self.rank}"] if self.rank is not None else []
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
            register_gradient(f"{DOMAIN}::{self.op_type}", self._gradient())

    def gradient_function(self, opset: int) -> onnx.FunctionProto | None:
        """Return the gradient as a model-local function, None where nothing has one.

        It reads inputs of the forward function by name, ``y``, its output, and ``dy``; and
        computes ``d<input>``, see `onnxqat.gradients`.
        """
        if not (self.learns_x or self.learns_scale):
            return None
        roles = {f"I({i})": name for i, name in enumerate(self.inputs)}
        roles |= {f"GI({i})": f"d{name}" for i, name in enumerate(self.inputs)}
        roles |= {"O(0)": "y", "GO(0)": "dy"}
        nodes = [_node(roles, *given) for given in self._gradient()]
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input} - made
        outputs = [f"d{name}" for name in self.inputs if f"d{name}" in made]
        passed = [name for name in (*self.inputs, "y", "dy") if name in read]
        name = f"{self.op_type}_gradient"
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_function(DOMAIN, name, passed, outputs, nodes, opsets)

    def _gradient(self) -> list[Node]:
        x, s, z = (f"I({self.inputs.index(name)})" for name in "xsz")
        nodes: list[Node] = [
            *self._shaped({"x": x, "y": "O(0)", "dy": "GO(0)"}),
            *self._broadcast(s, "scale"),
            ("Sub", ["y", "x"], ["error"], []),
            *(self._inside() if self._has_few_levels else self._inside_by_level(z)),
            ("Mul", ["dy", "inside"], ["passed"], []),
            ("Sub", ["dy", "passed"], ["stopped"], []),
        ]
        if self.learns_x:
            nodes += self._slope() if self.method == "dsq" else []
            passed = "soft" if self.method == "dsq" else "passed"
            nodes.append(("Shape", [x], ["shape"], []))
            nodes.append(("Reshape", [passed, "shape"], ["GI(0)"], []))
        if self.learns_scale:
            nodes += self._scale_gradient()
            nodes.append(("Div", ["total", s], [f"GI({self.inputs.index('s')})"], []))
        if self.learns_zero_point:
            nodes += [*self._sum("stopped", "shift"), ("Mul", ["shift", s], ["pull"], [])]
            nodes.append(("Neg", ["pull"], ["GI(2)"], []))
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
            constant("half", HALF_LEVEL),
            ("Mul", ["scale", "half"], ["limit"], []),
            ("Sub", ["limit", "distance"], ["room"], []),
            step("room", "inside"),
        ]

    def _inside_by_level(self, z: str) -> list[Node]:
        """Return the mask from the level that x rounds to, exact for any number of levels.

        The level is an integer, so that the distance to the first one outside is 1 or more
        inside, 0 or less outside.
        """
        return [
            *self._whole_zero_point(z),
            *self._broadcast("whole_z", "offset"),
            ("Div", ["x", "scale"], ["position"], []),
            ("Round", ["position"], ["rounded"], []),
            ("Add", ["rounded", "offset"], ["level"], []),
            constant("below", self.qmin - 1.0),
            constant("above", self.qmax + 1.0),
            ("Sub", ["level", "below"], ["from_below"], []),
            ("Sub", ["above", "level"], ["from_above"], []),
            ("Min", ["from_below", "from_above"], ["nearest"], []),
            constant("zero", 0.0),
            constant("one", 1.0),
            ("Clip", ["nearest", "zero", "one"], ["inside"], []),
        ]

    def _whole_zero_point(self, z: str) -> list[Node]:
        """Return nodes that make a float32 of whole number of the zero_point."""
        if not self.moves_zero_point:
            return [("Cast", [z], ["whole_z"], [("to", TensorProto.FLOAT, "int", False)])]
        return [
            ("Round", [z], ["rounded_z"], []),
            constant("least_z", float(self.qmin)),
            constant("greatest_z", float(self.qmax)),
            ("Clip", ["rounded_z", "least_z", "greatest_z"], ["whole_z"], []),
        ]

    def _slope(self) -> list[Node]:
        """Return the gradient through the soft staircase.

        With k = log(2 / alpha - 1), which makes its steps 1 - alpha high, and d = |x - y| / s the
        distance from the level in levels::

            slope = k / (2 * (1 - alpha)) * (1 - tanh(k * (1 / 2 - d)) ** 2)
        """
        k = math.log(2 / DSQ_ALPHA - 1)
        return [
            ("Abs", ["error"], ["off_level"], []),
            ("Div", ["off_level", "scale"], ["d"], []),
            constant("middle", 0.5),
            ("Sub", ["middle", "d"], ["to_middle"], []),
            constant("k", k),
            ("Mul", ["to_middle", "k"], ["argument"], []),
            ("Tanh", ["argument"], ["tanh"], []),
            ("Mul", ["tanh", "tanh"], ["flat"], []),
            constant("unit", 1.0),
            ("Sub", ["unit", "flat"], ["steepness"], []),
            constant("height", k / (2 * (1 - DSQ_ALPHA))),
            ("Mul", ["steepness", "height"], ["slope"], []),
            ("Mul", ["passed", "slope"], ["soft"], []),
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
        if self.method not in ("lsq", "lsq+"):
            return self._product("stopped", "y", "total")
        return [
            *self._product("dy", "error", "of_error"),
            *self._product("stopped", "x", "of_x"),
            ("Add", ["of_error", "of_x"], ["total"], []),
        ]

    def _product(self, left: str, right: str, name: str) -> list[Node]:
        """Return nodes that sum products over all elements that share a scale."""
        if self.axis:
            return [
                ("Mul", [left, right], [f"{name}_terms"], []),
                *self._sum(f"{name}_terms", name),
            ]
        across = ("transB", 1, "int", False)
        row = ("com.microsoft.FusedMatMul", [left, right], [f"{name}_rows"], [across])
        return [row, *self._sum(f"{name}_rows", name)]

    def _sum(self, terms: str, name: str) -> list[Node]:
        """Return nodes that sum over all elements that share a scale."""
        if self.axis is None:
            return [("ReduceSum", [terms], [name], [KEEP_NO_AXES])]
        axes = [i for i in range((self.rank or 0) if self.axis else 3) if i != self.axis]
        return [
            ("Constant", [], [f"{name}_axes"], [("value", axes, "int", True)]),
            ("ReduceSum", [terms, f"{name}_axes"], [name], [KEEP_NO_AXES]),
        ]


def _node(
    roles: Mapping[str, str],
    op_type: str,
    inputs: list[str],
    outputs: list[str],
    attributes: list[tuple[str, Any, str, bool]],
) -> onnx.NodeProto:
    """Return a node of a gradient definition; names that are no roles are its own."""
    read, made = ([roles.get(n, f"inner_{n}") for n in names] for names in (inputs, outputs))
    given: dict[str, Any] = {name: value for name, value, _, _ in attributes}
    for name, value, dtype, is_tensor in attributes:
        if is_tensor:
            array = np.array(value, np.float32 if dtype == "float" else np.int64)
            given[name] = numpy_helper.from_array(array)
    domain, _, op_type = op_type.rpartition(".")
    return helper.make_node(op_type, read, made, None, None, domain, None, **given)
