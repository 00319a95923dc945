"""The command that reads a calibration table."""

from __future__ import annotations

from typing import Any

import click

from onnxqat.arguments import take_overrides
from onnxqat.commands.common import print_result, renamed
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.options import force_option, json_option, output_option, rule_options

__all__ = ["import_table"]


@click.command("import-table")
@click.argument("table")
@click.argument("model")
@rule_options
@click.option(
    "--format",
    "format_name",
    metavar="NAME",
    help="What TABLE is, see docs/formats.md; the rule's own by default.",
)
@output_option("Q/DQ model; MODEL with .qdq before its suffix by default.")
@force_option
@json_option
def import_table(table: str, model: str, rules: str, format_name: str | None, output: str | None,
                 force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Make a calibrated Q/DQ model from a calibration TABLE and its float MODEL."""
    from onnxqat import verbs
    from onnxqat.files import check_writable

    target = output or renamed(model, "qdq")
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    result = verbs.import_table(
        table, model, rules=rules, overrides=take_overrides(options), format_name=format_name
    )
    result.save(target, force=force)
    document = {"parameters": len(result.params), "output": target}
    print_result({"schema": "onnxqat.import-table/1", **document}, as_json, list(document.items()))
