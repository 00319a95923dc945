"""The command line: parse, call, print. No arithmetic.

Results go to stdout, logs and progress to stderr. Heavy modules are imported inside the
commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.errors import OnnxQatError

if TYPE_CHECKING:
    from onnxqat.data import DataSet
    from onnxqat.model import Model
    from onnxqat.settings import Settings

__all__ = ["main"]


class Group(click.Group):
    """A group whose commands turn our errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except OnnxQatError as error:
            if ctx.params.get("verbose", 0) > 1:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error
        except MemoryError as error:
            raise click.ClickException("Out of memory. Try a smaller --batch-size.") from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxqat")
@click.option("-v", "--verbose", count=True, help="Say more; twice shows tracebacks.")
def main(verbose: int) -> None:
    """Quantization-aware training for an exported ONNX model."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)


Command = Callable[..., None]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator for several options."""
    return lambda command: functools.reduce(lambda c, o: o(c), reversed(options), command)


def _floats(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``1,2,3``."""
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,2,3") from error


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``height,width``."""
    numbers = _floats(_ctx, _param, value)
    if numbers is None:
        return None
    if len(numbers) != 2 or any(n < 1 or n != int(n) for n in numbers):
        raise click.BadParameter(f"'{value}' is not height,width such as 224,224")
    return int(numbers[0]), int(numbers[1])


def _pairs(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> Any:
    """Read repeated ``NAME=ARRAY``."""
    if not all("=" in item for item in value):
        raise click.BadParameter("is not of the form INPUT=ARRAY")
    return dict(item.split("=", 1) for item in value) or None


data_options = _options(
    click.option("--mean", callback=_floats, help="Per channel: x = (x - mean) * scale."),
    click.option("--scale", callback=_floats, help="Per channel, see --mean."),
    click.option("--resize-dims", callback=_size, help="height,width images are resized to."),
    click.option("--crop", callback=_size, help="height,width of the centre crop."),
    click.option("--keep-aspect-ratio", is_flag=True, default=None, help="Letterbox."),
    click.option("--pad-value", type=float, help="Pixel value around a letterboxed image."),
    click.option("--pixel-format", type=click.Choice(["rgb", "bgr", "gray"])),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), help="Of the data arrays."),
    click.option("--label", help="Name of the label array."),
    click.option("--input", "input_map", multiple=True, callback=_pairs, help="INPUT=ARRAY."),
)
run_options = _options(
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
    click.option("--threads", type=click.IntRange(0), default=0, help="0: all cores."),
)
calibration_options = _options(
    click.option(
        "--observer",
        type=click.Choice(["mse", "minmax", "moving-average", "percentile"]),
        default="mse",
        show_default=True,
        help="How a clipping range is chosen.",
    ),
    click.option("--samples", type=click.IntRange(1), default=512, show_default=True,
                 help="How many samples calibrate."),
)  # fmt: skip
rule_options = _options(
    click.option("--rules", default="onnxruntime-cpu", show_default=True,
                 help="A bundled rule (see 'rules list') or a .toml file."),
    click.option("--set", "overrides", multiple=True, metavar="SELECTOR.KEY=VALUE",
                 help="Override the rule, as in weight.bits=4; repeatable, later wins."),
)  # fmt: skip
seed_option = click.option("--seed", default=0, show_default=True, help="Of every random choice.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def output_option(help_text: str) -> Callable[[Command], Command]:
    """Return the ``-o`` option."""
    return click.option("-o", "--output", help=help_text)


def _settings(options: dict[str, Any]) -> Settings:
    """Take the data options out of a command's arguments."""
    from onnxqat.settings import Settings

    names = [name for name in Settings.__struct_fields__ if name in options]
    return Settings(**{name: options.pop(name) for name in names})


def _open(model: Model, source: str, given: Settings) -> DataSet:
    """Open a data source for a model, and store what was said about it in the model."""
    from onnxqat.data import open_data
    from onnxqat.settings import Settings, input_specs, settle

    settings = settle(model, given)
    data = open_data(
        source,
        input_specs(model),
        preprocessing=settings.preprocessing(),
        label=settings.label,
        input_map=settings.input_map,
    )
    settle(model, Settings(classes=data.classes))
    return data


def _print(document: dict[str, Any], as_json: bool, rows: list[tuple[str, Any]]) -> None:
    """Print the result: a JSON document, or a short table."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _percent(metrics: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{100 * value:.2f} %") for name, value in metrics.items()]


def _renamed(path: str, word: str) -> str:
    """Return ``model.onnx`` -> ``model.<word>.onnx``; an earlier stage's word is replaced."""
    name = Path(path)
    stem = name.stem
    for earlier in (".qdq", ".calibrated"):
        stem = stem.removesuffix(earlier)
    return str(name.with_name(f"{stem}.{word}.onnx"))


@main.command()
@click.argument("model")
@rule_options
@click.option("--data", help="Calibrate on this too; the scales are placeholders without.")
@click.option("--plan-only", is_flag=True, help="Print what would be quantized, and why.")
@calibration_options
@data_options
@run_options
@seed_option
@output_option("Q/DQ model; MODEL with .qdq before its suffix by default.")
@force_option
@json_option
def insert(model: str, rules: str, overrides: tuple[str, ...], data: str | None, plan_only: bool,
           output: str | None, force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Insert Q/DQ pairs into MODEL as the rule says."""
    from onnxqat.calibrate import placeholder_params
    from onnxqat.files import check_writable
    from onnxqat.insert import insert as insert_pairs
    from onnxqat.model import load_model, save_model

    target = output or _renamed(model, "qdq")
    if not plan_only:
        check_writable(target, force=force)
    prepared, plan = _planned(load_model(model), rules, overrides)
    document = _plan_document(plan)
    if plan_only:
        click.echo(json.dumps(document, indent=2) if as_json else str(plan))
        return
    result = insert_pairs(prepared, plan, placeholder_params(prepared, plan), state="uncalibrated")
    given = _settings(options)
    if data is not None:
        result = _calibrated(result, data, given, **options)
    save_model(result, target, force=force)
    state = "calibrated" if data is not None else "uncalibrated"
    counts = {role: sum(p.role == role for p in plan.points) for role in ("weight", "activation")}
    rows = [
        ("rule", plan.rule),
        ("weights", counts["weight"]),
        ("activations", counts["activation"]),
        ("left float", f"{len(plan.skips)} nodes (--plan-only says which, and why)"),
        ("state", state),
        ("output", target),
    ]
    _print(document | {"state": state, "output": target}, as_json, rows)


def _planned(model: Model, rules: str, overrides: tuple[str, ...]) -> tuple[Model, Any]:
    from onnxqat.overrides import parse_override
    from onnxqat.plan import make_plan
    from onnxqat.prepare import prepare
    from onnxqat.rules import load_rule

    rule = load_rule(rules)
    parsed = [parse_override(text) for text in overrides]
    prepared = prepare(model)
    return prepared, make_plan(prepared.graph, rule, parsed)


def _plan_document(plan: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(plan.to_json())
    return {"schema": "onnxqat.insert/1", **document}


def _calibrated(model: Model, source: str, given: Settings, *, observer: str, samples: int,
                batch_size: int, seed: int, threads: int) -> Model:  # fmt: skip
    """Calibrate on a seeded choice of samples."""
    import numpy as np

    from onnxqat.calibrate import calibrate as run
    from onnxqat.progress import progress_bar

    with _open(model, source, given) as data:
        chosen = np.random.default_rng(seed).permutation(len(data))[:samples]
        batches = data.batches(batch_size, indices=np.sort(chosen))
        count = -(-len(chosen) // batch_size)
        with progress_bar("calibrating", count) as advance:
            inputs = (batch.inputs for batch in batches)
            return run(model, inputs, observer=observer, threads=threads, progress=advance)


@main.command()
@click.argument("model")
@click.argument("data")
@calibration_options
@data_options
@run_options
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

    target = output or _renamed(model, "calibrated")
    check_writable(target, force=force)
    loaded = load_model(model)
    plan_of(loaded)
    result = _calibrated(loaded, data, _settings(options), **options)
    save_model(result, target, force=force)
    document = {"schema": "onnxqat.calibrate/1", "observer": options["observer"], "output": target}
    rows = [("observer", options["observer"]), ("samples", options["samples"]), ("output", target)]
    _print(document | {"samples": options["samples"]}, as_json, rows)


@main.command()
@click.argument("model")
@click.argument("data")
@click.option("--val-data", help="Chooses the best state; 10 % of DATA by default.")
@click.option("--teacher", help="Float model to distil from; MODEL itself by default.")
@click.option("--loss", help="cross-entropy, kl, mse, or a sum as in cross-entropy+kl.")
@click.option("--epochs", type=click.IntRange(1), help="Default: about 1,000 steps, at most 10.")
@click.option(
    "--method",
    type=click.Choice(["lsq", "ste"]),
    default="lsq",
    show_default=True,
    help="lsq learns the scales; ste keeps the calibrated ones.",
)
@click.option(
    "--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help="Of weights; for adamw relative to each channel's size.",
)
@click.option("--scale-lr", type=click.FloatRange(0, min_open=True), help="Of scales' logarithms.")
@click.option("--momentum", type=click.FloatRange(0, 1), help="Of sgd.")
@click.option("--weight-decay", type=click.FloatRange(0))
@click.option("--augment", help="flip, crop or flip,crop.")
@calibration_options
@data_options
@run_options
@seed_option
@output_option("MODEL with .qat before its suffix by default.")
@force_option
@json_option
def finetune(model: str, data: str, val_data: str | None, teacher: str | None,
             output: str | None, force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Fine-tune the weights and scales of a Q/DQ MODEL on DATA; calibrates first if needed."""
    from onnxqat.files import check_writable
    from onnxqat.insert import state_of
    from onnxqat.model import load_model, save_model
    from onnxqat.prepare import prepare
    from onnxqat.progress import FinetuneReport
    from onnxqat.train import DivergedError
    from onnxqat.train import finetune as run

    target = output or _renamed(model, "qat")
    check_writable(target, force=force)
    loaded = load_model(model)
    given = _settings(options)
    calibration = {k: options.pop(k) for k in ("observer", "samples")}
    config = _config(options)
    if state_of(loaded) == "uncalibrated":
        shared = {k: getattr(config, k) for k in ("batch_size", "seed", "threads")}
        loaded = _calibrated(loaded, data, given, **calibration, **shared)
    taught_by = prepare(load_model(teacher)) if teacher else None
    with _open(loaded, data, given) as training:
        validation = _open(loaded, val_data, given) if val_data else None
        try:
            with FinetuneReport() as report:
                result = run(loaded, training, validation=validation, teacher=taught_by,
                             config=config, report=report)  # fmt: skip
        except DivergedError as error:
            save_model(error.best, target, force=force)
            raise click.ClickException(f"{error} Written to {target}.") from error
    save_model(result.model, target, force=force)
    _print_finetuned(result, target, as_json)


def _config(options: dict[str, Any]) -> Any:
    """Return the hyper-parameters: defaults where an option was not given."""
    from onnxqat.train import Config

    options["augment"] = tuple(options["augment"].split(",")) if options["augment"] else ()
    if unknown := set(options["augment"]) - {"flip", "crop"}:
        raise click.BadParameter(f"--augment: unknown {', '.join(unknown)}; flip and crop exist")
    return Config(**{name: value for name, value in options.items() if value is not None})


def _print_finetuned(result: Any, target: str, as_json: bool) -> None:
    def figures(evaluation: Any) -> dict[str, float]:
        return {**evaluation.metrics, "agreement": evaluation.agreement}

    document = {
        "schema": "onnxqat.finetune/1",
        "before": figures(result.before),
        "after": figures(result.after),
        "samples": result.after.samples,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 1),
        "notes": list(result.notes),
        "output": target,
    }
    rows = [(f"{k} before", v) for k, v in _percent(document["before"])]
    rows += [(f"{k} after", v) for k, v in _percent(document["after"])]
    rows += [
        ("held-out samples", result.after.samples),
        ("epochs", f"{result.epochs}, best {result.best_epoch}"),
        ("seconds", document["seconds"]),
        ("output", target),
    ]
    _print(document, as_json, [*rows, *(("note", note) for note in result.notes)])


@main.command()
@click.argument("model")
@click.argument("data")
@click.option(
    "--mode",
    type=click.Choice(["float", "qdq"]),
    default="qdq",
    show_default=True,
    help="float: without Q/DQ; qdq: the file's arithmetic, unfused.",
)
@click.option("--against", help="Reference model; adds agreement and largest difference.")
@click.option(
    "--max-drop",
    type=float,
    help="With --against: exit 1 if top-1 falls by more than this fraction.",
)
@data_options
@run_options
@json_option
def evaluate(model: str, data: str, mode: Any, against: str | None, max_drop: float | None,
             batch_size: int, threads: int, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Measure the accuracy of MODEL on DATA."""
    from onnxqat.evaluate import evaluate as run
    from onnxqat.model import load_model
    from onnxqat.progress import progress_bar

    if max_drop is not None and against is None:
        raise click.UsageError("--max-drop needs --against.")
    loaded = load_model(model)
    reference = load_model(against) if against else None
    with _open(loaded, data, _settings(options)) as samples:
        count = -(-len(samples) // batch_size)
        with progress_bar("evaluating", count) as advance:
            result = run(loaded, samples.batches(batch_size), mode=mode, against=reference,
                         threads=threads, progress=advance)  # fmt: skip
    document: dict[str, Any] = {
        "schema": "onnxqat.evaluate/1",
        "samples": result.samples,
        "mode": mode,
        "metrics": result.metrics,
    }
    rows = [("samples", result.samples), ("mode", mode), *_percent(result.metrics)]
    if reference is not None:
        document |= {
            "reference": result.reference,
            "agreement": result.agreement,
            "max_abs_diff": result.max_abs_diff,
        }
        rows += [(f"reference {k}", v) for k, v in _percent(result.reference)]
        rows += _percent({"agreement": result.agreement or 0.0})
        rows.append(("max_abs_diff", f"{result.max_abs_diff:.6g}"))
    _print(document, as_json, rows)
    if max_drop is not None:
        _check_drop(result, max_drop)


def _check_drop(result: Any, max_drop: float) -> None:
    if "top1" not in result.metrics:
        raise click.ClickException("--max-drop needs labels, and the data have none.")
    drop = result.reference["top1"] - result.metrics["top1"]
    if drop > max_drop:
        raise click.ClickException(f"top1 dropped by {drop:.4f}, more than {max_drop:g}.")


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write into.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["sophgo", "none"]),
    help="Calibration table; the rule's own by default.",
)
@click.option(
    "--weights",
    type=click.Choice(["snapped", "tuned"]),
    default="snapped",
    show_default=True,
    help="snapped: on the grid, as training computed with them.",
)
@force_option
@json_option
def strip(model: str, output: str, format_name: str | None, weights: Any, force: bool,
          as_json: bool) -> None:  # fmt: skip
    """Write the float model.onnx and the chip's calibration table of a Q/DQ MODEL."""
    from onnxqat.deploy import write_deployment
    from onnxqat.model import load_model

    files = write_deployment(
        load_model(model), output, table=format_name, weights=weights, force=force
    )
    document = {"schema": "onnxqat.strip/1", "files": {k: str(v) for k, v in files.items()}}
    _print(document, as_json, [(kind, str(path)) for kind, path in files.items()])


@main.command("import-table")
@click.argument("table")
@click.argument("model")
@rule_options
@output_option("Q/DQ model; MODEL with .qdq before its suffix by default.")
@force_option
@json_option
def import_table(table: str, model: str, rules: str, overrides: tuple[str, ...],
                 output: str | None, force: bool, as_json: bool) -> None:  # fmt: skip
    """Make a calibrated Q/DQ model from a Sophgo TABLE and its float MODEL."""
    from onnxqat.deploy import read_table
    from onnxqat.files import check_writable
    from onnxqat.insert import insert as insert_pairs
    from onnxqat.model import load_model, save_model

    target = output or _renamed(model, "qdq")
    check_writable(target, force=force)
    prepared, plan = _planned(load_model(model), rules, overrides)
    plan, params = read_table(table, prepared, plan)
    save_model(insert_pairs(prepared, plan, params, state="calibrated"), target, force=force)
    document = {"schema": "onnxqat.import-table/1", "parameters": len(params), "output": target}
    _print(document, as_json, [("parameters", len(params)), ("output", target)])


@main.group()
def rules() -> None:
    """Show the hardware rules."""


@rules.command("list")
@json_option
def rules_list(as_json: bool) -> None:
    """List the bundled rules."""
    from onnxqat.rules import bundled_rules, load_rule

    found = [load_rule(name) for name in bundled_rules()]
    entries = [{"name": r.name, "vendor": r.vendor, "summary": r.summary} for r in found]
    document = {"schema": "onnxqat.rules/1", "rules": entries}
    _print(document, as_json, [(r.name, r.summary) for r in found])


@rules.command("show")
@click.argument("name")
def rules_show(name: str) -> None:
    """Print what a rule says, and where it was read."""
    from onnxqat.rules import load_rule

    rule = load_rule(name)
    click.echo(f"{rule.name}: {rule.summary}")
    click.echo(f"vendor: {rule.vendor}   table: {rule.table or 'none'}")
    for kind, found in (("note", rule.notes), ("source", rule.sources)):
        for text in found:
            click.echo(f"{kind}: {text}")
    click.echo("chains run as one: " + ", ".join("+".join(chain) for chain in rule.fuse))
    for op_type, op in rule.ops.items():
        specs = [f"{k}={v}" for k in ("inputs", "weight", "outputs") if (v := getattr(op, k))]
        click.echo(f"  {op_type}: {' '.join(specs)} {op.parameters}")
    for spec_name, spec in rule.specs.items():
        click.echo(f"  [{spec_name}] {spec}")
