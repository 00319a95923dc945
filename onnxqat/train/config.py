"""The hyper-parameters of fine-tuning, with defaults that work for most models."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal, TypeAlias, TypedDict, get_args, get_type_hints

import msgspec
from msgspec import Meta

from onnxqat.choices import check_choice
from onnxqat.device import DEVICE, Precision
from onnxqat.errors import TrainingError
from onnxqat.qparams import Method

__all__ = ["STEP", "Config"]

Count = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(ge=0)]
Limit = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]

Optimizer: TypeAlias = Literal["adamw", "adam", "sgd"]
Scope: TypeAlias = Literal["blocks", "network"]
BlockRounding: TypeAlias = Literal["nearest", "adaround"]
Schedule: TypeAlias = Literal["cosine", "constant", "step", "one-cycle"]

STEP = 16  # the default number of samples per step


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Hyper-parameters. A value of a wrong type or out of range raises a TrainingError.

    Attributes
    ----------
    loss : str or None
        The loss, see `onnxqat.train.losses.terms`. None: chosen by the content of each output, see
        `onnxqat.train.losses.default`.
    label_smoothing, ignore_index : float or None, int or None
        Settings of cross-entropy: the share of each label that is spread over all classes, and the
        label of positions that are ignored.
    scope : tuple of {"blocks", "network"} or None
        What is trained, in this order: the blocks of the graph, one after the other, against the
        float model's tensors (see `onnxqat.train.blocks`); the network from end to end. None:
        depends on the data, see `onnxqat.train.scope.chosen_scope`.
    block_epochs : int
        The number of times that a block sees its samples.
    block_layers : int
        The number of layers with a weight in a block; up to twice as many if the graph can only be
        cut there at several tensors.
    block_samples : int
        The most training samples for blocks.
    block_mix : float
        The share of the values at a block's inputs that are taken from the float network; the
        others are computed by the blocks before.
    block_memory : int
        Megabytes of memory for the tensors between blocks; further tensors are stored in temporary
        files.
    rounding : {"nearest", "adaround"}
        How the weights of a block are trained. ``nearest``: weights and scales change, and weights
        are rounded to the nearest level. ``adaround``: weights and scales do not change; training
        chooses for each weight whether it is rounded down or up, see `onnxqat.train.adaround`.
    epochs : int or None
        The number of epochs. None: enough for about 2,000 steps, at most 10.
    minutes : float or None
        Instead of ``epochs``: as many epochs as fit into this time, estimated from the first steps.
    batch_size : int or None
        Samples per batch. None: the model's fixed batch size, or 16.
    accumulate : int or None
        Batches per step, whose gradients are averaged; apart from the order of summation, the
        result is that of one larger batch. None: 1; if the model's batch is fixed, as many as make
        steps of about 16 samples over all processes.
    memory_budget : int or None
        Megabytes that a step may take, estimated from the graph; batches are divided to stay below
        this, and their gradients are averaged. None: no limit.
    method : {"lsq", "lsq+", "pact", "dsq", "moving-average", "ste"}
        How scales and zero_points are trained if the plan does not say, see
        `onnxqat.train.fake_quantize`.
    averaging_constant : float
        Weight of a new batch's range in ``moving-average``, see
        `onnxqat.train.optimization.ranges`.
    quant_delay : int
        The number of first steps that train without quantization. Methods that observe ranges also
        do so during these steps.
    optimizer : {"adamw", "adam", "sgd"}
        The optimizer of weights and scales.
    lr : float or None
        Learning rate of the weights. For Adam it is relative to the weight's size: a step moves
        a weight by about ``lr`` times the root mean square of its output channel. None: chosen by
        the optimizer and the bits of the plan, see
        `onnxqat.train.optimization.parameter_groups.base_rate`.
    scale_lr : float
        Learning rate of the logarithms of the scales.
    momentum, nesterov : float, bool
        SGD momentum, and whether to use Nesterov's form of it.
    weight_decay : float
        The fraction by which weights shrink per step and unit of learning rate; decoupled, except
        for adam.
    groups : tuple of str
        Parameters with their own rates, and frozen parameters, see
        `onnxqat.train.optimization.parameter_groups`.
    clip_norm, clip_value : float, optional
        Limits of the gradient's norm and of its elements. Gradients of frozen parameters do not
        count; those of scales count in the form that the optimizer uses.
    schedule : {"cosine", "constant", "step", "one-cycle"}
        How the rate changes, see `onnxqat.train.optimization.schedules`.
    warmup : float or None
        The fraction of all steps over which the rate rises at the start. None: 0.05, or 0.3 for
        one-cycle.
    ema : float or None
        The decay of the moving average of weights and scales, which is then evaluated and kept.
        None: no average.
    select : str or None
        The figure that chooses the best state: ``top1``, ``top5``, ``agreement``, ``max_abs_diff``
        or ``loss``, or a metric by name or ``module:function``. The prefix ``integer:`` measures it
        in the chip's integer arithmetic. None: see `onnxqat.train.selection.selection_of`.
    decode : str or None
        How outputs are decoded to boxes, for a metric of boxes. None: chosen by their shapes.
    patience : int or None
        The number of epochs without a better state after which training ends.
    augment : tuple of str
        Random changes of the training images, see `onnxqat.data.augmentation`.
    validation : float
        The fraction of the training data that is held out if no validation data are given.
    force_labels : bool
        Train on the labels even if the float model almost never predicts them.
    seed : int
        The seed for the order of samples, the held-out slice and augmentation.
    threads : int
        The number of threads (0: all cores).
    device : str
        ``cpu``, ``cuda``, ``cuda:1`` and so on, or ``auto``: a usable GPU, else the CPU.
    precision : {"tf32", "fp32"} or None
        Precision of matrix products on a GPU, see `onnxqat.device.Device`. None: ``tf32``.
    """

    loss: str | None = None
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] | None = None
    ignore_index: int | None = None
    scope: tuple[Scope, ...] | None = None
    block_epochs: Count = 10
    block_layers: Count = 4
    block_samples: Count = 1024
    block_mix: Fraction = 0.5
    block_memory: Annotated[int, Meta(ge=0)] = 1024
    rounding: BlockRounding = "nearest"
    epochs: Count | None = None
    minutes: Limit | None = None
    batch_size: Count | None = None
    accumulate: Count | None = None
    memory_budget: Count | None = None
    method: Method = "lsq"
    averaging_constant: Fraction = 0.01
    quant_delay: Annotated[int, Meta(ge=0)] = 0
    optimizer: Optimizer = "adamw"
    lr: Rate | None = None
    scale_lr: Rate = 1e-3
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Rate = 0.0
    groups: tuple[str, ...] = ()
    clip_norm: Limit | None = None
    clip_value: Limit | None = None
    schedule: Schedule = "cosine"
    warmup: Fraction | None = None
    ema: Annotated[float, Meta(ge=0, lt=1)] | None = None
    select: str | None = None
    decode: str | None = None
    patience: Count | None = None
    augment: tuple[str, ...] = ()
    validation: float = 0.1
    force_labels: bool = False
    seed: Annotated[int, Meta(ge=0)] = 0
    threads: Annotated[int, Meta(ge=0)] = 0
    device: Annotated[str, Meta(pattern=f"^({DEVICE.pattern})$")] = "auto"
    precision: Precision | None = None

    @property
    def samples(self) -> int:
        """Samples per batch if the model's batch is not fixed."""
        return self.batch_size or STEP

    @property
    def batches(self) -> int:
        """Batches per step if the model's batch is not fixed."""
        return self.accumulate or 1

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            check_choice(f"Config: {name}", getattr(self, name), known, TrainingError)
        try:
            msgspec.convert(msgspec.to_builtins(msgspec.structs.asdict(self)), _fields())
        except (msgspec.ValidationError, TypeError) as error:
            raise TrainingError(f"Config: {error}.") from error
        if None not in (self.epochs, self.minutes):
            raise TrainingError("Config: epochs and minutes are both given. Leave one out.")


CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "optimizer": get_args(Optimizer),
    "rounding": get_args(BlockRounding),
    "schedule": get_args(Schedule),
}


@cache
def _fields() -> type:
    """Return a type with the same fields, to check values without creating a `Config`."""
    return TypedDict("Config", get_type_hints(Config, include_extras=True))  # type: ignore[operator,no-any-return]
