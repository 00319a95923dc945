"""Fake-quantize, the op that replaces a Q/DQ pair in training: forward pass and gradient.

Forward: a model-local function whose body is the deployed QuantizeLinear [, Clip],
DequantizeLinear, so that training computes the same as the Q/DQ file, bit for bit.

Backward, with ``y = fake_quantize(x)``, upstream gradient ``dy`` and the straight-through estimator
(Bengio et al. 2013)::

    inside = qmin <= round(x / s) + z <= qmax
    passed = dy * inside

==============  ===================================================================================
method
==============  ===================================================================================
lsq             ``dL/dx = passed``; ``dL/ds = sum(dy * (y - x) + (dy - passed) * x) / s`` (Esser et
                al. 2020, https://arxiv.org/abs/1902.08153, equation 3). For scales that are powers
                of two, this is TQT (Jain et al. 2020, https://arxiv.org/abs/1903.08066)
lsq+            as lsq, and ``dL/dz = -s * sum(dy - passed)`` if the spec is asymmetric (Bhalgat et
                al. 2020, https://arxiv.org/abs/2004.09576, section 3, with beta = -z * s; z is
                rounded, since the chip's is an integer)
pact            ``dL/dx = passed``; only clipped values move the clipping range:
                ``dL/ds = sum((dy - passed) * y) / s`` (Choi et al. 2018,
                https://arxiv.org/abs/1805.06085, section 3, here at both ends)
dsq             the scale as in pact, and ``dL/dx = passed * slope``, with the slope of a soft
                staircase (Gong et al. 2019, https://arxiv.org/abs/1908.05033, section 3; alpha is
                not learned): small at a level, large between two levels, 1 on average
moving-average  ``dL/dx = passed``; scale and zero_point follow the observed ranges, see
                `onnxqat.train.optimization.ranges`
ste             ``dL/dx = passed``; scale and zero_point do not change
==============  ===================================================================================

Up to 8 bits ``inside`` is computed as |y - x| <= s / 2, which is true exactly inside the clipping
range; on a CPU, a comparison of levels and a cast to float would cost more than a Conv. With more
levels, float32 rounding of x and y makes this inexact, and the level itself is compared.

The sums are computed as products of rows: these write one number, whereas Mul writes a whole tensor
for ReduceSum. Inside the range ``dy - passed`` is zero, so that no large sums cancel.

If x comes from a Relu or a Clip from 0 and has no other reader, one mask serves both ops, and the
gradient of the Relu or Clip is dy. With the upper end ``L`` of the clipping range and the upper
limit ``C`` of the Clip::

    inside = 0 < x < min(C, L)
    kept = x where x < L
    dL/ds = sum(dy * (y - kept)) / s

Number of passes over memory (ops that read or write x, y or dy; in brackets: products of rows),
including the gradient of the Relu or Clip: 6 (2) without one, 8 (2) with a Relu, 11 (2) with a
Clip; with a shared mask, 6 (1) with a Relu and 7 (1) with a Clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxqat.qparams import Method

__all__ = ["DOMAIN", "FakeQuantize"]

DOMAIN = "onnxqat"

Nodes = list[onnx.NodeProto]

# By float32 rounding of x / s and of q * s, |y - x| can exceed s / 2: by less than 2^-16 * s each
# for the 256 levels of 8 bits. Only values this close to the end of the range can be misjudged.
HALF_LEVEL = 0.5 + 2**-14

LEARNING = ("lsq", "lsq+", "pact", "dsq")  # methods that learn the scale
DSQ_ALPHA = 0.4  # the part of a step's height that the soft staircase lacks, as in MQBench


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
        Axis of a per-axis scale; None for one scale.
    rank : int or None
        Rank of the tensor; None if unknown, which is not allowed with a per-axis scale.
    learns_x : bool
        Whether the op passes a gradient to x.
    method : Method
        How scale and zero_point are trained.
    moves_zero_point : bool
        Whether the zero_point is a float32 that is rounded here, and not an integer.
    ceiling : float or None
        The upper limit of the Clip from 0 that computes x (infinite: a Relu), if its gradient is
        included here, see `sharing_mask`; otherwise None.
    """

    dtype: str
    qmin: int
    qmax: int
    axis: int | None
    rank: int | None
    learns_x: bool
    method: Method
    moves_zero_point: bool = False
    ceiling: float | None = None

    def sharing_mask(self, ceiling: float | None) -> FakeQuantize:
        """Return the variant that includes the gradient of the Relu or Clip, if possible."""
        fits = self.axis is None and self._has_few_levels and not self.learns_zero_point
        fits = fits and self.learns_x and self.method not in ("pact", "dsq")
        return replace(self, ceiling=ceiling) if fits else self

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
        """The op type of this variant."""
        words = ["FakeQuantize", self.dtype, str(self.qmin).replace("-", "m"), str(self.qmax)]
        words += [f"axis{self.axis}"] if self.axis is not None else []
        words += [f"rank{self.rank}"] if self.rank is not None else []
        words += ["x"] if self.learns_x else []
        words += [self.method.replace("+", "plus")] if self.learns_scale else []
        words += ["z"] if self.moves_zero_point else []
        words += [] if self.ceiling is None else [f"below{self.ceiling!r}".replace(".", "p")]
        return "_".join(words)

    @property
    def inputs(self) -> tuple[str, str, str]:
        """The formal inputs."""
        return ("x", "s", "z")

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

    def gradient_function(self, opset: int) -> onnx.FunctionProto | None:
        """Return the gradient as a model-local function, or None if no input has a gradient.

        The function reads the inputs of the forward function by name, its output as ``y`` and the
        upstream gradient ``dy``; it computes ``d<input>``, see `onnxqat.gradients`.
        """
        if not (self.learns_x or self.learns_scale):
            return None
        nodes = self._gradient()
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input} - made
        outputs = [f"d{name}" for name in self.inputs if f"d{name}" in made]
        passed = [name for name in (*self.inputs, "y", "dy") if name in read]
        name = f"{self.op_type}_gradient"
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_function(DOMAIN, name, passed, outputs, nodes, opsets)

    def _gradient(self) -> Nodes:
        if self.ceiling is not None:
            return self._shared_gradient(self.ceiling)
        nodes = [
            *self._shaped("x", "y", "dy"),
            *self._broadcast("s", "scale"),
            _node("Sub", ["y_rows", "x_rows"], "error"),
            *(self._inside() if self._has_few_levels else self._inside_by_level()),
            _node("Mul", ["dy_rows", "inside"], "passed"),
            _node("Sub", ["dy_rows", "passed"], "stopped"),
        ]
        if self.learns_x:
            nodes += self._slope() if self.method == "dsq" else []
            passed = "soft" if self.method == "dsq" else "passed"
            nodes.append(_node("Shape", ["x"], "shape"))
            nodes.append(_node("Reshape", [passed, "shape"], "dx"))
        if self.learns_scale:
            nodes += self._scale_gradient()
            nodes.append(_node("Div", ["total", "s"], "ds"))
        if self.learns_zero_point:
            nodes += [*self._sum("stopped", "shift"), _node("Mul", ["shift", "s"], "pull")]
            nodes.append(_node("Neg", ["pull"], "dz"))
        return nodes

    def _shared_gradient(self, ceiling: float) -> Nodes:
        """Return the gradient through this op and the Relu or Clip that computes x."""
        bounded = ceiling < math.inf
        nodes = [
            *self._shaped("x", "y", "dy"),
            *self._whole_zero_point(),
            _number("last", self.qmax + HALF_LEVEL),
            _node("Sub", ["last", "whole_z"], "levels"),
            _node("Mul", ["levels", "s"], "limit"),
            *([_number("ceiling", ceiling)] if bounded else []),
            _node("Min", ["limit", "ceiling"] if bounded else ["limit"], "end"),
            _node("Sub", ["end", "x_rows"], "below"),
            _node("Mul", ["x_rows", "below"], "room"),
            _node("HardSigmoid", ["room"], "inside", alpha=1e30, beta=0.0),
            _node("Mul", ["dy_rows", "inside"], "passed"),
            _node("Shape", ["x"], "shape"),
            _node("Reshape", ["passed", "shape"], "dx"),
        ]
        if not self.learns_scale:
            return nodes
        counted = "inside"
        if bounded:  # a value at the ceiling can lie inside the clipping range
            nodes += [
                _node("Sub", ["limit", "ceiling"], "over"),
                _node("HardSigmoid", ["over"], "all", alpha=1e30, beta=0.0),
                _node("Max", ["inside", "all"], "counted"),
            ]
            counted = "counted"
        return [
            *nodes,
            _node("Mul", ["x_rows", counted], "kept"),
            _node("Sub", ["y_rows", "kept"], "error"),
            *self._product("dy_rows", "error", "total"),
            _node("Div", ["total", "s"], "ds"),
        ]

    def _shaped(self, *tensors: str) -> Nodes:
        """Return nodes that reshape tensors so that each element of a scale has its own row.

        The products need rows. Besides, broadcasting a scale is slow if the last axis has length 1,
        as in the weight of a 1x1 convolution.
        """
        if self.axis:
            return [_node("Identity", [tensor], f"{tensor}_rows") for tensor in tensors]
        by_row = self.axis == 0 or (self.rank or 0) > 1
        rows = [0, 1, -1] if by_row else [1, 1, -1]
        return [
            _integers("rows", rows),
            *[_node("Reshape", [tensor, "rows"], f"{tensor}_rows") for tensor in tensors],
        ]

    @property
    def _has_few_levels(self) -> bool:
        return self.qmax - self.qmin < 2**8

    def _inside(self) -> Nodes:
        """Return the mask from |y - x| <= s / 2."""
        return [
            _node("Abs", ["error"], "distance"),
            _number("half", HALF_LEVEL),
            _node("Mul", ["scale", "half"], "limit"),
            _node("Sub", ["limit", "distance"], "room"),
            _node("HardSigmoid", ["room"], "inside", alpha=1e30, beta=0.0),
        ]

    def _inside_by_level(self) -> Nodes:
        """Return the mask from the level to which x is rounded; exact for any number of levels.

        Levels are integers, so the distance to the first level outside of the range is 1 or more
        inside, and 0 or less outside.
        """
        return [
            *self._whole_zero_point(),
            *self._broadcast("whole_z", "offset"),
            _node("Div", ["x_rows", "scale"], "position"),
            _node("Round", ["position"], "rounded"),
            _node("Add", ["rounded", "offset"], "level"),
            _number("below", self.qmin - 1.0),
            _number("above", self.qmax + 1.0),
            _node("Sub", ["level", "below"], "from_below"),
            _node("Sub", ["above", "level"], "from_above"),
            _node("Min", ["from_below", "from_above"], "nearest"),
            _number("zero", 0.0),
            _number("one", 1.0),
            _node("Clip", ["nearest", "zero", "one"], "inside"),
        ]

    def _whole_zero_point(self) -> Nodes:
        """Return nodes that compute the zero_point as a float32 with an integer value."""
        if not self.moves_zero_point:
            return [_node("Cast", ["z"], "whole_z", to=TensorProto.FLOAT)]
        return [
            _node("Round", ["z"], "rounded_z"),
            _number("least_z", float(self.qmin)),
            _number("greatest_z", float(self.qmax)),
            _node("Clip", ["rounded_z", "least_z", "greatest_z"], "whole_z"),
        ]

    def _slope(self) -> Nodes:
        """Return the gradient through the soft staircase.

        With k = log(2 / alpha - 1), which makes its steps 1 - alpha high, and d = |x - y| / s the
        distance from the level in levels::

            slope = k / (2 * (1 - alpha)) * (1 - tanh(k * (1 / 2 - d)) ** 2)
        """
        k = math.log(2 / DSQ_ALPHA - 1)
        return [
            _node("Abs", ["error"], "off_level"),
            _node("Div", ["off_level", "scale"], "d"),
            _number("middle", 0.5),
            _node("Sub", ["middle", "d"], "to_middle"),
            _number("k", k),
            _node("Mul", ["to_middle", "k"], "argument"),
            _node("Tanh", ["argument"], "tanh"),
            _node("Mul", ["tanh", "tanh"], "flat"),
            _number("unit", 1.0),
            _node("Sub", ["unit", "flat"], "steepness"),
            _number("height", k / (2 * (1 - DSQ_ALPHA))),
            _node("Mul", ["steepness", "height"], "slope"),
            _node("Mul", ["passed", "slope"], "soft"),
        ]

    def _broadcast(self, values: str, name: str) -> Nodes:
        """Return nodes that reshape scale or zero_point so that it broadcasts with x."""
        if self.axis is None or self.rank is None:
            return [_node("Identity", [values], name)]
        shape = [1] * (self.rank if self.axis else 3)
        shape[self.axis] = -1
        return [
            _integers(f"{name}_shape", shape),
            _node("Reshape", [values, f"{name}_shape"], name),
        ]

    def _scale_gradient(self) -> Nodes:
        """Return nodes that compute the ``total`` for each element of the scale, before / s."""
        if self.method not in ("lsq", "lsq+"):
            return self._product("stopped", "y_rows", "total")
        return [
            *self._product("dy_rows", "error", "of_error"),
            *self._product("stopped", "x_rows", "of_x"),
            _node("Add", ["of_error", "of_x"], "total"),
        ]

    def _product(self, left: str, right: str, name: str) -> Nodes:
        """Return nodes that sum products over all elements that share a scale."""
        if self.axis:
            return [
                _node("Mul", [left, right], f"{name}_terms"),
                *self._sum(f"{name}_terms", name),
            ]
        row = _node("com.microsoft.FusedMatMul", [left, right], f"{name}_rows", transB=1)
        return [row, *self._sum(f"{name}_rows", name)]

    def _sum(self, terms: str, name: str) -> Nodes:
        """Return nodes that sum over all elements that share a scale."""
        if self.axis is None:
            return [_node("ReduceSum", [terms], name, keepdims=0)]
        axes = [i for i in range((self.rank or 0) if self.axis else 3) if i != self.axis]
        return [
            _integers(f"{name}_axes", axes),
            _node("ReduceSum", [terms, f"{name}_axes"], name, keepdims=0),
        ]


def _node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    domain, _, op_type = op_type.rpartition(".")
    return helper.make_node(op_type, inputs, [output], domain=domain, **attributes)


def _number(name: str, value: float) -> onnx.NodeProto:
    """Return a float32 of shape ()."""
    return _node("Constant", [], name, value_float=value)


def _integers(name: str, values: list[int]) -> onnx.NodeProto:
    return _node("Constant", [], name, value_ints=values)
