"""Make the training form of a Q/DQ model: parameters become inputs, pairs become `FakeQuantize`.

The forward pass keeps the same values, bit for bit. A pair whose input already lies on the same
grid (behind a MaxPool, a Reshape, a Concat of one group ...) is the identity and is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxqat.calibration import placeholder_params
from onnxqat.computable import computable
from onnxqat.errors import ModelError, TrainingError
from onnxqat.gradients.reaching import leading_to
from onnxqat.model import Model
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.plan import QuantPlan
from onnxqat.qparams import FloatArray, Method
from onnxqat.quantized import QuantizedModel, insert_pairs
from onnxqat.train.adaround import AdaRound
from onnxqat.train.form_builder import FormBuilder, Untrainable, links
from onnxqat.train.lowering import with_steps
from onnxqat.train.trained import trained_initializers

__all__ = ["TrainingForm", "training_form", "untrainable_nodes"]

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # the most nodes that a message names


@dataclass(frozen=True, kw_only=True)
class TrainingForm:
    """A model whose parameters are inputs.

    Attributes
    ----------
    proto : onnx.ModelProto
        The graph. Inputs: the data, then weights and scales by name. Outputs: those of the model.
    weights : dict of str to float32 array
        The trained parameters except scales: weights, biases, normalization parameters. For a
        weight whose rounding is learned, the variables of the rounding.
    scales : dict of str to float32 array
        The scales, by `QuantPoint.parameters`; their inputs are named ``<parameters>/scale``.
    zero_points : dict of str to float32 array
        The trained zero points, named ``<parameters>/zero_point``; the forward pass rounds them.
    learned : frozenset of str
        The inputs that have gradients.
    frozen : frozenset of str
        The learned inputs that no step changes: their gradient is not computed, and is zero.
    observed : dict of str to tuple of str
        The activations whose range moves a clipping range, by `QuantPoint.parameters`; empty for
        weights.
    roundings : dict of str to AdaRound
        The weights whose rounding is learned, by name.
    """

    proto: onnx.ModelProto
    weights: dict[str, FloatArray]
    scales: dict[str, FloatArray]
    zero_points: dict[str, FloatArray]
    learned: frozenset[str]
    observed: dict[str, tuple[str, ...]]
    roundings: dict[str, AdaRound] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    @property
    def roles(self) -> dict[str, str]:
        """The parameters that are a ``scale`` or a ``zero_point``, by the input's name."""
        scales = {scale_name(name): "scale" for name in self.scales}
        return scales | {zero_point_name(name): "zero_point" for name in self.zero_points}

    def with_gradient(self, outputs: Collection[str]) -> dict[str, FloatArray]:
        """Return the parameters whose gradient a graph with these outputs has, or that is zero."""
        return {
            name: value
            for name, value in self.parameters.items()
            if f"{name}_grad" in outputs or name in self.frozen
        }

    @property
    def parameters(self) -> dict[str, FloatArray]:
        """All parameters that are inputs of the graph, by the input's name."""
        scales = {scale_name(name): scale for name, scale in self.scales.items()}
        zero_points = {zero_point_name(name): z for name, z in self.zero_points.items()}
        return self.weights | scales | zero_points


def training_form(
    model: QuantizedModel,
    *,
    method: Method = "lsq",
    read: str | None = None,
    asked: Collection[str] = (),
    adaround: bool = False,
) -> TrainingForm:
    """Return the training form of a Q/DQ model.

    Parameters
    ----------
    model : QuantizedModel
        The Q/DQ model. It is not changed.
    method : Method
        The method of points whose spec names none, see `onnxqat.train.fake_quantize`.
    read : str, optional
        A tensor that the loss reads (default: the first output).
    asked : collection of str
        Constants that the user wants to train, see `onnxqat.train.trained`.
    adaround : bool
        Whether weights that only their Q/DQ pair reads learn their rounding instead of values and
        scales, see `onnxqat.train.adaround`.

    Raises
    ------
    TrainingError
        An op between a parameter and an output has no correct gradient.
    """
    work, weights, builder = _build(model, method=method, read=read, asked=asked, adaround=adaround)
    if builder.refused:
        raise TrainingError(_refusal(builder.refused))
    work.metadata = {}
    proto = work.to_proto()
    proto.functions.extend(builder.functions)
    needed = {f.domain for f in builder.functions}
    needed |= {opset.domain for f in builder.functions for opset in f.opset_import}
    for domain in sorted(needed - {"", *(o.domain for o in proto.opset_import)}):
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    made = TrainingForm(
        proto=proto,
        weights=weights | {name: r.start() for name, r in builder.roundings.items()},
        scales={
            name: p.scale for name, p in builder.params.items() if name not in builder.roundings
        },
        zero_points={
            name: builder.params[name].zero_point.astype(np.float32) for name in builder.moving
        },
        learned=frozenset({*weights, *builder.learned}),
        observed={name: tuple(tensors) for name, tensors in builder.observed.items()},
        roundings=builder.roundings,
    )
    for name, value in made.parameters.items():
        if name not in weights:
            proto.graph.input.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
            )
    return made


def untrainable_nodes(model: Model, plan: QuantPlan) -> list[Untrainable]:
    """Return the nodes that prevent fine-tuning of a model with a plan; empty if there are none.

    Ops that onnxruntime lacks behind the last point are no obstacle: training ends before them.
    Nor are sequences of unknown length: fine-tuning takes the length of the data.

    Parameters
    ----------
    model : Model
        The prepared float model.
    plan : QuantPlan
        The plan of the model.
    """
    quantized = insert_pairs(model, plan, placeholder_params(model, plan), state="uncalibrated")
    with suppress(ModelError):  # if the model cannot run, its nodes are named below
        quantized = computable(quantized).model
        quantized = replace(quantized, floats=with_steps(quantized.floats, {}))
    return _build(quantized)[2].refused


def _refusal(nodes: list[Untrainable]) -> str:
    named = "; ".join(f"'{n.node}' ({n.op_type}: {n.reason})" for n in nodes[:MAX_NAMED])
    rest = len(nodes) - MAX_NAMED
    named += f"; and {rest} more, which 'onnxqat check --train' names" if rest > 0 else ""
    noun = "Node" if len(nodes) == 1 else f"{len(nodes)} nodes:"
    return (
        f"{noun} {named}. No gradient passes, so earlier layers cannot be trained. Keep these "
        "layers float (--set 'name:REGEX.quantize=false') or rewrite the model."
    )


def _build(
    model: QuantizedModel,
    *,
    method: Method = "lsq",
    read: str | None = None,
    asked: Collection[str] = (),
    adaround: bool = False,
) -> tuple[Model, dict[str, FloatArray], FormBuilder]:
    """Return the Q/DQ model with the graph of its training form, and its weights.

    Float weights before a node without a gradient are not trained: a user can exclude nodes from
    training by not quantizing them.
    """
    plan = model.plan
    names = trained_initializers(model.floats.graph, plan, asked)
    while True:
        work = model.qdq()
        weights = _make_inputs(work.graph, names)
        builder = FormBuilder(work.graph, model, set(weights), method, read)
        builder.rounded = weights if adaround else {}
        builder.run()
        before = _before(model.floats.graph, builder.refused) - {p.tensor for p in plan.points}
        if before.isdisjoint(names):
            return work, weights, builder
        logger.info(
            "Not trained, because they are float and '%s' behind them has no gradient: %s",
            builder.refused[0].node,
            ", ".join(name for name in names if name in before),
        )
        names = [name for name in names if name not in before]


def _before(graph: gs.Graph, refused: list[Untrainable]) -> set[str]:
    """Return the tensors that the refused nodes depend on."""
    stops = {node.node for node in refused}
    ends = (t.name for node in graph.nodes if node.name in stops for t in node.inputs)
    return leading_to(ends, links(graph), lambda _: True)


def _make_inputs(graph: gs.Graph, names: list[str]) -> dict[str, FloatArray]:
    """Turn initializers into graph inputs and return their values."""
    tensors = graph.tensors()
    values: dict[str, FloatArray] = {}
    for name in names:
        tensor = tensors[name]
        values[name] = np.array(tensor.values, np.float32, order="C")
        tensor.to_variable(np.float32, values[name].shape)
        tensor.type = "tensor_type"  # graphsurgeon's conversion does not set it
        graph.inputs.append(tensor)
    return values
