"""The command ``import-table``: read a calibration table."""

from __future__ import annotations

from typing import Any

import click

from onnxqat.arguments import take_overrides
from onnxqat.commands.common import print_result, renamed
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.options import force_option, json_option, output_option, rule_options

__all__ = ["import_table"]


@command(
    "import-table",
    example="onnxqat import-table model_cali_table model.onnx --rules sophgo-bm1684x",
)
@click.argument("table")
@click.argument("model")
@rule_options
@under("Hardware rule")(
    "--format",
    "format_name",
    metavar="NAME",
    help="Read TABLE in this format; see docs/formats.md (default: the rule's own).",
)
@output_option("Write the Q/DQ model here (default: MODEL with .qdq before its suffix).")
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
