"""The command that shows how a fine-tuning went: report."""

from __future__ import annotations

from pathlib import Path

import click

from onnxqat.commands.common import print_result
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command
from onnxqat.options import force_option, json_option, output_option

__all__ = ["report"]


@command(example="onnxqat report run.jsonl -o run.html")
@click.argument("log")
@output_option("Write the HTML page here (default: LOG with the suffix .html).")
@force_option
@json_option
def report(log: str, output: str | None, force: bool, as_json: bool) -> None:
    """Draw the curves of a fine-tuning from the LOG that --log FILE.jsonl wrote."""
    from onnxqat.files import check_writable
    from onnxqat.train import check_plotting, read_log, write_report

    target = output or str(Path(log).with_suffix(".html"))
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    check_plotting()
    events = read_log(log)
    write_report(target, events, title=Path(log).name, force=force)
    document = {"steps": events[-1].step, "output": target}
    print_result({"schema": "onnxqat.report/1", **document}, as_json, list(document.items()))
