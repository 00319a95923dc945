"""The commands that make a Q/DQ model: insert, calibrate, finetune, import-table."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import (
    calibrated,
    open_for,
    percentages,
    plan_document,
    planned,
    print_result,
    renamed,
    take_settings,
)
from onnxqat.options import (
    calibration_options,
    data_options,
    force_option,
    json_option,
    output_option,
    rule_options,
    run_options,
    seed_option,
    training_options,
)

if TYPE_CHECKING:
    from onnxqat.model import Model
    from onnxqat.plan import QuantPlan
    from onnxqat.settings import Settings
    from onnxqat.train import Config, Finetuned

__all__ = ["calibrate", "export", "finetune", "import_table", "insert"]


@click.command()
@click.argument("model")
@rule_options
@click.option("--data", help="Calibrate on this too; the scales are placeholders without.")
@click.option("--plan-only", is_flag=True, help="Print what would be quantized, and why.")
@calibration_options
@data_options
@run_options(32)
@seed_option
@output_option("Q/DQ model; MODEL with .qdq before its suffix by default.")
@force_option
@json_option
def insert(model: str, rules: str, overrides: tuple[str, ...], overrides_file: str | None,
           data: str | None, plan_only: bool, output: str | None, force: bool, as_json: bool,
           **options: Any) -> None:  # fmt: skip
    """Insert Q/DQ pairs into MODEL as the rule says."""
    from onnxqat.calibrate import placeholder_params
    from onnxqat.files import check_writable
    from onnxqat.insert import insert as insert_pairs
    from onnxqat.insert import plan_of
    from onnxqat.model import load_model, save_model
    from onnxqat.settings import settle

    if data is None:
        _refuse_given("observer", "samples", "layout")
    target = output or renamed(model, "qdq")
    if not plan_only:
        check_writable(target, force=force)
    prepared, plan = planned(load_model(model), rules, overrides, overrides_file)
    if plan_only:
        click.echo(json.dumps(plan_document(plan), indent=2) if as_json else str(plan))
        return
    result = insert_pairs(prepared, plan, placeholder_params(prepared, plan), state="uncalibrated")
    given = take_settings(options)
    settle(result, given)
    if data is not None:
        result, _ = calibrated(result, data, given, **options)
    save_model(result, target, force=force)
    _print_inserted(
        plan_of(result), "uncalibrated" if data is None else "calibrated", target, as_json
    )


def _refuse_given(*names: str) -> None:
    """Refuse options that do nothing without data."""
    ctx = click.get_current_context()
    for name in names:
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} needs --data.", ctx)


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
    from onnxqat.insert import plan_of
    from onnxqat.model import load_model, save_model

    target = output or renamed(model, "calibrated")
    check_writable(target, force=force)
    loaded = load_model(model)
    plan_of(loaded)
    result, samples = calibrated(loaded, data, take_settings(options), **options)
    save_model(result, target, force=force)
    document = {"observer": options["observer"], "samples": samples, "output": target}
    print_result({"schema": "onnxqat.calibrate/1", **document}, as_json, list(document.items()))


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("--val-data", help="Chooses the best state; 10 % of DATA by default.")
@click.option("--teacher", help="Float model to distil from; MODEL itself by default.")
@training_options
@calibration_options
@data_options
@run_options(16)
@seed_option
@output_option("MODEL with .qat before its suffix by default.")
@force_option
@json_option
def finetune(model: str, data: str, val_data: str | None, teacher: str | None,
             output: str | None, force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Fine-tune the weights and scales of a Q/DQ MODEL on DATA; calibrates first if needed."""
    from onnxqat.files import check_writable
    from onnxqat.insert import plan_of, state_of
    from onnxqat.model import load_model, save_model
    from onnxqat.train import DivergedError

    target = output or renamed(model, "qat")
    check_writable(target, force=force)
    loaded = load_model(model)
    plan_of(loaded)
    taught_by = _teacher(teacher, loaded) if teacher else None
    given, layout = take_settings(options), options.pop("layout")
    calibration = {name: options.pop(name) for name in ("observer", "samples")}
    config = _config(options)
    if state_of(loaded) == "uncalibrated":
        shared = {name: getattr(config, name) for name in ("batch_size", "seed", "threads")}
        loaded, _ = calibrated(loaded, data, given, layout=layout, **calibration, **shared)
    try:
        result = _tuned(loaded, data, val_data, given, taught_by, config, layout)
    except DivergedError as error:
        save_model(error.best, target, force=force)
        raise click.ClickException(f"{error} Written to {target}.") from error
    save_model(result.model, target, force=force)
    _print_finetuned(result, target, as_json)


def _teacher(path: str, student: Model) -> Model:
    """Load and prepare the float model that teaches."""
    from onnxqat.errors import ModelError
    from onnxqat.evaluate import check_interface
    from onnxqat.insert import PLAN_KEY
    from onnxqat.model import load_model
    from onnxqat.prepare import prepare

    teacher = load_model(path)
    if PLAN_KEY in teacher.metadata:
        raise ModelError(f"{path}: holds Q/DQ pairs. Give a float model as --teacher.")
    check_interface(student, teacher, output_names=True)
    return prepare(teacher)


def _config(options: dict[str, Any]) -> Config:
    """Return the hyper-parameters: defaults where an option was not given."""
    from onnxqat.train import Config

    return Config(**{name: value for name, value in options.items() if value is not None})


def _tuned(model: Model, data: str, val_data: str | None, given: Settings, teacher: Model | None,
           config: Config, layout: Any) -> Finetuned:  # fmt: skip
    """Open the data and fine-tune on them."""
    from onnxqat.progress import FinetuneReport
    from onnxqat.train import finetune as run

    def opened(source: str) -> Any:
        return open_for(model, source, given, layout=layout, batch_size=config.batch_size)

    with ExitStack() as stack:
        training = stack.enter_context(opened(data))
        validation = stack.enter_context(opened(val_data)) if val_data else None
        report = stack.enter_context(FinetuneReport())
        return run(
            model, training, validation=validation, teacher=teacher, config=config, report=report
        )


def _print_finetuned(result: Finetuned, target: str, as_json: bool) -> None:
    def figures(evaluation: Any) -> dict[str, float]:
        found = {**evaluation.metrics, "agreement": evaluation.agreement}
        return {name: value for name, value in found.items() if value is not None}

    before, after = figures(result.before), figures(result.after)
    document = {
        "schema": "onnxqat.finetune/1",
        "before": before,
        "after": after,
        "samples": result.after.samples,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 1),
        "notes": list(result.notes),
        "output": target,
    }
    rows: list[tuple[str, Any]] = [(f"{k} before", v) for k, v in percentages(before)]
    rows += [(f"{k} after", v) for k, v in percentages(after)]
    rows += [
        ("held-out samples", result.after.samples),
        ("epochs", f"{result.epochs}, best {result.best_epoch}"),
        ("seconds", document["seconds"]),
        *(("note", note) for note in result.notes),
        ("output", target),
    ]
    print_result(document, as_json, rows)


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
    from onnxqat.insert import insert as insert_pairs
    from onnxqat.model import load_model, save_model

    target = output or renamed(model, "qdq")
    check_writable(target, force=force)
    prepared, plan = planned(load_model(model), rules, overrides, overrides_file)
    plan, params = read_table(table, prepared, plan, table=format_name)
    save_model(insert_pairs(prepared, plan, params, state="calibrated"), target, force=force)
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
@output_option("MODEL with .int8 before its suffix by default.")
@force_option
@json_option
def export(model: str, format_name: str, output: str | None, force: bool,
           as_json: bool) -> None:  # fmt: skip
    """Write a calibrated or fine-tuned Q/DQ MODEL with integer weights, for a runtime."""
    from onnxqat.files import check_writable
    from onnxqat.formats import EXPORTS
    from onnxqat.model import load_model, save_model

    target = output or renamed(model, "int8")
    check_writable(target, force=force)
    save_model(EXPORTS[format_name](load_model(model)), target, force=force)
    size = Path(target).stat().st_size
    document = {"format": format_name, "bytes": size, "output": target}
    print_result({"schema": "onnxqat.export/1", **document}, as_json, list(document.items()))
