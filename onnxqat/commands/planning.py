"""The commands that look at rules and plans, and make nothing: check, rules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import plan_document, planned, print_result
from onnxqat.commands.repairing import repairs
from onnxqat.options import json_option, rule_options
from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from onnxqat.plan import Skip

__all__ = ["check", "rules"]


@click.command()
@click.argument("model")
@rule_options
@click.option("--train", is_flag=True, help="Also say which nodes keep it from being fine-tuned.")
@json_option
def check(model: str, rules: str, overrides: tuple[str, ...], overrides_file: str | None,
          train: bool, as_json: bool) -> None:  # fmt: skip
    """Say what of MODEL the chip cannot run, or runs in float, and why."""
    from onnxqat.deploy import name_problems
    from onnxqat.foreign import read_foreign_qdq
    from onnxqat.model import load_model
    from onnxqat.rules import load_rule

    floats, _ = read_foreign_qdq(load_model(model))
    prepared, plan = planned(floats, rules, overrides, overrides_file)
    unsupported = sum(skip.unsupported for skip in plan.skips)
    table = load_rule(rules).table
    names = name_problems(prepared, plan, table)
    advice = repairs(prepared, plan, model)
    document = {**plan_document(plan), "schema": "onnxqat.check/1", "names": names}
    document["advice"] = advice
    untrainable: list[dict[str, str]] = []
    if train:
        from onnxqat.train import untrainable_nodes

        untrainable = [node._asdict() for node in untrainable_nodes(prepared, plan)]
        document["untrainable"] = untrainable
    if as_json:
        say_document(document)
    else:
        _print_skips(plan.skips)
        for node in untrainable:
            say("untrainable  {op_type}  {node}: {reason}".format(**node))
        for problem in names:
            say(f"name  {problem}")
        say(
            f"{len(plan.grid_points())} tensors quantized; {len(plan.skips) - unsupported} nodes "
            f"in float, {unsupported} unsupported"
            + (f", {len(untrainable)} without gradient" if train else "")
        )
        for line in advice:
            say(f"advice  {line}")
    if unsupported:
        raise click.ClickException(f"{unsupported} nodes cannot run on {plan.rule}.")
    if names:
        raise click.ClickException(
            f"{len(names)} names cannot stand in the table '{table}'. Rename them, or give insert "
            "and strip --format onnxqat."
        )
    if untrainable:
        raise click.ClickException(f"{len(untrainable)} nodes keep it from being fine-tuned.")


def _print_skips(skips: Iterable[Skip]) -> None:
    """Print one line for each op type and reason, the unsupported ones first."""
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


@click.group()
def rules() -> None:
    """Show and validate hardware rules."""


@rules.command("list")
@json_option
def rules_list(as_json: bool) -> None:
    """List the bundled rules."""
    from onnxqat.rules import bundled_rules, load_rule

    found = [load_rule(name) for name in bundled_rules()]
    entries = [{"name": r.name, "vendor": r.vendor, "summary": r.summary} for r in found]
    document = {"schema": "onnxqat.rules/1", "rules": entries}
    print_result(document, as_json, [(r.name, r.summary) for r in found])


@rules.command("show")
@click.argument("name")
def rules_show(name: str) -> None:
    """Print what a rule says, and where it was read."""
    from onnxqat.rules import describe_rule, load_rule

    for line in describe_rule(load_rule(name)).split("\n"):
        say(line)


@rules.command("validate")
@click.argument("file")
@json_option
def rules_validate(file: str, as_json: bool) -> None:
    """Say everything that is wrong in a rule FILE: line, key and advice."""
    from onnxqat.rules import validate_rule

    problems = validate_rule(file)
    document: dict[str, Any] = {"schema": "onnxqat.rules-validate/1", "problems": problems}
    rows = [("wrong", text) for text in problems] or [("valid", file)]
    print_result(document, as_json, rows)
    if problems:
        raise click.ClickException(f"{len(problems)} problems in {file}.")


@rules.command("schema")
def rules_schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    from onnxqat.rules import json_schema

    say_document(json_schema())
