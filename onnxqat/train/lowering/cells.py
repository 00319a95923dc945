"""Add the plain nodes of one step of an LSTM, a GRU or an RNN.

The formulas are those of https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and
onnx__RNN.html (Hochreiter and Schmidhuber 1997; Cho et al. 2014, https://arxiv.org/abs/1406.1078).
A step takes ``X_t W^T``, adds ``h R^T`` and the bias, clips the sum if the layer has ``clip``, and
applies the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.model import constant
from onnxqat.train.lowering.gradient import Refusal

__all__ = ["CELLS", "Activation", "Cell", "Nodes", "State", "read_activations"]

DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
# The factors of each activation, in their order, with their defaults. None: ONNX and onnxruntime
# have different defaults. They differ for all factors of an RNN.
ACTIVATIONS: dict[str, dict[str, float | None]] = {
    **{name: {} for name in ("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh")},
    "Affine": {"alpha": None, "beta": None},
    "Elu": {"alpha": 1.0},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "LeakyRelu": {"alpha": 0.01},
    "ScaledTanh": {"alpha": None, "beta": None},
    "ThresholdedRelu": {"alpha": None},
}


class Activation(NamedTuple):
    """An activation with its factors."""

    name: str
    factors: Mapping[str, float]


class State(NamedTuple):
    """The state behind a step, each tensor of shape (N, units); only an LSTM has a cell."""

    hidden: gs.Tensor
    cell: gs.Tensor | None


def read_activations(node: gs.Node, directions: int) -> list[tuple[Activation, ...]]:
    """Return the activations of each direction.

    The values of ``activation_alpha`` and ``activation_beta`` go, in order, to the activations that
    have such a factor.

    Raises
    ------
    Refusal
        An activation is not supported, or a factor is missing.
    """
    usual = DEFAULTS[node.op]
    names = node.attrs.get("activations") or usual * directions
    if len(names) != len(usual) * directions:
        raise Refusal(
            f"it has {len(names)} activations for {directions} direction(s) of {len(usual)}"
        )
    given = {key: iter(node.attrs.get(f"activation_{key}", ())) for key in ("alpha", "beta")}
    found = [_activation(name, given, has_usual=node.op != "RNN") for name in names]
    return [tuple(found[i : i + len(usual)]) for i in range(0, len(found), len(usual))]


def _activation(name: str, given: Mapping[str, Iterator[float]], *, has_usual: bool) -> Activation:
    known = {other.lower(): other for other in ACTIVATIONS}.get(name.lower())
    if known is None:
        raise Refusal(f"its activation '{name}' is not one of {', '.join(sorted(ACTIVATIONS))}")
    factors: dict[str, float] = {}
    for key, usual in ACTIVATIONS[known].items():
        value = next(given[key], usual if has_usual else None)
        if value is None:
            raise Refusal(f"its activation '{name}' has no activation_{key}")
        factors[key] = float(value)
    return Activation(known, factors)


class Nodes:
    """Collect nodes and give them names.

    Parameters
    ----------
    prefix : str
        The beginning of all names.
    """

    def __init__(self, prefix: str) -> None:
        self.made: list[gs.Node] = []
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[float, ...]], gs.Constant] = {}

    def add(self, op_type: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        """Add a node, and return its output."""
        name = f"{self._prefix}/step{len(self.made)}"
        output = gs.Variable(name)
        self.made.append(gs.Node(op_type, name, attributes, list(inputs), [output]))
        return output

    def split(self, tensor: gs.Tensor, lengths: Sequence[int], axis: int) -> list[gs.Variable]:
        """Add a Split into parts of these lengths."""
        name = f"{self._prefix}/step{len(self.made)}"
        outputs = [gs.Variable(f"{name}/{i}") for i in range(len(lengths))]
        inputs = [tensor, self.integers(*lengths)]
        self.made.append(gs.Node("Split", name, {"axis": axis}, inputs, outputs))
        return outputs

    def unstack(self, tensor: gs.Tensor, count: int, axis: int) -> list[gs.Variable]:
        """Cut a tensor into ``count`` slices along an axis, and remove that axis."""
        parts = [tensor] if count == 1 else self.split(tensor, [1] * count, axis)
        return [self.add("Squeeze", part, self.integers(axis)) for part in parts]

    def write(self, tensor: gs.Tensor, target: gs.Tensor) -> None:
        """Add a node that writes a tensor to an output of the layer."""
        name = f"{self._prefix}/step{len(self.made)}"
        self.made.append(gs.Node("Identity", name, {}, [tensor], [target]))

    def integers(self, *values: int) -> gs.Constant:
        """Return an int64 constant with one axis; the same values give the same constant."""
        return self._constant("integers", values, np.array(values, np.int64))

    def number(self, value: float) -> gs.Constant:
        """Return a float32 constant of shape (); the same value gives the same constant."""
        return self._constant("number", (value,), np.array(value, np.float32))

    def _constant(self, kind: str, key: tuple[float, ...], values: Any) -> gs.Constant:
        if (kind, key) not in self._constants:
            name = f"{self._prefix}/constant{len(self._constants)}"
            self._constants[kind, key] = constant(name, values)
        return self._constants[kind, key]


class Cell:
    """Add the steps of one direction of a layer.

    Parameters
    ----------
    nodes : Nodes
        Takes the nodes.
    node : gs.Node
        The layer.
    activations : tuple of Activation
        The activations of the direction.
    recurrence : Tensor of shape (gates * units, units)
        R of the direction.
    bias : Tensor of shape (2 * gates * units,) or None
        Wb and Rb of the direction.
    peepholes : Tensor of shape (3 * units,) or None
        P of the direction.
    """

    gates: int

    def __init__(
        self,
        nodes: Nodes,
        node: gs.Node,
        activations: Sequence[Activation],
        recurrence: gs.Tensor,
        bias: gs.Tensor | None,
        peepholes: gs.Tensor | None,
    ) -> None:
        self.nodes, self.node, self.activations = nodes, node, activations
        self.units = int(node.attrs["hidden_size"])
        self.recurrence = recurrence
        self.biases = (
            nodes.split(bias, [self.gates * self.units] * 2, 0) if bias is not None else None
        )
        self.bias = nodes.add("Add", *self.biases) if self.biases else None
        self.peepholes = (
            nodes.split(peepholes, [self.units] * 3, 0) if peepholes is not None else None
        )

    def step(self, product: gs.Tensor, old: State) -> State:
        """Add a step, and return the state behind it.

        Parameters
        ----------
        product : Tensor of shape (N, gates * units)
            ``X_t W^T``.
        old : State
            The state before the step.
        """
        raise NotImplementedError

    def product(self, left: gs.Tensor, right: gs.Tensor, added: gs.Tensor | None) -> gs.Variable:
        """Return ``left right^T + added``; the kernel adds the products to ``added``."""
        operands = [left, right] if added is None else [left, right, added]
        return self.nodes.add("Gemm", *operands, transB=1)

    def plus(self, tensor: gs.Tensor, bias: gs.Tensor | None) -> gs.Tensor:
        """Add a bias, if there is one."""
        return tensor if bias is None else self.nodes.add("Add", tensor, bias)

    def activated(self, index: int, tensor: gs.Tensor, *, clipped: bool = True) -> gs.Variable:
        """Clip a tensor if the layer has ``clip``, and apply activation ``index``."""
        nodes, (name, factors) = self.nodes, self.activations[index]
        limit = self.node.attrs.get("clip")
        if clipped and limit is not None:
            tensor = nodes.add("Clip", tensor, nodes.number(-limit), nodes.number(limit))
        numbers = [nodes.number(value) for value in factors.values()]
        if name == "Affine":
            return nodes.add("Add", nodes.add("Mul", tensor, numbers[0]), numbers[1])
        if name == "ScaledTanh":
            steep = nodes.add("Tanh", nodes.add("Mul", tensor, numbers[1]))
            return nodes.add("Mul", steep, numbers[0])
        return nodes.add(name, tensor, **factors)

    def rest(self, tensor: gs.Tensor) -> gs.Variable:
        """Return 1 minus a tensor."""
        return self.nodes.add("Sub", self.nodes.number(1.0), tensor)


class _Lstm(Cell):
    """``C = f * C + i * c``, ``h = o * h(C)``; with ``input_forget``, f is 1 - i."""

    gates = 4

    def step(self, product: gs.Tensor, old: State) -> State:
        add, cell = self.nodes.add, old.cell
        total = self.plus(self.product(old.hidden, self.recurrence, product), self.bias)
        i, o, f, c = self.nodes.split(total, [self.units] * 4, 1)
        into = self.activated(0, self._peeping(i, 0, cell))
        if self.node.attrs.get("input_forget", 0):
            kept = self.rest(into)
        else:
            kept = self.activated(0, self._peeping(f, 2, cell))
        new = add("Add", add("Mul", kept, cell), add("Mul", into, self.activated(1, c)))
        out = self.activated(0, self._peeping(o, 1, new))
        return State(add("Mul", out, self.activated(2, new, clipped=False)), new)

    def _peeping(self, gate: gs.Tensor, index: int, cell: gs.Tensor | None) -> gs.Tensor:
        """Add the cell times peephole ``index``, if there are peepholes."""
        if self.peepholes is None:
            return gate
        return self.nodes.add("Add", gate, self.nodes.add("Mul", self.peepholes[index], cell))


class _Gru(Cell):
    """``h = (1 - z) * g(...) + z * h``; r is applied before or behind the product with R."""

    gates = 3

    def __init__(self, nodes: Nodes, *others: Any) -> None:
        super().__init__(nodes, *others)
        parts = [2 * self.units, self.units]
        self.recurrences = nodes.split(self.recurrence, parts, 0)
        self.after = bool(self.node.attrs.get("linear_before_reset", 0))
        self.both: list[Any] = [None, None]  # of both gates, and of the candidate
        self.own: list[Any] = [None, None]  # of the candidate: Wb, Rb
        if self.biases:
            self.both = nodes.split(self.bias, parts, 0)
            self.own = [nodes.split(bias, parts, 0)[1] for bias in self.biases]

    def step(self, product: gs.Tensor, old: State) -> State:
        add, hidden = self.nodes.add, old.hidden
        gates, candidate = self.nodes.split(product, [2 * self.units, self.units], 1)
        total = self.plus(self.product(hidden, self.recurrences[0], gates), self.both[0])
        z, r = self.nodes.split(self.activated(0, total), [self.units] * 2, 1)
        if self.after:
            inner = add("Mul", r, self.product(hidden, self.recurrences[1], self.own[1]))
            total = self.plus(add("Add", candidate, inner), self.own[0])
        else:
            reset = add("Mul", r, hidden)
            total = self.plus(self.product(reset, self.recurrences[1], candidate), self.both[1])
        fresh = add("Mul", self.rest(z), self.activated(1, total))
        return State(add("Add", fresh, add("Mul", z, hidden)), None)


class _Rnn(Cell):
    """``h = f(...)``; the bias is added before ``h R^T``."""

    gates = 1

    def step(self, product: gs.Tensor, old: State) -> State:
        total = self.product(old.hidden, self.recurrence, self.plus(product, self.bias))
        return State(self.activated(0, total), None)


CELLS: dict[str, type[Cell]] = {"GRU": _Gru, "LSTM": _Lstm, "RNN": _Rnn}
