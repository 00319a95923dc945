"""The interface of gradient definitions: read a node, and add the nodes of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxqat.errors import TrainingError

__all__ = ["CONTRIB", "Backward", "Scope", "Shape"]

CONTRIB = "com.microsoft"
AXES_INPUT_SINCE = 18  # opset from which reductions read axes as an input (ReduceSum: 13)

Array = NDArray[Any]
Shape = tuple[int | None, ...]


@dataclass(kw_only=True)
class Scope:
    """The graph to which gradient nodes are added.

    Attributes
    ----------
    opset : int
        Opset of the default domain; at least 16.
    shapes : dict of str to tuple
        The shape of each value whose rank is known; None stands for an unknown length.
    kernels : frozenset of str
        Gradient ops of the runtime that are used, see `onnxqat.gradients.kernels`.
    wide : bool
        Whether arithmetic costs little next to passes over memory, as on a GPU.
    names : set of str
        All names in use.
    known : dict of str to array
        The values of small constants.
    nodes, constants, values : list
        The added nodes, initializers, and shapes that a kernel reads.
    """

    opset: int
    shapes: dict[str, Shape]
    kernels: frozenset[str]
    names: set[str]
    wide: bool = False
    known: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    values: list[onnx.ValueInfoProto] = field(default_factory=list)
    _made: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def name(self, wanted: str) -> str:
        """Return an unused name similar to ``wanted``, and mark it as used."""
        name, number = wanted, 1
        while name in self.names:
            number += 1
            name = f"{wanted}_{number}"
        self.names.add(name)
        return name

    def constant(self, values: Any) -> str:
        """Return the name of an initializer; equal values share one. Floats become float32."""
        array = np.asarray(values, np.float32 if isinstance(values, float) else None)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            name = self._made[key] = self.name(f"gradient/constant{len(self._made)}")
            self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
            self.shapes[name] = array.shape
        return self._made[key]


@dataclass(frozen=True, kw_only=True)
class Backward:
    """One node of the forward graph, during the walk back from the loss.

    Attributes
    ----------
    node : onnx.NodeProto
        The node; a definition may add an output that its gradient reads.
    dys : sequence of str
        The gradient of each output; empty if there is none.
    wanted : frozenset of int
        The inputs that need a gradient.
    scope : Scope
        The graph to which nodes are added.
    """

    node: onnx.NodeProto
    dys: Sequence[str]
    wanted: frozenset[int]
    scope: Scope

    @property
    def dy(self) -> str:
        """The gradient of the first output."""
        return self.dys[0]

    @property
    def x(self) -> str:
        """The first input."""
        return str(self.node.input[0])

    @property
    def y(self) -> str:
        """The first output."""
        return str(self.node.output[0])

    def input(self, index: int) -> str:
        """Return the name of an input; empty if it is absent."""
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    def output(self, index: int) -> str:
        """Return the name of an output; an absent one is added to the node."""
        while len(self.node.output) <= index:
            self.node.output.append("")
        if not self.node.output[index]:
            self.node.output[index] = self.scope.name(f"{self.y}/output{index}")
        return str(self.node.output[index])

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute; bytes are returned as text."""
        value = next(
            (helper.get_attribute_value(a) for a in self.node.attribute if a.name == name), default
        )
        return value.decode() if isinstance(value, bytes) else value

    def has(self, kernel: str) -> bool:
        """Return whether a gradient op of the runtime is used (`onnxqat.gradients.kernels`)."""
        return kernel in self.scope.kernels

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a value, or None if its rank is unknown."""
        return self.scope.shapes.get(name)

    def fixed(self, name: str) -> list[int] | None:
        """Return the shape of a value, or None if a length is unknown."""
        shape = self.shape(name)
        if shape is None or None in shape:
            return None
        return [length for length in shape if length is not None]

    def rank(self, name: str) -> int:
        """Return the rank of a value.

        Raises
        ------
        TrainingError
            The rank is unknown.
        """
        shape = self.shape(name)
        if shape is None:
            raise self.unknown(f"the rank of '{name}'")
        return len(shape)

    def unknown(self, what: str) -> TrainingError:
        """Return the error that something the gradient needs is unknown."""
        return TrainingError(
            f"{self._where()}: its gradient needs {what}, which is unknown. Export the model with "
            "fixed sizes."
        )

    def unsupported(self, what: str) -> TrainingError:
        """Return the error that the gradient of this form of the op is not defined."""
        return TrainingError(
            f"{self._where()}: onnxqat has no gradient for {what}. Rewrite the model without it."
        )

    def _where(self) -> str:
        return f"Node '{self.node.name or self.y}' ({self.node.op_type})"

    def constant(self, values: Any) -> str:
        """Return the name of an initializer, see `Scope.constant`."""
        return self.scope.constant(values)

    def value(self, name: str) -> Array | None:
        """Return the values of a small constant, or None for other values."""
        return self.scope.known.get(name)

    def op(
        self, op_type: str, *inputs: str | float | Array, like: str = "", **attributes: Any
    ) -> str:
        """Add a node and return its output.

        Parameters
        ----------
        op_type : str
            The op type, preceded by the domain unless it is the default one.
        *inputs : str, float or array
            Names of values, or constants; floats become float32.
        like : str
            A value with the same shape as the output.
        **attributes
            Attributes of the node.
        """
        return self.ops(op_type, *inputs, likes=[like], **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: str | float | Array,
        likes: Sequence[str | None],
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs (None: absent), see `op`."""
        domain, _, op_type = op_type.rpartition(".")
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        outputs = [
            "" if like is None else self.scope.name(f"gradient/{self.y}/{op_type}")
            for like in likes
        ]
        for output, like in zip(outputs, likes, strict=True):
            if like and output and (shape := self.shape(like)) is not None:
                self.scope.shapes[output] = shape
        name = next(o for o in outputs if o)
        made = helper.make_node(op_type, names, outputs, name=name, domain=domain, **attributes)
        self.scope.nodes.append(made)
        return outputs

    def product(self, a: str, b: str, *, trans_a: bool = False, trans_b: bool = False) -> str:
        """Add the product of the matrices in the last two axes of a and b."""
        if not trans_a and not trans_b:
            return self.op("MatMul", a, b)
        kernel = f"{CONTRIB}.FusedMatMul"
        return self.op(kernel, a, b, transA=int(trans_a), transB=int(trans_b))

    def reduce(self, op_type: str, x: str, axes: Sequence[int], *, keepdims: bool = True) -> str:
        """Add a reduction over some axes; without axes, return x."""
        if not axes:
            return x
        if op_type == "ReduceSum" or self.scope.opset >= AXES_INPUT_SINCE:
            return self.op(op_type, x, np.array(axes, np.int64), keepdims=int(keepdims))
        return self.op(op_type, x, keepdims=int(keepdims), axes=list(axes))

    def lengths(self, name: str) -> str:
        """Return the shape of a value as a tensor: a constant if it is known, or else a Shape."""
        fixed = self.fixed(name)
        return self.op("Shape", name) if fixed is None else self.constant(np.array(fixed, np.int64))

    def reshape(self, x: str, lengths: str | Sequence[int], like: str = "") -> str:
        """Add a Reshape."""
        if not isinstance(lengths, str):
            lengths = self.constant(np.array(lengths, np.int64))
        return self.op("Reshape", x, lengths, like=like)

    def shaped_like(self, x: str, other: str) -> str:
        """Add a Reshape to the shape of another value."""
        return self.reshape(x, self.lengths(other), like=other)

    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        """Add axes of length 1."""
        return self.op("Unsqueeze", x, np.array(axes, np.int64))

    def zeros(self, name: str) -> str:
        """Return float32 zeros in the shape of a value."""
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
        return self.op("ConstantOfShape", self.lengths(name), like=name, value=value)

    def step(self, x: str, *, at_zero: float = 0.0) -> str:
        """Return 1 where x is positive and 0 where it is negative, computed by one kernel.

        A comparison and a cast from bool are 20 times slower on a CPU.
        """
        return self.op("HardSigmoid", x, alpha=1e30, beta=at_zero, like=x)

    def typed(self, name: str, like: str) -> str:
        """Declare the shape of a value, which some kernels of the runtime need; return the name."""
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, self.fixed(like))
        self.scope.values.append(value)
        return name

    def summed_to(self, terms: str, operand: str, result: str | None = None) -> str:
        """Sum over the axes along which an operand was broadcast.

        Parameters
        ----------
        terms : str
            The gradient terms, in the shape of ``result``.
        operand : str
            The value that was broadcast.
        result : str, optional
            A value with the shape of ``terms`` (default: the output of the node).
        """
        shape, target = self.shape(self.y if result is None else result), self.shape(operand)
        if shape is not None and shape == target and None not in shape:
            return terms
        if shape is None or target is None or None in shape or None in target:
            return self._summed_to_computed(terms, operand)
        lead = len(shape) - len(target)
        axes = [i for i in range(lead) if shape[i] != 1]
        axes += [i + lead for i, n in enumerate(target) if n == 1 and shape[i + lead] != 1]
        total = self.reduce("ReduceSum", terms, axes)
        return self.shaped_like(total, operand) if lead else self._known(total, operand)

    def _known(self, name: str, like: str) -> str:
        self.scope.shapes[name] = self.scope.shapes[like]
        return name

    def _summed_to_computed(self, terms: str, operand: str) -> str:
        """Sum over axes that are determined when the graph runs."""
        lengths, goal = self.op("Shape", terms), self.op("Shape", operand)
        lead = self.op("Sub", self.op("Shape", lengths), self.op("Shape", goal))
        one = helper.make_tensor("value", TensorProto.INT64, [1], [1])
        ones = self.op("ConstantOfShape", lead, value=one)
        aligned = self.op("Concat", ones, goal, axis=0)
        single = self.op("Equal", aligned, np.array(1, np.int64))
        axes = self.reshape(self.op("NonZero", single), [-1])
        total = self.op("ReduceSum", terms, axes, keepdims=1, noop_with_empty_axes=1)
        return self.reshape(total, goal, like=operand)
