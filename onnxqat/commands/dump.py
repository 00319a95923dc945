"""The commands ``dump`` and ``compare-dumps``: write and compare the tensors of a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_settings, take_source
from onnxqat.commands.common import listener_of, print_result, print_table
from onnxqat.commands.outputs import check_apart
from onnxqat.help_text import command, under
from onnxqat.json_values import json_value
from onnxqat.options import data_options, force_option, json_option, mode_options
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.analysis import Comparison, TensorDifference

__all__ = ["compare_dumps", "dump"]


@command(example="onnxqat dump model.qdq.onnx images/ --mode integer --samples 4 -o dump")
@click.argument("model")
@click.argument("data")
@under("Output")(
    "-o", "--output", required=True, metavar="DIR", help="Write one folder per sample into DIR."
)
@mode_options("Dump")
@under("Dump")(
    "--level",
    type=click.Choice(["0", "1", "2"]),
    default="2",
    show_default=True,
    help="Write the first values of each tensor (0), the sums of its values and of their "
    "magnitudes (1), or all its values (2).",
)
@under("Dump")(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Run the first N samples, one by one.",
)
@data_options
@under("Running")(
    "--threads",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Use N threads (default 0: all cores).",
)
@force_option
@json_option
def dump(model: str, data: str, output: str, level: str, force: bool, as_json: bool,
         **options: Any) -> None:  # fmt: skip
    """Write the tensors of MODEL on the first samples of DATA, as .npz files."""
    from onnxqat import verbs
    from onnxqat.parallel import Workers

    check_apart({"output": output})
    source, settings = take_source(data, options), take_settings(options)
    count = verbs.dump(
        model,
        source,
        output,
        level=int(level),  # type: ignore[arg-type]
        force=force,
        settings=settings,
        listener=listener_of(Workers()),
        **options,
    )
    document = {
        "schema": "onnxqat.dump/1",
        "mode": options["mode"],
        "level": int(level),
        "samples": count,
        "output": output,
    }
    rows = [(name, document[name]) for name in ("mode", "level", "samples", "output")]
    print_result(document, as_json, rows)


@command("compare-dumps", example="onnxqat compare-dumps integer-dump float-dump --min-cosine 0.99")
@click.argument("dump")
@click.argument("reference")
@under("Tolerances")(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    default=0.99,
    show_default=True,
    help="Exit with 1 if the cosine of a tensor is lower than this.",
)
@under("Tolerances")(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Exit with 1 if the SQNR of a tensor is lower than this.",
)
@under("Tolerances")(
    "--max-diff",
    type=click.FloatRange(0),
    help="Exit with 1 if a value differs by more than this.",
)
@json_option
def compare_dumps(dump: str, reference: str, as_json: bool, **tolerances: Any) -> None:
    """Compare the tensors of DUMP with those of REFERENCE: folders of dumps, or .npz files."""
    from onnxqat import verbs

    found = verbs.compare_dumps(dump, reference, **tolerances)
    failed = [one for one in found.tensors if not one.passed]
    document = {
        "schema": "onnxqat.compare-dumps/1",
        "samples": found.samples,
        "passed": found.passed,
        "tensors": json_value(found.tensors),
        "missing": list(found.missing),
        "more": list(found.more),
    }
    rows = [
        ("samples", found.samples),
        ("tensors", f"{len(found.tensors)} compared, {len(failed)} outside the tolerances"),
    ]
    print_result(document, as_json, rows)
    if not as_json:
        _print_tensors(found)
    if failed:
        raise click.ClickException(
            f"The tolerances are not met by {len(failed)} of {len(found.tensors)} tensors; the "
            f"first one is '{failed[0].tensor}'."
        )


def _print_tensors(found: Comparison) -> None:
    """Print the difference of each tensor, and the tensors that only one dump has."""

    def row(one: TensorDifference) -> tuple[str, ...]:
        verdict = "" if one.passed else "FAILED"
        if one.shapes is not None:
            ours, theirs = one.shapes
            return (one.tensor, "-", "-", "-", f"{verdict}: shape {ours}, reference {theirs}")
        sqnr = "equal" if one.sqnr == math.inf else f"{one.sqnr:.1f} dB"
        return (one.tensor, f"{one.cosine:.6f}", sqnr, f"{one.max_abs_diff:.4g}", verdict)

    say("")
    print_table(("tensor", "cosine", "SQNR", "max diff", ""), map(row, found.tensors), 1)
    for name, keys in (("only in REFERENCE", found.missing), ("only in DUMP", found.more)):
        if keys:
            say("")
            say(f"{name}: {', '.join(keys)}")
