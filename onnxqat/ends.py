"""As far as onnxruntime can run a model: the tensors that stand for outputs behind unknown ops.

A model may end in an op of another runtime, a TensorRT plugin for instance. Everything before it
runs; the tensors that such ops read are then what is compared, and what training looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.preserve import subgraphs
from onnxqat.runtime import Optimization, Session, UnknownOpError, open_session

__all__ = ["Ends", "TensorReader", "open_ends", "prune"]

Unknown = tuple[str, str | None]  # type of an op, and its node if others of the type run


@dataclass(frozen=True, kw_only=True)
class Ends:
    """A session of what onnxruntime can run of a model.

    Attributes
    ----------
    session : Session
        Its outputs are ``names``.
    names : tuple of str
        The outputs of the model that it computes, in order, and behind them the tensors that ops
        which it lacks read on the way to the others.
    lost : tuple of str
        The outputs that it cannot compute.
    ops : tuple of str
        The types of the ops that it lacks.
    """

    session: Session
    names: tuple[str, ...]
    lost: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()


def open_ends(
    make: Callable[[], onnx.ModelProto], *, optimization: Optimization, threads: int, name: str
) -> Ends:
    """Open a session of a model, or of what can be run of it.

    Parameters
    ----------
    make : callable
        Returns the model, each time anew.
    optimization, threads, name
        As `onnxqat.runtime.open_session`.

    Raises
    ------
    ModelError
        onnxruntime refuses the model, or an op that it lacks reads the model's inputs.
    """
    unknown: list[Unknown] = []
    while True:
        model = make()
        outputs = tuple(value.name for value in model.graph.output)
        names, lost = _ends(model.graph, unknown) if unknown else (outputs, ())
        if unknown and not names:
            raise ModelError(
                f"{name}: onnxruntime has no {unknown[-1][0]}, and computes nothing before it. "
                "Export without it."
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
    """Return what stands for the outputs, and the outputs that are lost."""
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
    """Yield the nodes, what writes a tensor before what reads it; those of a cycle never."""
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
    """Whether it is a node of an unknown op, or holds one in a subgraph."""
    if node.op_type == op and name in (None, node.name):
        return True
    return any(_is_of(inner, op, name) for graph in _subgraphs(node) for inner in graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from subgraphs(attribute)


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, and what its subgraphs name."""
    names = {name for name in node.input if name}
    for graph in _subgraphs(node):
        names.update(value.name for value in graph.output)
        for inner in graph.node:
            names |= _reads(inner)
    return names


def _needed(graph: onnx.GraphProto, names: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that some tensors depend on, in the order of the graph."""
    writers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    stack, found = list(names), set()
    while stack:
        index = writers.get(stack.pop())
        if index is not None and index not in found:
            found.add(index)
            stack += _reads(graph.node[index])
    return [node for index, node in enumerate(graph.node) if index in found]


def prune(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Make some tensors the outputs of a model, and take out what none of them needs.

    The inputs stay: they are what the model is fed.
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
    """A session that returns tensors of a model by name, inner ones too.

    What none of them needs is not run, and may be what onnxruntime cannot run.

    Parameters
    ----------
    model : onnx.ModelProto
        Taken over: it is changed.
    names : iterable of str
        What to read; a graph input is none of them.
    optimization, threads, name
        As `onnxqat.runtime.open_session`.

    Raises
    ------
    ModelError
        onnxruntime refuses what is left of the model, or lacks an op of it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        names: Iterable[str],
        *,
        optimization: Optimization,
        threads: int = 0,
        name: str = "the model",
    ) -> None:
        self.names = list(names)
        prune(model, self.names)
        self.session: Session | None = None  # nothing is read
        self._inputs = {value.name for value in model.graph.input}
        if not self.names:
            return
        try:
            self.session = open_session(
                model, optimization=optimization, threads=threads, name=name
            )
        except UnknownOpError as error:
            raise _before(model.graph, self.names, error) from error

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the tensors for one batch; inputs that none of them needs may be among these."""
        if self.session is None:
            return {}
        feeds = {name: values for name, values in inputs.items() if name in self._inputs}
        values = self.session.run_in_place(self.names, feeds)
        return dict(zip(self.names, values, strict=True))


def _before(graph: onnx.GraphProto, names: list[str], error: UnknownOpError) -> UnknownOpError:
    """Say which of the tensors lies behind the op."""
    for name in names:
        if any(_is_of(node, error.op, error.node) for node in _needed(graph, [name])):
            text = str(error).removesuffix(". Export without it.")
            return UnknownOpError(
                f"{text}, and '{name}' is computed behind it. Keep what follows it float, as with "
                "--set 'between:A->B.quantize=false', or export without it.",
                error.op,
                error.node,
            )
    return error
