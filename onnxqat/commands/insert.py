"""The command ``insert``: insert Q/DQ pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_calibration, take_overrides, take_settings, take_source
from onnxqat.commands.common import (
    counts,
    join,
    listener_of,
    plan_document,
    print_result,
    renamed,
)
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.options import (
    bias_correction_option,
    calibration_options,
    data_options,
    device_options,
    equalize_option,
    force_option,
    json_option,
    output_option,
    relu6_option,
    rule_options,
    run_options,
    seed_option,
    table_option,
)
from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from onnxqat.plan import QuantPlan
    from onnxqat.quantized import QuantizedModel

__all__ = ["insert"]


@command(
    example="onnxqat insert model.onnx --rules sophgo-bm1684x --data images/ -o model.qdq.onnx"
)
@click.argument("model")
@rule_options
@under("Calibration")(
    "--data", metavar="DATA", help="Calibrate on DATA (default: leave placeholder scales)."
)
@under("Hardware rule")(
    "--plan-only",
    is_flag=True,
    help="Print which tensors would be quantized, and why; write nothing.",
)
@equalize_option
@relu6_option
@table_option
@calibration_options
@bias_correction_option
@data_options
@run_options(32)
@device_options("auto")
@seed_option
@output_option("Write the Q/DQ model here (default: MODEL with .qdq before its suffix).")
@force_option
@json_option
def insert(model: str, rules: str, data: str | None, plan_only: bool, equalize: bool, relu6: Any,
           format_name: str | None, output: str | None, force: bool, as_json: bool,
           **options: Any) -> None:  # fmt: skip
    """Insert Q/DQ pairs into MODEL according to a hardware rule."""
    from onnxqat import verbs
    from onnxqat.files import check_writable
    from onnxqat.parallel import Workers

    _refuse_given(
        "data", data, "observer", "samples", "layout", "split", "skip_broken", "bias_correction"
    )
    _refuse_given("equalize", equalize, "relu6")
    target = output or renamed(model, "qdq")
    workers = join() if data and not plan_only else Workers()
    if not plan_only:
        check_apart({"output": target})
        check_writable(target, force=force)
        hold(target if workers.rank == 0 else None)
    workers.any(False)  # wait until all processes have checked the files
    overrides, settings = take_overrides(options), take_settings(options)
    if plan_only:
        plan = verbs.plan(
            model,
            rules=rules,
            overrides=overrides,
            settings=settings,
            equalize=equalize,
            relu6=relu6,
        )
        _print_plan(plan, as_json)
        return
    result = verbs.insert(
        model,
        rules=rules,
        overrides=overrides,
        data=take_source(data, options),
        settings=settings,
        calibration=take_calibration(options),
        equalize=equalize,
        relu6=relu6,
        format_name=format_name,
        listener=listener_of(workers),
        workers=workers,
    )
    if workers.rank == 0:
        result.save(target, force=force)
        _print_inserted(result, target, as_json)
    workers.leave()


def _refuse_given(needed: str, given: Any, *names: str) -> None:
    """Refuse options that have no effect without another option."""
    ctx = click.get_current_context()
    for name in () if given else names:
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --{needed}.", ctx)


def _print_plan(plan: QuantPlan, as_json: bool) -> None:
    if as_json:
        say_document(plan_document(plan))
        return
    for line in plan.lines():
        say(line)


def _print_inserted(model: QuantizedModel, target: str, as_json: bool) -> None:
    plan, state = model.plan, model.state
    rows = [
        ("rule", plan.rule),
        *counts(plan).items(),
        ("left float", f"{len(plan.skips)} nodes (--plan-only lists them, with reasons)"),
        ("state", state),
        ("output", target),
    ]
    print_result(plan_document(plan) | {"state": state, "output": target}, as_json, rows)
