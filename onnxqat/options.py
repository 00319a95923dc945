"""What the commands accept: click's options, and how their text becomes values."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import click

__all__ = [
    "Command",
    "analysis_options",
    "bias_correction_option",
    "calibration_options",
    "checkpoint_options",
    "data_options",
    "equalize_option",
    "export_options",
    "force_option",
    "json_option",
    "log_options",
    "output_option",
    "relu6_option",
    "rule_options",
    "run_options",
    "seed_option",
    "table_option",
    "teacher_option",
    "trainable_option",
    "training_options",
    "weights_option",
]

Command = Callable[..., None]
AUGMENTATIONS = ("flip", "crop")


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator for several options."""
    return lambda command: functools.reduce(lambda c, o: o(c), reversed(options), command)


def _floats(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``1,2,3``."""
    if value is None:
        return None
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,2,3") from error
    if not all(math.isfinite(number) for number in numbers):
        raise click.BadParameter(f"'{value}' has a number that is not finite")
    return numbers


def _preset(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Let a preset's values stand for options that are not given."""
    if value is not None:
        from onnxqat.errors import TrainingError
        from onnxqat.train.presets import preset

        try:
            ctx.default_map = {**(ctx.default_map or {}), **preset(value)}
        except TrainingError as error:
            raise click.BadParameter(str(error)) from error


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``height,width``."""
    if value is None:
        return None
    try:
        height, width = (int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not height,width such as 224,224") from error
    if min(height, width) < 1:
        raise click.BadParameter(f"'{value}' is not a size. Give height and width above 0")
    return height, width


def _pairs(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> Any:
    """Read repeated ``INPUT=ARRAY``; model inputs may have a ``=`` in their name, arrays not."""
    pairs: dict[str, str] = {}
    for item in value:
        name, _, array = item.rpartition("=")
        if not (name and array):
            raise click.BadParameter(f"'{item}' is not of the form INPUT=ARRAY")
        if pairs.setdefault(name, array) != array:
            raise click.BadParameter(f"'{name}' is given the arrays {pairs[name]} and {array}")
    return pairs or None


def _augmentations(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``flip,crop``."""
    if value is None:
        return None
    chosen = tuple(part.strip() for part in value.split(","))
    for name in chosen:
        if name not in AUGMENTATIONS:
            raise click.BadParameter(f"unknown '{name}'; {' and '.join(AUGMENTATIONS)} exist")
    return chosen


def _interval(_ctx: click.Context, _param: click.Parameter, value: str) -> Any:
    """Read ``200steps``, ``5min`` or ``never`` as what `onnxqat.train.Checkpoints` takes."""
    if value == "never":
        return None
    if re.fullmatch(r"[1-9]\d{0,8}steps", value):
        return {"steps": int(value.removesuffix("steps"))}
    if re.fullmatch(r"\d{1,6}(\.\d{1,6})?min", value):
        return {"minutes": float(value.removesuffix("min"))}
    raise click.BadParameter(f"'{value}' is none of 200steps, 5min, never and their like")


data_options = _options(
    click.option("--mean", callback=_floats, help="Per channel: x = (x - mean) * scale."),
    click.option("--scale", callback=_floats, help="Per channel, see --mean."),
    click.option("--resize-dims", callback=_size, help="height,width images are resized to."),
    click.option("--crop", callback=_size, help="height,width of the centre crop."),
    click.option("--keep-aspect-ratio", is_flag=True, default=None, help="Letterbox."),
    click.option("--pad-value", type=float, help="Pixel value around a letterboxed image."),
    click.option("--pixel-format", type=click.Choice(["rgb", "bgr", "gray"])),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), help="Of the data arrays."),
    click.option("--label", help="Name of the label array, or none."),
    click.option(
        "--classes",
        metavar="FILE",
        help="Class index of each folder name: one name a line, JSON, or CSV of name and index.",
    ),
    click.option(
        "--skip-broken", is_flag=True, help="Do without images that cannot be read; each is named."
    ),
    click.option("--input", "input_map", multiple=True, callback=_pairs, help="INPUT=ARRAY."),
)


def run_options(batch_size: int) -> Callable[[Command], Command]:
    """Return the options of every command that runs a model; ``batch_size`` is the default."""
    help_text = f"Samples at a time; those of the model where it is fixed, else {batch_size}."
    return _options(
        click.option("--batch-size", type=click.IntRange(1), help=help_text),
        click.option("--threads", type=click.IntRange(0), default=0, help="0: all cores."),
    )


bias_correction_option = click.option(
    "--bias-correction",
    is_flag=True,
    help="Then take off each bias what quantization adds to the mean of its layer.",
)
relu6_option = click.option(
    "--relu6",
    type=click.Choice(["keep", "replace"]),
    default="keep",
    show_default=True,
    help="What equalization does where a Clip from 0 stands between two layers: leave both alone, "
    "or put a Relu in its place, and say what that changes.",
)

calibration_options = _options(
    click.option(
        "--observer",
        type=click.Choice(["mse", "minmax", "moving-average", "percentile"]),
        default="mse",
        show_default=True,
        help="How a clipping range is chosen.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        help="How many samples calibrate.",
    ),
)
rule_options = _options(
    click.option(
        "--overrides",
        "overrides_file",
        metavar="FILE",
        help="TOML file of overrides, one table per selector; --set lies over it.",
    ),
    click.option(
        "--rules",
        default="onnxruntime-cpu",
        show_default=True,
        help="A bundled rule (see 'rules list') or a .toml file.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SELECTOR.KEY=VALUE",
        help="Override the rule, as in weight.bits=4; repeatable, later wins.",
    ),
)
table_option = click.option(
    "--format",
    "format_name",
    metavar="NAME",
    help="Calibration table that strip writes, see docs/formats.md; the rule's own by default, "
    "or none.",
)
training_options = _options(
    click.option(
        "--preset",
        callback=_preset,
        expose_value=False,
        is_eager=True,
        help="horizon: what its vendor recommends; other options lie over it.",
    ),
    click.option(
        "--loss",
        help="cross-entropy, kl, mse, l1, smooth-l1, bce, an ONNX file, or a weighted sum as in "
        "cross-entropy+0.5*kl:OUTPUT; by what each output holds by default.",
    ),
    click.option(
        "--label-smoothing",
        type=click.FloatRange(0, 1, max_open=True),
        help="Of cross-entropy: share of the labels that is spread over all classes.",
    ),
    click.option(
        "--ignore-index", type=int, help="Of cross-entropy: label of positions that do not count."
    ),
    click.option(
        "--epochs", type=click.IntRange(1), help="Default: about 2,000 steps, at most 10."
    ),
    click.option(
        "--accumulate",
        type=click.IntRange(1),
        help="Batches per step, whose gradients are averaged; 1 by default, and what makes 16 "
        "samples where the model's batch is fixed.",
    ),
    click.option(
        "--method",
        type=click.Choice(["lsq", "lsq+", "pact", "dsq", "moving-average", "ste"]),
        default="lsq",
        show_default=True,
        help="How scales move, where the plan does not say.",
    ),
    click.option(
        "--averaging-constant",
        type=click.FloatRange(0, 1),
        help="Of moving-average: weight of a new batch; 0.01 by default.",
    ),
    click.option(
        "--quant-delay",
        type=click.IntRange(0),
        metavar="STEPS",
        help="So many first steps train the float network.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "adam", "sgd"]),
        default="adamw",
        show_default=True,
    ),
    click.option(
        "--lr",
        type=click.FloatRange(0, min_open=True),
        help="Of weights; for adam(w) relative to each channel's size, by default 0.0005, and "
        "0.002 where something has fewer than 8 bits.",
    ),
    click.option(
        "--scale-lr", type=click.FloatRange(0, min_open=True), help="Of scales' logarithms."
    ),
    click.option("--momentum", type=click.FloatRange(0, 1), help="Of sgd."),
    click.option("--nesterov", is_flag=True, help="Nesterov's momentum, of sgd."),
    click.option("--weight-decay", type=click.FloatRange(0)),
    click.option(
        "--group",
        "groups",
        multiple=True,
        metavar="SELECTOR.KEY=VALUE",
        help="Own lr, weight_decay, freeze or freeze_from for weight, bias, scale, zero_point, "
        "name:REGEX or tensor:REGEX; repeatable, later wins.",
    ),
    click.option("--clip-norm", type=click.FloatRange(0, min_open=True), help="Of the gradient."),
    click.option("--clip-value", type=click.FloatRange(0, min_open=True), help="Of the gradient."),
    click.option(
        "--schedule",
        type=click.Choice(["cosine", "constant", "step", "one-cycle"]),
        default="cosine",
        show_default=True,
        help="Of the learning rates.",
    ),
    click.option(
        "--warmup", type=click.FloatRange(0, 1), help="Fraction of the steps; 0.05 by default."
    ),
    click.option(
        "--ema",
        type=click.FloatRange(0, 1, max_open=True),
        help="Keep the moving average with this decay.",
    ),
    click.option(
        "--select", metavar="METRIC", help="Figure that the best state is chosen by; printed."
    ),
    click.option(
        "--patience",
        type=click.IntRange(1),
        help="End after so many epochs without a better state.",
    ),
    click.option(
        "--force-labels",
        is_flag=True,
        help="Train on labels that the float model hardly ever meets, too.",
    ),
    click.option("--augment", callback=_augmentations, help="flip, crop or flip,crop."),
)
checkpoint_options = _options(
    click.option(
        "--checkpoint-every",
        callback=_interval,
        default="5min",
        show_default=True,
        metavar="INTERVAL",
        help="As in 200steps or 5min, or never; written beside the output.",
    ),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint."),
)
log_options = _options(
    click.option(
        "--log", metavar="FILE", help="Write losses, rates and figures to a .jsonl or .csv file."
    ),
    click.option(
        "--tensorboard", metavar="DIR", help="Write them to TensorBoard's event files there."
    ),
    click.option(
        "--log-every", type=click.IntRange(1), default=20, show_default=True, metavar="STEPS"
    ),
)
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of every random choice."
)
equalize_option = click.option(
    "--equalize", is_flag=True, help="First let channels have ranges alike."
)
trainable_option = click.option(
    "--train", is_flag=True, help="Also say which nodes keep it from being fine-tuned."
)
teacher_option = click.option(
    "--teacher", help="Float model to distil from; MODEL itself by default."
)
analysis_options = _options(
    click.option(
        "--metric",
        type=click.Choice(["error", "agreement", "top1"]),
        default="error",
        show_default=True,
        help="What a layer costs: noise per signal of the outputs, agreement or top-1 lost.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="How many samples are read, once for each layer and direction.",
    ),
)
weights_option = click.option(
    "--weights",
    type=click.Choice(["snapped", "tuned"]),
    default="snapped",
    show_default=True,
    help="snapped: on the grid, as training computed with them.",
)
export_options = _options(
    click.option(
        "--format",
        "format_name",
        type=click.Choice(["onnxruntime", "openvino", "qoperator", "tensorrt"]),
        required=True,
        help="Integer weights behind Q/DQ, or in QLinear operators (qoperator); see "
        "docs/formats.md.",
    ),
    click.option(
        "--int4", is_flag=True, help="Weights of 4 bits and fewer two to a byte (opset 21)."
    ),
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def output_option(help_text: str) -> Callable[[Command], Command]:
    """Return the ``-o`` option."""
    return click.option("-o", "--output", help=help_text)
