"""The command ``run``: run job files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import print_table
from onnxqat.help_text import command, under
from onnxqat.options import json_option
from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from onnxqat.jobs import Planned, Summary

__all__ = ["run"]

NAMED = 3  # jobs that the last line names

_run, _output = under("Run"), under("Output")


@command(example="onnxqat run scripts/examples/classifier.toml")
@click.argument("files", metavar="JOB.toml...", nargs=-1)
@_run(
    "--jobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Run this many jobs at the same time, each in a process of its own.",
)
@_run(
    "--var",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a variable of the job files (repeatable).",
)
@_run("--dry-run", is_flag=True, help="Print which steps would run and which are done; run none.")
@_run(
    "--fast-test",
    is_flag=True,
    help="Run every stage on 30 samples, in separate folders; do not check tolerances.",
)
@_output("-o", "--output", default="runs", show_default=True, help="Write the results here.")
@_output("--force", is_flag=True, help="Run all stages again, even finished ones.")
@_output("--schema", is_flag=True, help="Print the JSON Schema of job files, and exit.")
@json_option
def run(files: tuple[str, ...], jobs: int, output: str, variables: tuple[str, ...], dry_run: bool,
        fast_test: bool, force: bool, schema: bool, as_json: bool) -> None:  # fmt: skip
    """Run job files: from a float model to the files for the chip's compiler.

    A finished stage is not run again unless its model, data or options have changed.
    """
    from onnxqat.jobs import json_schema, plan_jobs, run_jobs
    from onnxqat.jobs.file import read_variable

    if schema:
        say_document(json_schema())
        return
    if not files:
        raise click.UsageError("Missing argument 'JOB.toml...'.")
    given = dict(map(read_variable, variables))
    if dry_run:
        _print_planned(plan_jobs(files, output=output, variables=given, fast=fast_test), as_json)
        return
    found = run_jobs(files, output=output, jobs=jobs, variables=given, fast=fast_test, again=force)
    _print_summary(found, as_json)
    if not found.passed:
        wrong = [one for one in found.outcomes if one.status != "done"]
        named = ", ".join(f"'{one.name}' {one.status}" for one in wrong[:NAMED])
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise click.ClickException(
            f"{len(wrong)} of {len(found.outcomes)} jobs did not succeed: {named}{more}."
        )


def _print_planned(planned: list[Planned], as_json: bool) -> None:
    if as_json:
        steps: list[dict[str, Any]] = [
            {"job": one.job, "step": one.step, "state": one.state} for one in planned
        ]
        say_document({"schema": "onnxqat.run-plan/1", "steps": steps})
        return
    print_table(("job", "step", "state"), [(one.job, one.step, one.state) for one in planned], 3)


def _print_summary(found: Summary, as_json: bool) -> None:
    if as_json:
        say_document(found.document)
        return
    heads, *rows = found.rows
    print_table(heads, rows, len(heads))
    for one in found.outcomes:
        for text in (one.message, *map(str, one.verdicts), *one.notes):
            if text:
                say(f"{one.name}: {text}")
    for path in found.files:
        say(f"written: {path}")
