"""The command that runs job files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import print_table
from onnxqat.options import json_option
from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from onnxqat.jobs import Planned, Summary

__all__ = ["run"]


@click.command()
@click.argument("files", metavar="JOB.toml...", nargs=-1)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="How many jobs run at a time, each in a process of its own.",
)
@click.option(
    "-o", "--output", default="runs", show_default=True, help="Folder for the jobs' results."
)
@click.option(
    "--var",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of a variable of the job files; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Say what would run, and what is done already.")
@click.option(
    "--fast-test",
    is_flag=True,
    help="Send 30 samples through every stage, into folders of their own; judge no tolerance.",
)
@click.option("--force", is_flag=True, help="Run all stages again, also those that are done.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of job files, and end.")
@json_option
def run(files: tuple[str, ...], jobs: int, output: str, variables: tuple[str, ...], dry_run: bool,
        fast_test: bool, force: bool, schema: bool, as_json: bool) -> None:  # fmt: skip
    """Run job files: from a float model to what the chip's compiler reads.

    A finished stage is not run again, unless its model, data or options have changed.

    Example: onnxqat run scripts/examples/classifier.toml
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
        named = ", ".join(f"'{one.name}' {one.status}" for one in wrong[:3])
        raise click.ClickException(f"{len(wrong)} of {len(found.outcomes)} jobs: {named}.")


def _print_planned(planned: list[Planned], as_json: bool) -> None:
    if as_json:
        steps: list[dict[str, Any]] = [
            {"job": one.job, "step": one.step, "state": one.state} for one in planned
        ]
        say_document({"schema": "onnxqat.run-plan/1", "steps": steps})
        return
    print_table(("job", "step", "state"), [(one.job, one.step, one.state) for one in planned])


def _print_summary(found: Summary, as_json: bool) -> None:
    if as_json:
        say_document(found.document)
        return
    heads, *rows = found.rows
    print_table(heads, rows)
    for one in found.outcomes:
        for text in (one.message, *map(str, one.verdicts), *one.notes):
            if text:
                say(f"{one.name}: {text}")
    for path in found.files:
        say(f"written: {path}")
