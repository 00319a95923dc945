"""The commands that make a Q/DQ model: insert, calibrate, import-table, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import (
    calibrated,
    join,
    load_float,
    load_quantized,
    note,
    plan_document,
    planned,
    print_result,
    renamed,
    take_settings,
)
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.commands.repairing import Equalization, repairs
from onnxqat.options import (
    bias_correction_option,
    calibration_options,
    data_options,
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
    from collections.abc import Mapping

    from onnxqat.foreign import ForeignParams
    from onnxqat.model import Model
    from onnxqat.plan import QuantPlan
    from onnxqat.quantized import QuantizedModel

__all__ = ["calibrate", "export", "import_table", "insert"]


@click.command()
@click.argument("model")
@rule_options
@click.option("--data", help="Calibrate on this too; the scales are placeholders without.")
@click.option("--plan-only", is_flag=True, help="Print what would be quantized, and why.")
@click.option("--equalize", is_flag=True, help="First let channels have ranges alike.")
@relu6_option
@table_option
@calibration_options
@bias_correction_option
@data_options
@run_options(32)
@seed_option
@output_option("Q/DQ model; MODEL with .qdq before its suffix by default.")
@force_option
@json_option
def insert(model: str, rules: str, overrides: tuple[str, ...], overrides_file: str | None,
           data: str | None, plan_only: bool, equalize: bool, relu6: str,
           format_name: str | None, output: str | None,
           force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Insert Q/DQ pairs into MODEL as the rule says."""
    from onnxqat.files import check_writable
    from onnxqat.foreign import read_foreign_qdq
    from onnxqat.parallel import Workers
    from onnxqat.rules import load_rule
    from onnxqat.settings import settle

    _refuse_given("data", data, "observer", "samples", "layout", "skip_broken", "bias_correction")
    _refuse_given("equalize", equalize, "relu6")
    target = output or renamed(model, "qdq")
    workers = join() if data and not plan_only else Workers()
    if not plan_only:
        check_apart({"output": target})
        check_writable(target, force=force)
        hold(target if workers.rank == 0 else None)
    workers.any(False)  # all have looked before one writes
    floats, foreign = read_foreign_qdq(load_float(model))
    given = take_settings(options)
    settle(floats, given)  # now, before any work is done for settings that are wrong
    equalization = Equalization(relu6) if equalize else None
    prepared, plan = _repaired(floats, equalization, foreign, rules, overrides, overrides_file)
    if plan_only:
        if as_json:
            say_document(plan_document(plan))
        for line in () if as_json else plan.lines():
            say(line)
        return
    _refuse_names(prepared, plan, format_name or load_rule(rules).table)
    result = _inserted(prepared, plan, foreign)
    if equalization is not None:
        result = replace(result, source=equalization.source)
    if workers.rank == 0:
        _tell_of_repairs(equalization, prepared, plan, model)
    if data is not None:
        result, _ = calibrated(result, data, given, workers=workers, **options)
    if workers.rank == 0:
        result.save(target, force=force)
        _print_inserted(result.plan, result.state, target, as_json)
    workers.leave()


def _repaired(
    floats: Model,
    equalization: Equalization | None,
    foreign: Mapping[str, ForeignParams],
    *planning: Any,
) -> tuple[Model, QuantPlan]:
    """Prepare, equalize where it is asked for, and plan."""
    from onnxqat.errors import ModelError

    if equalization is None:
        return planned(floats, *planning)
    if foreign:
        raise ModelError(
            f"{floats.name}: holds Q/DQ pairs of another tool, whose scales would not fit the "
            "equalized weights. Leave --equalize out, or give the float model."
        )
    return planned(floats, *planning, repair=equalization)


def _tell_of_repairs(
    equalization: Equalization | None, prepared: Model, plan: QuantPlan, path: str
) -> None:
    """Say what equalization did, or that it is called for."""
    if equalization is not None:
        equalization.tell()
        return
    for line in repairs(prepared, plan, path):
        note(line)


def _refuse_names(prepared: Model, plan: QuantPlan, table: str | None) -> None:
    """Refuse now what `strip` could not write after the training."""
    from onnxqat.deploy import name_problems
    from onnxqat.formats.format import refuse

    refuse(
        name_problems(prepared, plan, table),
        f"The table '{table}' could not be read. Rename these in the model, or give insert and "
        "strip --format onnxqat, which holds any name",
    )


def _inserted(
    prepared: Model, plan: QuantPlan, foreign: Mapping[str, ForeignParams]
) -> QuantizedModel:
    """Insert the pairs, with the parameters of another tool where the model had some."""
    from onnxqat.calibration import placeholder_params, resolved_plan, without_large_biases
    from onnxqat.foreign import take_over
    from onnxqat.quantized import insert_pairs

    params = placeholder_params(prepared, plan)
    taken, ignored = take_over(plan, prepared.graph, foreign)
    missing = params.keys() - taken.keys()
    if not foreign:
        return insert_pairs(prepared, plan, params, state="uncalibrated")
    note(f"{len(taken)} of {len(params)} parameters are those of the model's pairs.")
    if missing:
        note(f"Calibration measures the others: {', '.join(sorted(missing))}.")
    if ignored:
        note(f"Pairs that do not fit the rule: {', '.join(ignored)}.")
    if missing:
        result = insert_pairs(prepared, plan, params | taken, state="uncalibrated")
        return replace(result, taken=tuple(sorted(taken)))
    plan = without_large_biases(resolved_plan(plan, taken), taken, prepared.graph.tensors())
    return insert_pairs(prepared, plan, taken, state="calibrated")


def _refuse_given(needed: str, given: Any, *names: str) -> None:
    """Refuse options that do nothing without another one."""
    ctx = click.get_current_context()
    for name in () if given else names:
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --{needed}.", ctx)


def _print_inserted(plan: QuantPlan, state: str, target: str, as_json: bool) -> None:
    counts = {role: sum(p.role == role for p in plan.points) for role in ("weight", "activation")}
    rows = [
        ("rule", plan.rule),
        ("weights", counts["weight"]),
        ("activations", counts["activation"]),
        ("left float", f"{len(plan.skips)} nodes (--plan-only says which, and why)"),
        ("state", state),
        ("output", target),
    ]
    print_result(plan_document(plan) | {"state": state, "output": target}, as_json, rows)


@click.command()
@click.argument("model")
@click.argument("data")
@calibration_options
@bias_correction_option
@data_options
@run_options(32)
@seed_option
@output_option("MODEL with .calibrated before its suffix by default.")
@force_option
@json_option
def calibrate(model: str, data: str, output: str | None, force: bool, as_json: bool,
              **options: Any) -> None:  # fmt: skip
    """Measure the scales of a Q/DQ MODEL on DATA."""
    from onnxqat.files import check_writable

    target = output or renamed(model, "calibrated")
    workers = join()
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target if workers.rank == 0 else None)
    workers.any(False)  # all have looked before one writes
    loaded = load_quantized(model)
    result, samples = calibrated(loaded, data, take_settings(options), workers=workers, **options)
    if workers.rank == 0:
        result.save(target, force=force)
        document = {"observer": options["observer"], "samples": samples, "output": target}
        print_result({"schema": "onnxqat.calibrate/1", **document}, as_json, list(document.items()))
    workers.leave()


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
def import_table(table: str, model: str, rules: str, overrides: tuple[str, ...],
                 overrides_file: str | None, format_name: str | None, output: str | None,
                 force: bool, as_json: bool) -> None:  # fmt: skip
    """Make a calibrated Q/DQ model from a calibration TABLE and its float MODEL."""
    from onnxqat.deploy import read_table
    from onnxqat.files import check_writable
    from onnxqat.quantized import insert_pairs

    target = output or renamed(model, "qdq")
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    prepared, plan = planned(load_float(model), rules, overrides, overrides_file)
    plan, params = read_table(table, prepared, plan, table=format_name)
    insert_pairs(prepared, plan, params, state="calibrated").save(target, force=force)
    document = {"parameters": len(params), "output": target}
    print_result({"schema": "onnxqat.import-table/1", **document}, as_json, list(document.items()))


@click.command()
@click.argument("model")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["onnxruntime", "openvino", "qoperator", "tensorrt"]),
    required=True,
    help="Integer weights behind Q/DQ, or in QLinear operators (qoperator); see docs/formats.md.",
)
@click.option("--int4", is_flag=True, help="Weights of 4 bits and fewer two to a byte (opset 21).")
@output_option("MODEL with .int8 before its suffix by default.")
@force_option
@json_option
def export(model: str, format_name: str, int4: bool, output: str | None, force: bool,
           as_json: bool) -> None:  # fmt: skip
    """Write a calibrated or fine-tuned Q/DQ MODEL with integer weights, for a runtime."""
    from onnxqat.files import check_writable
    from onnxqat.formats import EXPORTS, with_int4_weights

    if int4 and format_name == "qoperator":
        raise click.UsageError("--int4 needs Q/DQ; QLinear operators have no 4 bits.")
    target = output or renamed(model, "int8")
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    loaded = load_quantized(model)
    exported = EXPORTS[format_name](loaded)
    if int4:
        exported = with_int4_weights(exported, loaded.plan)
    exported.save(target, force=force)
    size = Path(target).stat().st_size
    document = {"format": format_name, "bytes": size, "output": target}
    print_result({"schema": "onnxqat.export/1", **document}, as_json, list(document.items()))
