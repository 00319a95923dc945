"""Run a model up to the ops that onnxruntime lacks, and return the tensors that these ops read.

A model can end in an op of another runtime, such as a TensorRT plugin. Everything before the op is
run; comparisons and training then use the tensors that the op reads in place of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray

from onnxqat.device import CPU, Device
from onnxqat.errors import ModelError
from onnxqat.preserve import subgraphs
from onnxqat.runtime import Optimization, Session, UnknownOpError, open_session

__all__ = ["Ends", "TensorReader", "open_ends", "prune"]

Unknown = tuple[str, str | None]  # the type of an op, and its node if other nodes of the type run


@dataclass(frozen=True, kw_only=True)
class Ends:
    """A session of the part of a model that onnxruntime can run.

    Attributes
    ----------
    session : Session
        The session; its outputs are ``names``.
    names : tuple of str
        The outputs of the model that can be computed, in order, then the tensors that missing ops
        read on the paths to the other outputs.
    lost : tuple of str
        The outputs that cannot be computed.
    ops : tuple of str
        The types of the missing ops.
    """

    session: Session
    names: tuple[str, ...]
    lost: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()


def open_ends(
    make: Callable[[], onnx.ModelProto], *, optimization: Optimization, threads: int, name: str
) -> Ends:
    """Open a session of a model, or of the part of it that can be run.

    Parameters
    ----------
    make : callable
        Returns a new copy of the model at each call.
    optimization, threads, name
        As `onnxqat.runtime.open_session`.

    Raises
    ------
    ModelError
        onnxruntime refuses the model, or a missing op reads the model's inputs directly.
    """
    unknown: list[Unknown] = []
    while True:
        model = make()
        outputs = tuple(value.name for value in model.graph.output)
        names, lost = _ends(model.graph, unknown) if unknown else (outputs, ())
        if unknown and not names:
            raise ModelError(
                f"{name}: onnxruntime has no {unknown[-1][0]}, and there is nothing before it to "
                "compute. Export without it."
            )
        if lost:
            prune(model, names)
        try:
            session = open_session(model, optimization=optimization, threads=threads, name=name)
        except UnknownOpError as error:
            if (error.op, error.node) in unknown:
                raise
            unknown.append((error.op, error.node))
            continue
        ops = tuple(dict.fromkeys(op for op, _ in unknown))
        return Ends(session=session, names=names, lost=lost, ops=ops)


def _ends(
    graph: onnx.GraphProto, unknown: Iterable[Unknown]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tensors that replace the outputs, and the outputs that are lost."""
    outputs = [value.name for value in graph.output]
    needed = _needed(graph, outputs)
    varying = {value.name for value in graph.input} - {t.name for t in graph.initializer}
    lost: set[str] = set()
    ends: dict[str, None] = {}
    computed: set[str] = set()
    for node in _sorted(needed):
        reads = _reads(node)
        if lost & reads or any(_is_of(node, *one) for one in unknown):
            lost.update(node.output)
            others = sorted(reads - set(node.input))
            ends |= dict.fromkeys(n for n in (*node.input, *others) if n in computed)
        elif varying & reads:
            computed.update(n for n in node.output if n)
            varying.update(computed)
    kept = [name for name in outputs if name not in lost]
    names = tuple(dict.fromkeys([*kept, *(name for name in ends if name not in lost)]))
    return names, tuple(name for name in outputs if name in lost)


def _sorted(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes in topological order; nodes of a cycle are left out."""
    waiting = {name for node in nodes for name in node.output if name}
    while nodes:
        later = []
        for node in nodes:
            if waiting & _reads(node):
                later.append(node)
                continue
            yield node
            waiting.difference_update(node.output)
        if len(later) == len(nodes):
            return
        nodes = later


def _is_of(node: onnx.NodeProto, op: str, name: str | None) -> bool:
    """Whether a node, or a node in its subgraphs, is of the unknown op."""
    if node.op_type == op and name in (None, node.name):
        return True
    return any(_is_of(inner, op, name) for graph in _subgraphs(node) for inner in graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from subgraphs(attribute)


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, and those that occur in its subgraphs."""
    names = {name for name in node.input if name}
    for graph in _subgraphs(node):
        names.update(value.name for value in graph.output)
        for inner in graph.node:
            names |= _reads(inner)
    return names


def _needed(graph: onnx.GraphProto, names: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that these tensors depend on, in the order of the graph."""
    writers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    stack, found = list(names), set()
    while stack:
        index = writers.get(stack.pop())
        if index is not None and index not in found:
            found.add(index)
            stack += _reads(graph.node[index])
    return [node for index, node in enumerate(graph.node) if index in found]


def prune(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Make these tensors the outputs of a model, and remove everything that they do not need.

    The inputs stay, so that the model can be fed as before.
    """
    graph, names = model.graph, list(names)
    known = {value.name: value for value in (*graph.output, *graph.value_info)}
    outputs = [known.get(name, onnx.ValueInfoProto(name=name)) for name in names]
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in outputs]
    nodes = _needed(graph, names)
    if len(nodes) < len(graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        read = {name for node in kept for name in _reads(node)} | set(names)
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name not in read:
                del graph.initializer[index]
    del graph.output[:]
    graph.output.extend(outputs)


class TensorReader:
    """A session that returns tensors of a model by name, including inner ones.

    Nodes that these tensors do not need are not run, so onnxruntime may lack them.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; it is changed.
    names : iterable of str
        The tensors to read; they must not be graph inputs.
    optimization, threads, name, device
        As `onnxqat.runtime.open_session`.

    Raises
    ------
    ModelError
        onnxruntime refuses the remaining model, or lacks one of its ops.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        names: Iterable[str],
        *,
        optimization: Optimization,
        threads: int = 0,
        name: str = "the model",
        device: Device = CPU,
    ) -> None:
        self.names = list(names)
        prune(model, self.names)
        self.session: Session | None = None  # there are no tensors to read
        self._inputs = {value.name for value in model.graph.input}
        if not self.names:
            return
        try:
            self.session = open_session(
                model, optimization=optimization, threads=threads, name=name, device=device
            )
        except UnknownOpError as error:
            raise _before(model.graph, self.names, error) from error

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the tensors for one batch; unneeded inputs are ignored."""
        if self.session is None:
            return {}
        feeds = {name: values for name, values in inputs.items() if name in self._inputs}
        values = self.session.run_in_place(self.names, feeds)
        return dict(zip(self.names, values, strict=True))


def _before(graph: onnx.GraphProto, names: list[str], error: UnknownOpError) -> UnknownOpError:
    """Return an error that names a tensor behind the missing op."""
    for name in names:
        if any(_is_of(node, error.op, error.node) for node in _needed(graph, [name])):
            text = str(error).removesuffix(". Export without it.")
            return UnknownOpError(
                f"{text}, and '{name}' is computed behind it. Keep the tensors behind it float, as "
                "with --set 'between:A->B.quantize=false', or export without it.",
                error.op,
                error.node,
            )
    return error
