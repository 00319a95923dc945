"""The command ``report``: write a page about a Q/DQ model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_settings, take_source
from onnxqat.commands.common import listener_of, print_result
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.options import (
    data_options,
    force_option,
    json_option,
    metric_options,
    output_option,
    run_options,
    samples_option,
)

if TYPE_CHECKING:
    from onnxqat.quantized import QuantizedModel
    from onnxqat.reporting import Report

__all__ = ["report"]


@command(example="onnxqat report model.qat.onnx test.npz --against model.onnx --log run.jsonl")
@click.argument("model")
@click.argument("data", required=False)
@under("Contents")(
    "--log",
    metavar="FILE",
    help="Plot training loss and learning rate from this log of finetune --log.",
)
@under("Contents")(
    "--analysis",
    metavar="FILE",
    help="Show layers, tensors and histograms from this output of analyze --json.",
)
@under("Contents")(
    "--against",
    metavar="MODEL",
    help="Compare with this float model on DATA (default: the float part of MODEL, if training and "
    "repair left its weights unchanged).",
)
@under("Contents")(
    "--beside",
    multiple=True,
    metavar="MODEL",
    help="Compare with this Q/DQ model on DATA too, such as the one before training (repeatable).",
)
@under("Contents")(
    "--rules",
    metavar="FILE",
    help="Use this rule file for the integer mode on DATA (default: the bundled rule of MODEL).",
)
@metric_options
@samples_option
@data_options
@run_options(32)
@output_option("Write the HTML page here (default: MODEL with the suffix .html).")
@force_option
@json_option
def report(model: str, data: str | None, log: str | None, analysis: str | None,
           against: str | None, beside: tuple[str, ...], rules: str | None,
           output: str | None, force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Write an HTML page about a Q/DQ MODEL: its history, accuracy, losses and next steps.

    The figures of fine-tuning come from the history in MODEL. With DATA, the float model, MODEL and
    its integer mode are compared.
    """
    from onnxqat import verbs
    from onnxqat.files import check_writable
    from onnxqat.parallel import Workers
    from onnxqat.verbs.models import quantized_model

    if data is None and (against or beside or rules or options["metrics"]):
        raise click.UsageError("--against, --beside, --rules and --metric need DATA.")
    target = output or str(Path(model).with_suffix(".html"))
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    loaded = quantized_model(model)
    result = verbs.report(
        loaded,
        take_source(data, options),
        against=against,
        beside=beside,
        log=log,
        analysis=analysis,
        rules=rules,
        settings=take_settings(options),
        listener=listener_of(Workers()),
        **options,
    )
    result.save(target, force=force)
    _print_report(result, loaded, target, as_json)


def _print_report(result: Report, model: QuantizedModel, target: str, as_json: bool) -> None:
    from onnxqat.reporting import value_text

    document = {
        "schema": "onnxqat.report/1",
        "model": model.name,
        "state": model.state,
        "rule": model.plan.rule,
        **result.document(),
        "output": target,
    }
    rows: list[tuple[str, Any]] = []
    for one in result.comparisons[:1]:
        rows.append(("compared on", one.place))
        main = one.primary or ""
        rows += [(row.kind, f"{main} {value_text(main, row.figures.get(main))}" if row.figures
                  else row.note) for row in one.rows]  # fmt: skip
    rows += [("advice", step.text) for step in result.steps]
    print_result(document, as_json, [*rows, ("output", target)])
