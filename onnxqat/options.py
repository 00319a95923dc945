"""The options of the commands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

import click

from onnxqat.choices import ObserverName
from onnxqat.device import Precision
from onnxqat.help_text import Command, under
from onnxqat.option_values import (
    read_augmentations,
    read_device,
    read_fields,
    read_floats,
    read_interval,
    read_pairs,
    read_scope,
    read_shapes,
    read_size,
    read_widths,
    use_preset,
)

__all__ = [
    "analysis_options",
    "bias_correction_option",
    "calibration_options",
    "camera_options",
    "checkpoint_options",
    "data_options",
    "decode_option",
    "device_options",
    "equalize_option",
    "export_options",
    "force_option",
    "json_option",
    "keep_epochs_option",
    "log_options",
    "metric_options",
    "mode_options",
    "output_option",
    "relu6_option",
    "rule_options",
    "run_options",
    "samples_option",
    "search_options",
    "seed_option",
    "shape_options",
    "table_option",
    "teacher_option",
    "train_samples_option",
    "trainable_option",
    "training_options",
    "truth_options",
    "weights_option",
]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator for several options."""
    return lambda command: functools.reduce(lambda c, o: o(c), reversed(options), command)


_images = under("Preprocessing")
_data = under("Data")
_text = under("Text")
_running = under("Running")
_calibration = under("Calibration")
_repair = under("Repair before training")
_rule = under("Hardware rule")
_loss = under("Loss")
_training = under("Training")
_blocks = under("Blocks")
_optimizer = under("Optimizer")
_progress = under("Checkpoints and logs")
_measure = under("Measurement")
_analysis = under("Analysis")
_search = under("Search")
_output = under("Output")

data_options = _options(
    _images("--mean", metavar="M,...", callback=read_floats,
            help="Subtract this mean, one number per channel: x = (x - mean) * scale (default 0)."),
    _images("--scale", metavar="S,...", callback=read_floats,
            help="Multiply by this scale after subtracting the mean, one number per channel "
            "(default 1)."),
    _images("--resize-dims", metavar="H,W", callback=read_size,
            help="Resize images to this height and width."),
    _images("--resize-by", type=click.Choice(["pillow", "opencv"]),
            help="Resize bilinearly as this package does (default pillow)."),
    _images("--crop", metavar="H,W", callback=read_size,
            help="Crop this height and width from the middle of each image."),
    _images("--keep-aspect-ratio", is_flag=True, default=None,
            help="Keep the aspect ratio when resizing, and pad the rest (letterbox)."),
    _images("--pad-value", type=float, metavar="PIXEL",
            help="Pixel value of the padding of a letterboxed image (default 0)."),
    _images("--pixel-format", type=click.Choice(["rgb", "bgr", "gray"]),
            help="Order of the colour channels that the model expects (default rgb). Give --mean "
            "and --scale in this order."),
    _data("--split", type=click.Choice(["train", "val", "test"]),
          help="Read this split of a folder or data.yaml (default: train for commands that "
          "learn, val for commands that measure)."),
    _data("--layout", type=click.Choice(["nchw", "nhwc"]),
          help="Layout of image arrays; needed only if the shape fits both layouts."),
    _data("--input", "input_map", multiple=True, callback=read_pairs, metavar="INPUT=ARRAY",
          help="Read a model input from this array of the data; repeatable."),
    _data("--label", metavar="NAME",
          help="Read the labels from this array; 'none' for no labels."),
    _data("--classes", metavar="FILE",
          help="Read the class index of each folder name from FILE: one name per line, JSON, or "
          "CSV with name and index."),
    _data("--skip-broken", is_flag=True,
          help="Skip files that cannot be read, and name each one."),
    _text("--tokenizer", metavar="FILE",
          help="Turn the texts of .jsonl data into tokens by this tokenizer.json."),
    _text("--text", "text_fields", callback=read_fields, metavar="FIELD,...",
          help="Read the text from this field, or from two (default: text, question,context and "
          "other usual names)."),
    _text("--max-tokens", type=click.IntRange(1), metavar="N",
          help="Pad or cut each sample to N tokens (default: the model's own length where it is "
          "fixed, else that of the longest sample, at most 512)."),
)  # fmt: skip


def run_options(batch_size: int) -> Callable[[Command], Command]:
    """Return the options of every command that runs a model; ``batch_size`` is the default."""
    return _options(
        _running("--batch-size", type=click.IntRange(1), metavar="N",
                 help="Run N samples at a time (default: the model's batch size if it is fixed, "
                 f"else {batch_size})."),
        _running("--threads", type=click.IntRange(0), default=0, metavar="N",
                 help="Use N threads (default 0: all cores)."),
    )  # fmt: skip


def device_options(default: str) -> Callable[[Command], Command]:
    """Return the options of a command that may run a model on a GPU."""
    usual = "a GPU if one can be used, else the CPU" if default == "auto" else "cpu"
    return _options(
        _running("--device", callback=read_device, default=default, metavar="DEVICE",
                 help="Compute on the CPU (cpu), on a GPU by CUDA (cuda, cuda:1), or on a GPU if "
                 f"one can be used (auto) (default: {usual})."),
        _running("--precision", type=click.Choice(get_args(Precision)),
                 help="Multiply on a GPU in TF32 or in float32 (default: tf32)."),
    )  # fmt: skip


def mode_options(title: str) -> Callable[[Command], Command]:
    """Return the options of a command that runs a model in an arithmetic, under a title of help."""
    group = under(title)
    return _options(
        group("--mode", type=click.Choice(["float", "qdq", "integer"]), default="qdq",
              show_default=True,
              help="Run the model without Q/DQ (float), with its Q/DQ and nothing fused (qdq), or "
              "in the chip's integer arithmetic (integer)."),
        group("--rules", metavar="FILE",
              help="Use this rule file for --mode integer (default: the bundled rule of the "
              "model)."),
    )  # fmt: skip


bias_correction_option = _options(
    _repair("--bias-correction", "bias_correction", flag_value="empirical",
            help="After calibration, correct each bias by the mean error that quantization causes "
            "on the data."),
    _repair("--analytic-bias-correction", "bias_correction", flag_value="analytic",
            help="After calibration, correct each bias by the mean error that rounding the weights "
            "causes, computed from BatchNormalization without data."),
)  # fmt: skip
relu6_option = _repair(
    "--relu6",
    type=click.Choice(["auto", "keep", "replace"]),
    default="auto",
    show_default=True,
    help="Handle a ReLU6 between two layers that could be equalized: keep it and do not equalize "
    "them (keep), replace it by a Relu and report the change of the outputs (replace), or replace "
    "it only if the outputs on the data hardly change (auto).",
)
calibration_options = _options(
    _calibration("--observer", type=click.Choice(get_args(ObserverName)),
                 default="mse", show_default=True,
                 help="Choose clipping ranges by this method, unless --set or the rule names one."),
    _calibration("--samples", type=click.IntRange(1), default=512, show_default=True, metavar="N",
                 help="Calibrate on N samples, chosen at random."),
)  # fmt: skip
rule_options = _options(
    _rule("--rules", default="onnxruntime-cpu", show_default=True, metavar="RULE",
          help="Use a bundled rule (see 'onnxqat rules list') or your own .toml file."),
    _rule("--overrides", "overrides_file", metavar="FILE",
          help="Read overrides of the rule from a TOML file, one table per selector; --set takes "
          "precedence."),
    _rule("--set", "overrides", multiple=True, metavar="SELECTOR.KEY=VALUE",
          help="Override the rule, for example weight.bits=4; repeatable, the last one applies."),
)  # fmt: skip
table_option = _output(
    "--format",
    "format_name",
    metavar="NAME",
    help="Format of the calibration table, or none; see docs/formats.md (default: the rule's).",
)
truth_options = _options(
    _data("--truth", multiple=True, callback=read_pairs, metavar="OUTPUT=ARRAY",
          help="Compare an output with this array of the data, if a metric needs it; "
          "repeatable."),
    _data("--boxes", metavar="PATH",
          help="Read the boxes of images from a folder of YOLO's .txt files, COCO's .json, or an "
          ".npy with rows (image, class, cx, cy, w, h) (default: the folder labels beside images, "
          "if any)."),
    _data("--masks", metavar="DIR",
          help="Read the mask of each image from this folder: an image file or .npy with the class "
          "of each pixel (default: the folder masks or annotations beside images, if any)."),
)  # fmt: skip
samples_option = _data(
    "--samples",
    "data_samples",
    type=click.IntRange(1),
    metavar="N",
    help="Read N samples, spread evenly over DATA (default: all).",
)
train_samples_option = _training(
    "--train-samples",
    "data_samples",
    type=click.IntRange(1),
    metavar="N",
    help="Train on N samples, spread evenly over DATA (default: all).",
)
decode_option = _measure(
    "--decode",
    metavar="NAME",
    help="Decode the outputs to boxes like nanodet, ssd, ssdlite, yolov5, yolov7, yolov8, "
    "yolo11 or yolox (default: "
    "chosen by the shapes of the outputs, and printed).",
)
metric_options = _options(
    _measure("--metric", "metrics", multiple=True, metavar="METRIC",
             help="Measure top1, top5, agreement, cosine, sqnr, mean-iou, psnr, exact-match, f1, "
             "map or your own module:function; repeatable."),
    truth_options,
    decode_option,
)  # fmt: skip
_scope_options = _options(
    _blocks("--scope", callback=read_scope, metavar="SCOPE",
            help="Train the network from end to end (network); its blocks one after the other to "
            "match the float model's tensors, without labels (blocks); or first the blocks, then "
            "the network (blocks,network) (default: blocks for up to 256 samples without labels, "
            "otherwise network)."),
    _blocks("--block-epochs", type=click.IntRange(1), default=10, show_default=True, metavar="N",
            help="Train each block for N epochs."),
    _blocks("--block-samples", type=click.IntRange(1), default=1024, show_default=True,
            metavar="N", help="Train blocks on at most N samples of DATA."),
    _blocks("--block-layers", type=click.IntRange(1), default=4, show_default=True, metavar="N",
            help="Put N layers with a weight into a block; up to 2 N in a residual block, or if "
            "branches run side by side."),
    _blocks("--block-mix", type=click.FloatRange(0, 1), default=0.5, show_default=True,
            metavar="SHARE",
            help="Take this share of the values at a block's inputs from the float model."),
    _blocks("--rounding", type=click.Choice(["nearest", "adaround"]), default="nearest",
            show_default=True,
            help="Train the weights of a block and round them to the nearest level (nearest), or "
            "keep the weights and learn whether to round each one up or down (adaround)."),
    _blocks("--block-memory", type=click.IntRange(0), default=1024, show_default=True,
            metavar="MB",
            help="Keep at most MB megabytes of the tensors between blocks in memory, the others in "
            "temporary files."),
)  # fmt: skip
training_options = _options(
    _scope_options,
    _training("--preset", callback=use_preset, expose_value=False, is_eager=True, metavar="NAME",
              help="Use a vendor's recommended settings (horizon) as defaults of the other "
              "options."),
    _loss("--loss", metavar="LOSS",
          help="Minimize cross-entropy, kl, mse, l1, smooth-l1, bce, an ONNX file, or a weighted "
          "sum such as cross-entropy+0.5*kl:OUTPUT (default: chosen by the content of each "
          "output)."),
    _loss("--label-smoothing", type=click.FloatRange(0, 1, max_open=True), metavar="SHARE",
          help="Spread this share of each label over all classes; for cross-entropy (default 0)."),
    _loss("--ignore-index", type=int, metavar="LABEL",
          help="Ignore positions that have this label; for cross-entropy."),
    _loss("--force-labels", is_flag=True,
          help="Train on the labels even if the float model almost never predicts them."),
    _training("--epochs", type=click.IntRange(1), metavar="N",
              help="Train for N epochs (default: about 2,000 steps, at most 10 epochs)."),
    _training("--minutes", type=click.FloatRange(0, min_open=True), metavar="N",
              help="Train as many epochs as fit into N minutes, estimated from the first steps; at "
              "least one (default: see --epochs)."),
    _training("--accumulate", type=click.IntRange(1), metavar="N",
              help="Average the gradients of N batches per step (default 1; if the model's batch "
              "is fixed, as many as make 16 samples)."),
    _training("--memory-budget", type=click.IntRange(1), metavar="MB",
              help="Divide batches so that a step takes about MB megabytes at most, and average "
              "their gradients (default: no limit)."),
    _training("--method", type=click.Choice(["lsq", "lsq+", "pact", "dsq", "moving-average",
                                             "ste"]),
              default="lsq", show_default=True,
              help="Train scales by this method, unless the plan names one."),
    _training("--averaging-constant", type=click.FloatRange(0, 1), metavar="WEIGHT",
              help="Weight of each new batch in a moving average; for --method moving-average "
              "(default 0.01)."),
    _training("--quant-delay", type=click.IntRange(0), metavar="STEPS",
              help="Train without quantization for the first STEPS steps (default 0)."),
    _training("--select", metavar="METRIC",
              help="Keep the epoch that is best by this figure, metric or your own "
              "module:function; integer:METRIC measures it in the chip's integer arithmetic "
              "(default: chosen by the data, and printed)."),
    truth_options,
    decode_option,
    _training("--patience", type=click.IntRange(1), metavar="EPOCHS",
              help="Stop after EPOCHS epochs without improvement (default: never)."),
    _training("--augment", callback=read_augmentations, metavar="NAMES",
              help="Change training images at random, with their boxes and masks: flip, crop, "
              "resized-crop, jitter, or several with commas (default: none)."),
    _training("--ema", type=click.FloatRange(0, 1, max_open=True), metavar="DECAY",
              help="Evaluate and keep the moving average of weights and scales with this decay "
              "(default: no average)."),
    _optimizer("--optimizer", type=click.Choice(["adamw", "adam", "sgd"]), default="adamw",
               show_default=True, help="Optimizer of weights and scales."),
    _optimizer("--lr", type=click.FloatRange(0, min_open=True), metavar="RATE",
               help="Learning rate of the weights; for adam and adamw relative to the size of each "
               "channel (default 0.0005, or 0.002 if the optimizer is sgd or a tensor has fewer "
               "than 8 bits)."),
    _optimizer("--scale-lr", type=click.FloatRange(0, min_open=True), metavar="RATE",
               help="Learning rate of the scales' logarithms (default 0.001)."),
    _optimizer("--momentum", type=click.FloatRange(0, 1), metavar="M",
               help="SGD momentum (default 0.9)."),
    _optimizer("--nesterov", is_flag=True, help="Use Nesterov's form of the SGD momentum."),
    _optimizer("--weight-decay", type=click.FloatRange(0), metavar="DECAY",
               help="Shrink weights by this fraction per step and unit of learning rate "
               "(default 0)."),
    _optimizer("--group", "groups", multiple=True, metavar="SELECTOR.KEY=VALUE",
               help="Set lr, weight_decay, freeze or freeze_from for weight, bias, scale, "
               "zero_point, name:REGEX or tensor:REGEX; repeatable, the last one applies."),
    _optimizer("--clip-norm", type=click.FloatRange(0, min_open=True), metavar="NORM",
               help="Scale the gradient down to at most this norm (default: no limit)."),
    _optimizer("--clip-value", type=click.FloatRange(0, min_open=True), metavar="VALUE",
               help="Limit each element of the gradient to this magnitude (default: no limit)."),
    _optimizer("--schedule", type=click.Choice(["cosine", "constant", "step", "one-cycle"]),
               default="cosine", show_default=True,
               help="Change the learning rates over the steps by this schedule."),
    _optimizer("--warmup", type=click.FloatRange(0, 1), metavar="FRACTION",
               help="Raise the rates over this fraction of all steps (default 0.05; one-cycle "
               "0.3)."),
)  # fmt: skip
checkpoint_options = _options(
    _progress("--checkpoint-every", callback=read_interval, default="5min", show_default=True,
              metavar="INTERVAL",
              help="Save a checkpoint beside the output at this interval: 200steps, 5min or "
              "never."),
    _progress("--resume", is_flag=True, help="Continue from the checkpoint."),
)  # fmt: skip
keep_epochs_option = _progress(
    "--keep-epochs",
    type=click.IntRange(1),
    metavar="N",
    help="Also write the N best epochs beside the output, as OUTPUT.epoch1.onnx and so on.",
)
log_options = _options(
    _progress("--log", metavar="FILE",
              help="Write losses, rates and figures to a .jsonl or .csv file."),
    _progress("--tensorboard", metavar="DIR",
              help="Write losses, rates and figures as TensorBoard event files to DIR."),
    _progress("--log-every", type=click.IntRange(1), default=20, show_default=True,
              metavar="STEPS", help="Log the losses and rates every STEPS steps."),
)  # fmt: skip
seed_option = _running(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="Seed of every random choice.",
)  # fmt: skip
equalize_option = _repair(
    "--equalize",
    is_flag=True,
    help="First equalize the channel ranges of the layers, and print the change of the outputs.",
)
trainable_option = _rule(
    "--train", is_flag=True, help="Also name the nodes that prevent fine-tuning."
)
teacher_option = _loss(
    "--teacher", metavar="MODEL",
    help="Distil from this float model (default: the float model inside MODEL).",
)  # fmt: skip
analysis_options = _options(
    _analysis("--metric", default="error", show_default=True, metavar="METRIC",
              help="Measure the cost of a layer by the noise of the outputs relative to the signal "
              "(error), or by the drop of a metric: one of evaluate, or your own "
              "module:function."),
    truth_options,
    decode_option,
    _analysis("--samples", type=click.IntRange(1), default=64, show_default=True, metavar="N",
              help="Run N samples, twice for each layer."),
)  # fmt: skip
search_options = _options(
    _search("--bits", type=click.FloatRange(1, 16), metavar="AVERAGE",
            help="Find the widths that lose least, with at most this average number of bits over "
            "the elements of all weights."),
    _search("--max-loss", type=click.FloatRange(0), metavar="POINTS",
            help="Use as few bits as possible, losing at most this many points of the metric."),
    _search("--widths", callback=read_widths, metavar="BITS,...",
            help="Choose from these widths, as in 4,8 (default: those of the rule's chip)."),
    _search("--metric", default="top1", show_default=True, metavar="METRIC",
            help="Measure the loss of a model by a metric of evaluate, your own module:function, "
            "or the noise in percent of the variance of the outputs (error)."),
    truth_options,
    decode_option,
    _search("--samples", type=click.IntRange(1), default=64, show_default=True, metavar="N",
            help="Rank the weights on N samples."),
    _search("--val-data", metavar="DATA",
            help="Measure models on this data (default: samples of DATA that do not rank "
            "weights)."),
    _search("--val-samples", type=click.IntRange(1), default=1000, show_default=True, metavar="N",
            help="Measure each model on at most N samples."),
)  # fmt: skip
weights_option = _output(
    "--weights",
    type=click.Choice(["snapped", "tuned"]),
    default="snapped",
    show_default=True,
    help="Write weights rounded to their grid, as used in training (snapped), or before rounding "
    "(tuned).",
)
shape_options = _options(
    _output("--batch", type=click.IntRange(1), metavar="N",
            help="Fix the batch size of the float model to N (default: as exported)."),
    _output("--input-shape", "input_shapes", multiple=True, callback=read_shapes,
            metavar="NAME:1,3,H,W",
            help="Fix the complete shape of an input; repeatable."),
)  # fmt: skip
camera_options = _options(
    _output("--input-type-rt", type=click.Choice(["yuv444", "nv12"]),
            help="Put nodes in front of the written model that convert a camera's YUV pixels to "
            "the RGB or BGR pixels of its training (strip: Horizon only)."),
    _output("--yuv-range", type=click.Choice(["full", "video"]), default="full", show_default=True,
            help="Range of the camera's values: 0 to 255 (full), or 16 to 235 (video)."),
)  # fmt: skip
export_options = _options(
    _output("--format", "format_name", required=True,
            type=click.Choice(["onnxruntime", "openvino", "qoperator", "rockchip", "tensorrt"]),
            help="Write Q/DQ with integer weights, or QLinear operators (qoperator); see "
            "docs/formats.md."),
    _output("--int4", is_flag=True,
            help="Store weights of 4 bits or fewer as INT4, two per byte (opset 21)."),
)  # fmt: skip
force_option = _output("--force", is_flag=True, help="Replace an existing output.")
json_option = _output("--json", "as_json", is_flag=True, help="Print one JSON document.")


def output_option(help_text: str) -> Callable[[Command], Command]:
    """Return the ``-o`` option."""
    return _output("-o", "--output", metavar="PATH", help=help_text)
