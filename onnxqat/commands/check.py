"""The command ``check``: find what a chip cannot run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_overrides
from onnxqat.commands.common import counted, plan_document
from onnxqat.help_text import command
from onnxqat.options import json_option, rule_options, trainable_option
from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from onnxqat.plan import Skip
    from onnxqat.verbs import Check

__all__ = ["check"]


@command(example="onnxqat check model.onnx --rules sophgo-bm1684x --train")
@click.argument("model")
@rule_options
@trainable_option
@json_option
def check(model: str, rules: str, train: bool, as_json: bool, **options: Any) -> None:
    """Show which nodes of MODEL the chip cannot run or runs in float, and why."""
    from onnxqat import verbs

    found = verbs.check(model, rules=rules, overrides=take_overrides(options), train=train)
    if as_json:
        say_document(_document(found, train=train))
    else:
        _print_lines(found, train=train)
    if found.unsupported:
        raise click.ClickException(
            f"{counted(len(found.unsupported), 'node')} cannot run on {found.plan.rule}."
        )
    if found.names:
        raise click.ClickException(
            f"The table '{found.table}' cannot hold {counted(len(found.names), 'name')}. "
            "Rename these tensors, or pass --format onnxqat to insert and strip."
        )
    if found.untrainable:
        nodes = counted(len(found.untrainable), "node")
        raise click.ClickException(
            f"The model cannot be fine-tuned because of {nodes}. Keep earlier layers float "
            "(--set 'name:REGEX.quantize=false'), or rewrite the model."
        )


def _document(found: Check, *, train: bool) -> dict[str, Any]:
    document = {**plan_document(found.plan), "schema": "onnxqat.check/1"}
    document |= {"names": list(found.names), "advice": list(found.advice)}
    if train:
        document["untrainable"] = [node._asdict() for node in found.untrainable]
    return document


def _print_lines(found: Check, *, train: bool) -> None:
    _print_skips(found.plan.skips)
    for node in found.untrainable:
        say(f"untrainable  {node.op_type}  {node.node}: {node.reason}")
    for problem in found.names:
        say(f"name  {problem}")
    unsupported = len(found.unsupported)
    say(
        f"{len(found.plan.grid_points())} tensors quantized; "
        f"{len(found.plan.skips) - unsupported} nodes in float, {unsupported} unsupported"
        + (f", {len(found.untrainable)} without gradient" if train else "")
    )
    for line in found.advice:
        say(f"advice  {line}")


def _print_skips(skips: Iterable[Skip]) -> None:
    """Print one line for each op type and reason, unsupported ones first."""
    groups: dict[tuple[bool, str, str], list[str]] = {}
    for skip in skips:
        groups.setdefault((not skip.unsupported, skip.op_type, skip.reason), []).append(skip.node)
    rows = [("verdict", "op", "nodes", "first", "why")]
    for (is_float, op_type, reason), names in sorted(groups.items()):
        verdict = "float" if is_float else "unsupported"
        rows.append((verdict, op_type, str(len(names)), names[0], reason))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows if len(rows) > 1 else ():
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        say("  ".join((*cells, row[4])))
