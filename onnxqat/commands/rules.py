"""The commands ``rules list``, ``show``, ``validate`` and ``schema``."""

from __future__ import annotations

from typing import Any

import click

from onnxqat.commands.common import counted, print_result
from onnxqat.help_text import GroupedCommand
from onnxqat.options import json_option
from onnxqat.terminal import say, say_document

__all__ = ["rules"]


@click.group()
def rules() -> None:
    """Show and validate hardware rules."""


rules.command_class = GroupedCommand


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
@json_option
def rules_show(name: str, as_json: bool) -> None:
    """Print a rule and its sources."""
    import msgspec

    from onnxqat.rules import describe_rule, load_rule

    rule = load_rule(name)
    if as_json:
        say_document({"schema": "onnxqat.rule/1", **msgspec.to_builtins(rule)})
        return
    for line in describe_rule(rule).split("\n"):
        say(line)


@rules.command("validate")
@click.argument("file")
@json_option
def rules_validate(file: str, as_json: bool) -> None:
    """List all errors in a rule FILE, with line, key and advice."""
    from onnxqat.rules import validate_rule

    problems = validate_rule(file)
    document: dict[str, Any] = {"schema": "onnxqat.rules-validate/1", "problems": problems}
    rows = [("wrong", text) for text in problems] or [("valid", file)]
    print_result(document, as_json, rows)
    if problems:
        raise click.ClickException(f"{counted(len(problems), 'problem')} in {file}.")


@rules.command("schema")
def rules_schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    from onnxqat.rules import json_schema

    say_document(json_schema())
