"""Hyper-parameters of fine-tuning, with defaults that need no tuning."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal, TypeAlias, TypedDict, get_args, get_type_hints

import msgspec
from msgspec import Meta

from onnxqat.choices import check_choice
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

STEP = 16  # samples, where nothing else is said


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Hyper-parameters; one outside of its type or range is a TrainingError.

    Attributes
    ----------
    loss : str or None
        See `onnxqat.train.losses.terms`; None: by what each output holds, see
        `onnxqat.train.losses.default`.
    label_smoothing, ignore_index : float or None, int or None
        Settings of cross-entropy: the share of each label that is spread over all classes, and the
        label of positions that are ignored.
    scope : tuple of {"blocks", "network"}
        What is trained, in this order: one block of the graph after the other against the float
        model's tensors, see `onnxqat.train.blocks`; the network from end to end.
    block_epochs : int
        How often a block sees its samples.
    block_layers : int
        How many layers with a weight a block has; twice as many where the graph can be cut
        between them at several tensors only.
    block_samples : int
        How many training samples blocks are trained on, at most.
    block_mix : float
        Share of the values at a block's inputs that are the float network's; of the others, what
        the blocks before compute.
    block_memory : int
        Megabytes of memory for the tensors between blocks; the others lie in temporary files.
    rounding : {"nearest", "adaround"}
        How the weights of a block learn: they and their scales move, and are rounded to the nearest
        level; or they and their scales stay, and it is learned which level they are rounded to,
        see `onnxqat.train.adaround`.
    epochs : int or None
        None: enough for about 2,000 steps, at most 10.
    batch_size : int or None
        Samples per batch. None: what the model is fixed to, and 16 where it takes any number.
    accumulate : int or None
        Batches per step, whose gradients are averaged: as one batch so many times larger, up to
        the order of summation. None: 1, and where the model is fixed to a batch, as many as make
        steps of about 16 samples by all processes.
    method : {"lsq", "lsq+", "pact", "dsq", "moving-average", "ste"}
        How scales and zero_points move where the plan does not say, see
        `onnxqat.train.fake_quantize`.
    averaging_constant : float
        Weight of a new batch's range in ``moving-average``, see
        `onnxqat.train.optimization.ranges`.
    quant_delay : int
        Number of steps at the start that train without quantization. Methods that observe ranges do
        so during these steps, too.
    optimizer : {"adamw", "adam", "sgd"}
        For weights and scales.
    lr : float or None
        Learning rate of the weights. For Adam it is relative to the weight's size: a step moves
        a weight by about ``lr`` times the root mean square of its output channel. None: by the
        bits of the plan, see `onnxqat.train.optimization.parameter_groups.base_rate`.
    scale_lr : float
        Learning rate of the scales, in their logarithm.
    momentum, nesterov : float, bool
        SGD momentum, and whether it has Nesterov's form.
    weight_decay : float
        Fraction of the weight per step and unit of learning rate; decoupled, except for adam.
    groups : tuple of str
        Parameters with their own rates, and frozen ones, see
        `onnxqat.train.optimization.parameter_groups`.
    clip_norm, clip_value : float, optional
        Limit of the gradient's length, and of each of its numbers. Those of frozen parameters do
        not count, those of scales are as the optimizer sees them.
    schedule : {"cosine", "constant", "step", "one-cycle"}
        How the rate changes, see `onnxqat.train.optimization.schedules`.
    warmup : float or None
        Fraction of all steps over which the rate rises at the start. None: 0.05, and 0.3 for
        one-cycle.
    ema : float or None
        Decay of the moving average of the weights and scales, which is evaluated and kept in their
        place. None: they themselves.
    select : str or None
        The figure that the best state is chosen by: ``top1``, ``top5``, ``agreement``,
        ``max_abs_diff`` or ``loss``, or a metric by name or ``module:function``; behind
        ``integer:``, of the network in the integers of its chip. None: see
        `onnxqat.train.selection.selection_of`.
    decode : str or None
        How outputs become boxes, for a metric of boxes; None: by their shapes.
    patience : int or None
        Training ends after so many epochs without a better state.
    augment : tuple of str
        Random changes of the training images, see `onnxqat.data.augmentation`.
    validation : float
        Fraction of the training data held out where no validation data are given.
    force_labels : bool
        Train on labels that the float model hardly ever meets, too.
    seed : int
        Seed of the order of samples, the held-out slice and augmentation.
    threads : int
        0 takes all cores.
    """

    loss: str | None = None
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] | None = None
    ignore_index: int | None = None
    scope: tuple[Scope, ...] = ("network",)
    block_epochs: Count = 10
    block_layers: Count = 4
    block_samples: Count = 1024
    block_mix: Fraction = 0.5
    block_memory: Annotated[int, Meta(ge=0)] = 1024
    rounding: BlockRounding = "nearest"
    epochs: Count | None = None
    batch_size: Count | None = None
    accumulate: Count | None = None
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

    @property
    def samples(self) -> int:
        """Samples per batch where the model takes any number."""
        return self.batch_size or STEP

    @property
    def batches(self) -> int:
        """Batches per step where nothing else is said."""
        return self.accumulate or 1

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            check_choice(f"Config: {name}", getattr(self, name), known, TrainingError)
        try:
            msgspec.convert(msgspec.to_builtins(msgspec.structs.asdict(self)), _fields())
        except (msgspec.ValidationError, TypeError) as error:
            raise TrainingError(f"Config: {error}.") from error


CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "optimizer": get_args(Optimizer),
    "rounding": get_args(BlockRounding),
    "schedule": get_args(Schedule),
}


@cache
def _fields() -> type:
    """Return a type of the same fields, for a check that makes no `Config`."""
    return TypedDict("Config", get_type_hints(Config, include_extras=True))  # type: ignore[operator,no-any-return]
