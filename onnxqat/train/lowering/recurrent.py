"""Unroll LSTM, GRU and RNN: replace a layer by the plain nodes of all its steps.

One product ``X W^T`` serves all steps. `onnxqat.train.lowering.cells` adds the nodes of each step,
forwards, backwards or both; all steps read the same weights. The nodes add in the same order as
onnxruntime's kernels (``onnxruntime/core/providers/cpu/rnn``). So an LSTM without peepholes gives
the same values, bit for bit. A GRU and an RNN differ by a few units in the last place, because
their kernels use their own approximations of Sigmoid and Tanh. A sequence that ends early keeps
its state from there on, and its outputs behind the end are 0; the last state of an empty sequence
is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.model import constant
from onnxqat.preparation.editing import constant_values
from onnxqat.train.lowering.cells import CELLS, Cell, Nodes, State, read_activations
from onnxqat.train.lowering.gradient import Refusal, ShapeUnknown

__all__ = ["MAX_STEPS", "unrolled"]

MAX_STEPS = 1000  # a step has up to 20 nodes, and its gradients three times as many
X, W, R, B, LENGTHS, HIDDEN, CELL, PEEPHOLES = range(8)  # inputs
FLOAT = 1  # onnx.TensorProto.FLOAT
REVERSED = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


class Mask(NamedTuple):
    """Two float32 tensors of shape (N, 1) for one step.

    ``going`` is 1 for a sequence that has this step, ``ended`` for one that does not; else they
    are 0.
    """

    going: gs.Tensor
    ended: gs.Tensor


def unrolled(node: gs.Node) -> list[gs.Node]:
    """Return the plain nodes that compute an LSTM, a GRU or an RNN.

    Parameters
    ----------
    node : gs.Node
        The layer; the returned nodes write to its outputs.

    Raises
    ------
    Refusal
        The number of steps is unknown or too large, or an activation is not supported.
    """
    return _Layer(node).run()


class _Layer:
    def __init__(self, node: gs.Node) -> None:
        self.node = node
        self.nodes = Nodes(node.name)
        self.batch_first = bool(node.attrs.get("layout", 0))
        self.steps = self._count_steps()
        direction = node.attrs.get("direction", "forward")
        if direction not in REVERSED or "hidden_size" not in node.attrs:
            raise Refusal(
                "its direction is unknown, or its hidden_size is missing; export it again"
            )
        self.reversed, self.units = REVERSED[direction], int(node.attrs["hidden_size"])
        self.activations = read_activations(node, len(self.reversed))

    def _count_steps(self) -> int:
        data, axis = self.node.inputs[X], int(self.batch_first)
        steps = data.shape[axis] if data.shape is not None and len(data.shape) == 3 else None
        if not isinstance(steps, int):
            raise ShapeUnknown(
                f"the length of its sequences, axis {axis} of '{data.name}', is not fixed; "
                "export the model with fixed sizes"
            )
        if not 0 < steps <= MAX_STEPS:
            raise Refusal(
                f"its sequences have {steps} steps, and 1 to {MAX_STEPS} can be unrolled; give it "
                "shorter ones"
            )
        return steps

    def run(self) -> list[gs.Node]:
        """Return the nodes."""
        nodes, data = self.nodes, self.node.inputs[X]
        if self.batch_first:
            data = nodes.add("Transpose", data, perm=[1, 0, 2])
        masks, kind = self._masks(), CELLS[self.node.op]
        weights = [self._by_direction(index) for index in (W, R, B, PEEPHOLES)]
        firsts = [self._initial(index, data) for index in (HIDDEN, CELL)]
        written, ends = [], []
        for d, backwards in enumerate(self.reversed):
            w, r, b, p = (tensors[d] for tensors in weights)
            turned = nodes.add("Transpose", w, perm=[1, 0])
            products = nodes.unstack(nodes.add("MatMul", data, turned), self.steps, 0)
            cell = kind(nodes, self.node, self.activations[d], r, b, p)
            state, outputs = State(*(tensors[d] for tensors in firsts)), []
            for t in range(self.steps)[:: -1 if backwards else 1]:
                output, state = self._step(cell, products[t], state, masks[t] if masks else None)
                outputs.append(output)
            written.append(outputs[::-1] if backwards else outputs)
            ends.append(self._of_some_length(masks[0], state) if masks else state)
        self._write(written, ends)
        return nodes.made

    def _step(
        self, cell: Cell, product: gs.Tensor, old: State, mask: Mask | None
    ) -> tuple[gs.Tensor, State]:
        """Return the output of one step, and its state."""
        new = cell.step(product, old)
        if mask is None:
            return new.hidden, new
        add = self.nodes.add
        kept = (
            None if a is None else add("Add", add("Mul", a, mask.going), add("Mul", b, mask.ended))
            for a, b in zip(new, old, strict=True)
        )
        return add("Mul", new.hidden, mask.going), State(*kept)

    def _input(self, index: int) -> gs.Tensor | None:
        inputs = self.node.inputs
        return inputs[index] if index < len(inputs) and inputs[index].name else None

    def _by_direction(self, index: int, axis: int = 0) -> list[gs.Tensor | None]:
        """Return an input for each direction, without the axis of the directions."""
        tensor, count = self._input(index), len(self.reversed)
        return [None] * count if tensor is None else self.nodes.unstack(tensor, count, axis)

    def _initial(self, index: int, data: gs.Tensor) -> list[gs.Tensor | None]:
        """Return the initial hidden state or cell of each direction; zeros if none is given."""
        if index == CELL and self.node.op != "LSTM":
            return [None] * len(self.reversed)
        if self._input(index) is not None:
            return self._by_direction(index, int(self.batch_first))
        nodes = self.nodes
        shape = nodes.add("Shape", data)
        samples = nodes.add("Slice", shape, nodes.integers(1), nodes.integers(2))
        wanted = nodes.add("Concat", samples, nodes.integers(self.units), axis=0)
        return [nodes.add("ConstantOfShape", wanted)] * len(self.reversed)

    def _masks(self) -> list[Mask] | None:
        """Return the mask of each step; None if every sequence has all steps."""
        lengths, nodes = self._input(LENGTHS), self.nodes
        values = None if lengths is None else constant_values(lengths)
        if lengths is None or (values is not None and np.all(values == self.steps)):
            return None
        column = nodes.add("Unsqueeze", lengths, nodes.integers(1))
        counts = np.arange(self.steps, dtype=np.int32).reshape(-1, 1, 1)
        going = nodes.add("Greater", column, constant(f"{self.node.name}/positions", counts))
        masks = (going, nodes.add("Not", going))
        floats = [nodes.add("Cast", mask, to=FLOAT) for mask in masks]
        by_step = (nodes.unstack(mask, self.steps, 0) for mask in floats)
        return [Mask(*pair) for pair in zip(*by_step, strict=True)]

    def _of_some_length(self, first: Mask, state: State) -> State:
        """Return the last state, which is 0 for an empty sequence."""
        add = self.nodes.add
        return State(*(None if v is None else add("Mul", v, first.going) for v in state))

    def _write(self, written: list[list[gs.Tensor]], ends: list[State]) -> None:
        """Write those of the outputs Y, Y_h and Y_c that the layer has."""
        targets = [*self.node.outputs, None, None][:3]
        nodes, units = self.nodes, self.units
        if targets[0] is not None and targets[0].name:
            shape = nodes.integers(self.steps, 1, -1, units)
            rows = (nodes.add("Concat", *hidden, axis=0) for hidden in written)
            self._join([nodes.add("Reshape", row, shape) for row in rows], 1, targets[0])
        for target, values in zip(targets[1:], zip(*ends, strict=True), strict=True):
            if target is not None and target.name:
                shape = nodes.integers(1, -1, units)
                self._join([nodes.add("Reshape", v, shape) for v in values], 0, target)

    def _join(self, parts: list[gs.Tensor], axis: int, target: gs.Tensor) -> None:
        """Join the parts of all directions along ``axis``, and write them to an output."""
        whole = parts[0] if len(parts) == 1 else self.nodes.add("Concat", *parts, axis=axis)
        if self.batch_first:
            perm = [2, 0, 1, 3] if axis else [1, 0, 2]
            whole = self.nodes.add("Transpose", whole, perm=perm)
        self.nodes.write(whole, target)
