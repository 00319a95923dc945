"""The command ``init``: write a first job file."""

from __future__ import annotations

import click

from onnxqat.commands.common import print_result
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.options import force_option, json_option, output_option

__all__ = ["init"]

_rule = under("Hardware rule")


@command(example="onnxqat init model.onnx data/ --rules sophgo-bm1684x -o job.toml")
@click.argument("model")
@click.argument("data")
@_rule(
    "--rules",
    required=True,
    help="Use a bundled rule (see 'onnxqat rules list') or your own .toml file.",
)
@output_option("Write the job file here (default: job.toml).")
@force_option
@json_option
def init(model: str, data: str, rules: str, output: str | None, force: bool, as_json: bool) -> None:
    """Write a first job file for MODEL and DATA, with comments that mark guesses."""
    from onnxqat.commands.common import listener_of
    from onnxqat.jobs.first import write_first_job
    from onnxqat.parallel import Workers

    target = output or "job.toml"
    check_apart({"output": target})
    hold(target)
    found = write_first_job(
        model, data, rules=rules, output=target, force=force, listener=listener_of(Workers())
    )
    document = {"schema": "onnxqat.init/1", "guesses": list(found.guesses), "output": target}
    rows = [*(("guess", text) for text in found.guesses), ("output", target)]
    print_result(document, as_json, rows)
