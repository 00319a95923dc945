"""Choose a step for each node or chain that the chip runs as one operation.

Nodes that the plan keeps in float, and nodes with an unquantized operand, run in float between
DequantizeLinear and QuantizeLinear. Other nodes run as the rule's ``[arithmetic]`` table says; an
operator that the table does not list is an error, since its arithmetic is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.attention import attention_steps, find_attention
from onnxqat.evaluation.integer.averages import build_mean, is_spatial
from onnxqat.evaluation.integer.context import (
    Context,
    FusedOp,
    Operand,
    fused_ops,
    is_bias,
    make_context,
)
from onnxqat.evaluation.integer.epilogue import has_only_limits, make_target
from onnxqat.evaluation.integer.grid import rounded_to_half
from onnxqat.evaluation.integer.hmx import concatenate_on_vectors
from onnxqat.evaluation.integer.kernels import (
    add,
    add_constant,
    change_scale,
    leaky_relu,
    multiply,
    multiply_constant,
)
from onnxqat.evaluation.integer.matrix import build_product
from onnxqat.evaluation.integer.steps import (
    ElementwiseStep,
    FloatStep,
    MoveStep,
    QuantizeStep,
    Step,
    TableStep,
    Target,
)
from onnxqat.nodes import input_role, is_float, keeps_grid
from onnxqat.operators import OPERATORS, WEIGHTED
from onnxqat.pairs import dequantized_name
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule

__all__ = ["build_steps"]

KEEPS_SIZE = "Abs"  # |qmin| may be qmax + 1: the step saturates it
# Ops that move values or choose among them.
MOVES = (*(op for op, facts in OPERATORS.items() if facts.movement), KEEPS_SIZE)
MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
ELEMENTWISE = ("Add", "Sub", "Mul")
REQUANTIZE = "Identity"  # stands for a requantization, see onnxqat.plan.requantization


def build_steps(model: QuantizedModel, rule: HardwareRule, *, threads: int = 0) -> list[Step]:
    """Return the steps of a calibrated or fine-tuned Q/DQ model, in the order to run them.

    Raises
    ------
    RuleError
        The arithmetic of the rule, or of an op in the model, is not documented.
    """
    arithmetic = rule.arithmetic
    if arithmetic is None or arithmetic.requantize == "unknown":
        raise RuleError(
            f"Rule {rule.name}: its integer arithmetic is unknown. Evaluate with --mode qdq, or "
            "write a rule that extends it with an [arithmetic] table."
        )
    context = make_context(model, rule, arithmetic, threads)
    steps: list[Step] = []
    written, halves = [t.name for t in context.graph.inputs], False
    groups = fused_ops(context, model.plan.chains)
    fused = _attention(context, groups)
    for group in [None, *groups]:
        if group is not None:
            step = fused.get(group.outputs[0]) or _build(context, group)
            steps.append(step)
            written = group.outputs if isinstance(step, FloatStep) else []
            halves = isinstance(step, FloatStep) and step.halves
        steps += (
            QuantizeStep(
                tensor=name, grid=context.grids[name], arithmetic=arithmetic, halves=halves
            )
            for name in written
            if name in context.grids
        )
    return steps


def _build(context: Context, group: FusedOp) -> Step:
    operands = context.operands(group)
    make = _choose(context, group, operands)
    try:
        return make(context, group, operands)
    except RuleError as error:
        if any(f"'{node.name}'" in str(error) for node in group.nodes):
            raise
        raise RuleError(f"Node '{group.nodes[0].name}' ({group.kind}): {error}") from error


def _attention(context: Context, groups: Sequence[FusedOp]) -> dict[str, Step]:
    """Return the steps of the attention blocks that the chip's compiler fuses, by output."""
    if not context.arithmetic.fused_attention:
        return {}
    blocks = find_attention(context, groups)
    return dict(step for block in blocks for step in attention_steps(context, block))


Maker = Callable[[Context, FusedOp, Sequence[Operand]], Step]


def _choose(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Maker:
    """Return the function that makes the step of a group."""
    arithmetic = context.arithmetic
    quantized = [o for o in operands if o.grid is not None]
    if all(n.name in context.float_nodes for n in group.nodes) or not quantized:
        return _float
    if any(_is_left_float(context, group, operand) for operand in operands):
        return _float
    if _is_move(context, group, quantized):
        return _move
    if group.kind in arithmetic.kept_float:
        return _float
    if group.kind in arithmetic.table and len({o.tensor for o in quantized}) == 1:
        return _table
    if group.kind not in arithmetic.integer or group.kind not in (*MEANS, *KERNELS):
        _refuse(context, group, f"the arithmetic of {group.kind} is unknown")
    if not has_only_limits(group, sums=_adds_to_sums(context, group)):
        _refuse(context, group, "its arithmetic fused with the ops that follow is unknown")
    if group.kind in MEANS:
        over_any_axes = arithmetic.requantize in ("gemmlowp", "qdm")
        return _average if over_any_axes or is_spatial(group.nodes[0]) else _float
    return KERNELS[group.kind]


def _is_left_float(context: Context, group: FusedOp, operand: Operand) -> bool:
    """Return whether an operand is unquantized data: not a parameter and not an int32 bias."""
    node = next(n for n in group.nodes if n.name == operand.node)
    if operand.grid is not None or not is_float(node.inputs[operand.index]):
        return False
    if (operand.node, operand.index) in context.biases:
        return False
    if input_role(node, operand.index) in ("setting", "slope"):
        return False
    if context.keeps_biases and is_bias(group, node, operand.index):
        return False
    # the constants of a pattern are part of the function that it computes
    return operand.values is None or group.kind in (*WEIGHTED, *ELEMENTWISE, *MOVES)


def _adds_to_sums(context: Context, group: FusedOp) -> bool:
    """Return whether the chip adds an activation to the sums of a convolution or product."""
    return group.kind in WEIGHTED and context.arithmetic.requantize == "two-shifts"


def _refuse(context: Context, group: FusedOp, what: str) -> NoReturn:
    raise RuleError(
        f"Rule {context.rule.name}: node '{group.nodes[0].name}' ({group.kind}): {what}. List it "
        "in a rule that extends this one, under [arithmetic], or keep the node float."
    )


def _is_move(context: Context, group: FusedOp, quantized: Sequence[Operand]) -> bool:
    """Return whether a group only moves integers of one grid, which is exact."""
    node = group.nodes[0]
    outputs = group.outputs
    if len(group.nodes) > 1 or not (keeps_grid(node) or node.op == KEEPS_SIZE):
        return False
    if not all(name in context.grids for name in outputs):
        return False
    return len({context.groups[n] for n in (*outputs, *(o.tensor for o in quantized))}) == 1


def _constants(operands: Sequence[Operand], *, centered: bool = False) -> dict[str, NDArray[Any]]:
    """Return the constants of a group by input name; quantized ones are rounded to their grid."""
    found: dict[str, NDArray[Any]] = {}
    for o in operands:
        if o.values is None:
            continue
        if o.grid is None:
            found[o.tensor] = o.values
            continue
        levels = o.grid.quantize(o.values, "half-even")
        values = o.grid.centered(levels) if centered else o.grid.dequantize(levels)
        found[dequantized_name(o.tensor)] = np.asarray(values, np.float32)
    return found


def _float(context: Context, group: FusedOp, operands: Sequence[Operand]) -> FloatStep:
    """Return the step of an op that the chip runs in float, see `Arithmetic.float_ops`."""
    constants = _constants(operands)
    if context.arithmetic.float_ops == "float16":
        narrow = {
            name: rounded_to_half(values) if values.dtype == np.float32 else values
            for name, values in constants.items()
        }
        if all(np.isfinite(values).all() for values in narrow.values()):
            return _exact(context, group, operands, narrow, halves=True)
    return _exact(context, group, operands, constants)


def _exact(
    context: Context,
    group: FusedOp,
    operands: Sequence[Operand],
    constants: dict[str, NDArray[Any]],
    *,
    halves: bool = False,
) -> FloatStep:
    """Return the step that runs a group in float32 with the given constants."""
    fed = [o for o in operands if o.values is None]
    return FloatStep(
        session=context.session(group, operands, constants),
        grids={o.tensor: o.grid for o in fed if o.grid is not None},
        floats=tuple(dict.fromkeys(o.tensor for o in fed if o.grid is None)),
        outputs=tuple(group.outputs),
        halves=halves,
    )


def _move(context: Context, group: FusedOp, operands: Sequence[Operand]) -> MoveStep:
    constants = _constants(operands, centered=True)
    fed = [o for o in operands if o.values is None]
    return MoveStep(
        session=context.session(group, operands, constants),
        grids={o.tensor: o.grid for o in fed if o.grid is not None},
        outputs={name: context.grids[name] for name in group.outputs},
        others=tuple(dict.fromkeys(o.tensor for o in fed if o.grid is None)),
    )


def _table(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Step:
    source = next(o for o in operands if o.grid is not None)
    (target,) = group.outputs
    if target not in context.grids:
        return _float(context, group, operands)
    step = _exact(context, group, operands, _constants(operands))
    grid = context.grids[source.tensor]
    if grid.spec.bits > 8 and context.arithmetic.requantize == "two-shifts":
        _refuse(context, group, "its table of 16-bit integers is unknown")
    low, high = grid.limits
    levels = np.arange(low, high + 1).astype(grid.params.zero_point.dtype)
    feeds = {dequantized_name(source.tensor): grid.dequantize(levels)}
    (values,) = step.session.run([target], feeds)
    if values.shape != levels.shape:
        _refuse(context, group, "it is not a function of a single value, so it has no table")
    table = context.grids[target].quantize_as(values, context.arithmetic)
    return TableStep(source=source.tensor, target=target, lowest=low, table=table)


def _average(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Step:
    target = make_target(context, group)
    if target is None:
        return _float(context, group, operands)
    return build_mean(context, group, operands, target)


def _elementwise(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Step:
    node, arithmetic = group.nodes[0], context.arithmetic
    pair = [o for o in operands if o.node == node.name]
    target = make_target(context, group)
    if target is None:
        return _float(context, group, operands)
    constant = next((o.values for o in pair if o.values is not None), None)
    if arithmetic.requantize == "qdm" and constant is not None:
        if node.op != "Mul" or constant.size > 1 or group.epilogue:
            _refuse(context, group, "the chip computes it with a constant in bfloat16")
        return _with_constant(context, pair, target, node.op)
    if arithmetic.rescaled_operands and constant is not None:
        return _with_constant(context, pair, target, node.op)
    grids = [context.grids[o.tensor] for o in pair]
    constants = {
        o.tensor: grid.quantize(o.values, "half-even")
        for o, grid in zip(pair, grids, strict=True)
        if o.values is not None
    }
    if node.op == "Mul":
        kernel = multiply(grids, target.grid, arithmetic)
    else:
        kernel = add(grids, target.grid, arithmetic, subtract=node.op == "Sub")
    sources = tuple(o.tensor for o in pair)
    return ElementwiseStep(sources=sources, constants=constants, kernel=kernel, target=target)


def _concatenate(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Step:
    target = make_target(context, group)
    if target is None:
        return _float(context, group, operands)
    if context.arithmetic.requantize != "hmx":
        _refuse(context, group, "its arithmetic from several grids to one is unknown")
    grids = [context.grids[o.tensor] for o in operands]
    constants = {
        o.tensor: grid.quantize(o.values, "half-even")
        for o, grid in zip(operands, grids, strict=True)
        if o.values is not None
    }
    return ElementwiseStep(
        sources=tuple(o.tensor for o in operands),
        constants=constants,
        kernel=concatenate_on_vectors(grids, target.grid, int(group.nodes[0].attrs["axis"])),
        target=target,
    )


def _with_constant(
    context: Context, pair: Sequence[Operand], target: Target, op: str
) -> ElementwiseStep:
    """Return the step of an Add, Sub or Mul whose constant the compiler folds into the scales."""
    fixed = 0 if pair[0].values is not None else 1
    source, constant, values = pair[1 - fixed].tensor, pair[fixed].tensor, pair[fixed].values
    assert values is not None
    own = context.grids[constant]  # strip writes constants rounded to their grid
    values = np.asarray(own.dequantize(own.quantize(values, "half-even")))
    grid, arithmetic = context.grids[source], context.arithmetic
    if op == "Mul":
        kernel = multiply_constant(grid, target.grid, arithmetic, values)
    else:
        signs = (1, -1 if op == "Sub" else 1)
        ordered = signs if fixed == 1 else signs[::-1]
        kernel = add_constant(grid, target.grid, arithmetic, values, signs=ordered)
    return ElementwiseStep(sources=(source,), constants={}, kernel=kernel, target=target)


def _requantize(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Step:
    (source,) = operands
    target = make_target(context, group)
    if target is None:
        return _float(context, group, operands)
    kernel = change_scale(context.grids[source.tensor], target.grid, context.arithmetic)
    return ElementwiseStep(sources=(source.tensor,), constants={}, kernel=kernel, target=target)


def _leaky_relu(context: Context, group: FusedOp, operands: Sequence[Operand]) -> Step:
    (source,) = operands
    target = make_target(context, group)
    shared = target and context.groups[target.tensor] == context.groups[source.tensor]
    if target is None or not (shared or context.arithmetic.requantize == "gemmlowp"):
        _refuse(context, group, "its arithmetic from one grid to another is unknown")
    alpha = float(group.nodes[0].attrs.get("alpha", 0.01))
    grid = context.grids[source.tensor]
    kernel = leaky_relu(grid, target.grid, context.arithmetic, alpha)
    return ElementwiseStep(sources=(source.tensor,), constants={}, kernel=kernel, target=target)


KERNELS: dict[str, Maker] = {
    **dict.fromkeys(WEIGHTED, build_product),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "Concat": _concatenate,
    "LeakyRelu": _leaky_relu,
    REQUANTIZE: _requantize,
}
