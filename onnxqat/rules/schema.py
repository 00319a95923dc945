"""The schema of a hardware rule file, as frozen types without behaviour.

A rule defines *specs* (how a tensor is quantized) and lists, for each op type, the spec of its
inputs, weight and outputs. Ops that the rule does not list stay float; the plan gives that reason.
*Exceptions* say where an op deviates from its table: by attribute, position or size.

An op type is ONNX's, or a pattern that exporters write as several nodes and a chip runs as one:
``BiasAdd`` (an Add of a constant vector, only in ``fuse``), ``SiLU``, ``HardSwish``, ``Mish``,
``Gelu``, ``LayerNormalization``, ``RMSNormalization`` (see `onnxqat.plan.patterns`).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from onnxqat.qparams import QuantSpec, Rounding

__all__ = [
    "Arithmetic",
    "Changes",
    "HardwareRule",
    "OpRule",
    "RuleException",
    "RuleSpec",
    "ShiftRounding",
]

ShiftRounding: TypeAlias = Rounding | Literal["floor"]
Parameters = Literal[
    "own", "passthrough", "unify", "unify_inputs", "from_output", "align_to_output"
]


class RuleSpec(QuantSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named spec of a rule: a `QuantSpec` whose axis is not yet tied to an op.

    Attributes
    ----------
    axis : {"channel", "head", "none"}
        ``channel``: one scale per output channel of the weight (the op determines the axis);
        ``head``: one scale per head of an attention block; ``none``: per-tensor. The other
        attributes are those of `QuantSpec`.
    """

    axis: Literal["channel", "head", "none"] = "none"  # type: ignore[assignment]

    def resolve(self, channel_axis: int | None, heads: int | None = None) -> QuantSpec:
        """Return the spec for a tensor.

        Parameters
        ----------
        channel_axis : int or None
            The axis of the tensor's output channels.
        heads : int or None
            The number of heads that the tensor is a weight of. Without it, a spec per head is
            per-tensor.
        """
        fields = msgspec.structs.asdict(self)
        per_head = self.axis == "head" and heads is not None
        fields["axis"] = channel_axis if self.axis == "channel" or per_head else None
        fields["heads"] = heads if per_head else None
        return QuantSpec(**fields)


class OpRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tensors of one op type are quantized. Values are names of specs.

    Attributes
    ----------
    inputs : str or None
        Spec of the activations that the op reads; None adds no point.
    outputs : str or None
        Spec of the activations that the op writes.
    weight : str or None
        Spec of the op's constant operand; None leaves a constant float.
    reads : {"all", "residual"}
        ``residual``: quantize only the skip side of an Add, which is added to the output of a
        weighted node (or of the nodes fused into it).
    parameters : {"own", "passthrough", "unify", "unify_inputs", "from_output", "align_to_output"}
        ``passthrough``: the outputs share the parameters of input 0; ``unify``: all inputs
        and outputs share one set, which covers them all; ``unify_inputs``: all inputs share one
        set; ``from_output``: all share one set, measured on the output alone; ``align_to_output``:
        the same, but a tensor that other ops read too, or that an op with ``passthrough`` writes,
        keeps its own parameters and is requantized for this op.
    constant_scale : {"own", "output"}
        ``output``: the chip stores a constant operand as 8-bit integers with the output's scale;
        the output's range is therefore extended to cover the constant.
    """

    inputs: str | None = None
    outputs: str | None = None
    weight: str | None = None
    reads: Literal["all", "residual"] = "all"
    parameters: Parameters = "own"
    constant_scale: Literal["own", "output"] = "own"


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of an `OpRule` that an exception replaces; ``"none"`` removes a spec."""

    inputs: str | None = None
    outputs: str | None = None
    weight: str | None = None
    parameters: Parameters | None = None


class RuleException(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A case in which an op deviates from its table. All given conditions must hold.

    Attributes
    ----------
    op : tuple of str
        Op types.
    attributes : dict
        Values of ONNX attributes, defaults included (``mode = "linear"``, ``strides = [1, 1]``).
    written : tuple of str
        ONNX attributes that the node states explicitly, whatever their value.
    depthwise : bool or None
        Whether a convolution has several groups, of one input channel each.
    constant_operand : bool or None
        Whether one of the inputs is a constant.
    projection : bool or None
        Whether the node is a product that gives queries, keys or values in an attention block, see
        `onnxqat.plan.attention`.
    kernel : tuple of int or None
        Spatial size of the kernel.
    kernel_above, dilation_above, group_above, channels_above : int or None
        The largest spatial size of the kernel, the largest dilation, the number of groups, or
        the number of channels (axis 1 of the output) is larger than this.
    position : {"first", "last"} or None
        The node is one of the first, or of the last, weighted nodes.
    changes : Changes or None
        Effect: the node gets other specs.
    kept_float : str or None, ``float`` in the file
        Effect: the node stays float, for this reason.
    unsupported : str or None
        Effect: the chip cannot run the node, for this reason.
    reads_float : bool
        Whether the inputs of a node that stays ``float`` also stay float for it. Needed where the
        runtime runs any node between DequantizeLinear and QuantizeLinear in integers.
    """

    op: tuple[str, ...]
    attributes: dict[str, int | float | str | tuple[int, ...]] = msgspec.field(default_factory=dict)
    written: tuple[str, ...] = ()
    depthwise: bool | None = None
    constant_operand: bool | None = None
    projection: bool | None = None
    kernel: tuple[int, ...] | None = None
    kernel_above: int | None = None
    dilation_above: int | None = None
    group_above: int | None = None
    channels_above: int | None = None
    position: Literal["first", "last"] | None = None
    changes: Changes | None = None
    kept_float: str | None = msgspec.field(default=None, name="float")
    unsupported: str | None = None
    reads_float: bool = False


class Arithmetic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a chip computes with integers, as far as it is documented.

    Attributes
    ----------
    requantize : {"unknown", "float", "multiplier", "gemmlowp", "shift", "two-shifts", "hmx", "qdm"}
        How an accumulated sum becomes an output integer, with M = s_x * s_w / s_y. ``float``:
        multiply by M in float32; ``multiplier``: multiply by an integer, then one rounding shift
        (the pair nearest to M); ``gemmlowp``: multiply by an integer of 31 bits, round at 2**31,
        then a rounding shift; ``shift``: M is a power of two; ``two-shifts``: shift right, multiply
        by an integer of 16 bits, then a rounding shift; ``hmx``: as Qualcomm's HTP, see
        `onnxqat.evaluation.integer.hmx`; ``qdm``: as Sophgo's CV18xx, see
        `onnxqat.evaluation.integer.qdm`.
    rounding : {"half-even", "half-away", "half-up", "floor"}
        How the last step of the requantization rounds.
    product_rounding : {"half-even", "half-away", "half-up", "floor"} or None
        The same for convolutions and matrix products; None: as ``rounding``.
    bias_rounding : {"half-even", "half-away", "half-up"}
        How ``b / (s_x * s_w)`` is rounded.
    float_rounding : {"half-even", "half-away", "half-up"}
        How a float is rounded to an integer in model inputs, look-up tables and float ops.
    float_scaling : {"divide", "multiply"}
        How a float becomes an integer: divide by s, round, add the zero_point; or multiply by 1 / s
        and add the zero_point, both in ``float_type``, then round.
    float_type : {"float32", "float16"}
        Type of the floats that leave a product and of those that become integers.
    float_ops : {"float32", "float16"}
        Type of the ops that run in float: of dequantized integers, of constants, and of what
        becomes integers again. They compute in float32, see `Grid.to_halves`.
    factor_type : {"float64", "float32", "float19", "float16"}
        Type of the factor s_x * s_w of a product with a float output. ``float64`` also stands for
        an exact product; with the others, sum and factor are multiplied in float32. ``float19`` is
        float32 without its last 13 bits.
    bias : {"plan", "int32"}
        ``plan``: as the rule's ``bias`` says; ``int32``: the chip adds a bias to the sums, although
        training leaves it float.
    multiplier_bits : int
        Width of the multiplier of a convolution or a matrix product, including its sign.
    operand_bits : int
        Width of the multiplier of elementwise ops and averages, including its sign.
    product_bits : int
        Largest width of an operand of a product: 8 or 16.
    rescaled_operands : bool
        Whether an Add rounds each operand to the output's scale before adding, and constants of
        Add, Sub and Mul get the compiler's own scale: absmax / 127, or / 255.
    fused_attention : bool
        Whether the compiler makes one op of an attention block, see
        `onnxqat.evaluation.integer.attention`.
    in_float64 : tuple of str
        Op types whose sums of products with a constant are multiplied by M in float64 and rounded
        half away from zero, whatever ``requantize`` says.
    add : {"plain", "shift-one", "multiply-both"}
        How ``two-shifts`` brings two operands to one scale. ``shift-one``: shift the one with the
        larger scale, multiply the other by an integer of 16 bits. ``multiply-both``: multiply them
        by integers of 8 and 16 bits. ``plain``: see `onnxqat.evaluation.integer.kernels.add`.
    round_averages_twice : bool
        Whether an AveragePool of ``two-shifts`` also rounds its first shift.
    raw_means : bool
        Whether a mean requantizes the stored integers, which include the zero_point, and subtracts
        the zero_point's contribution afterwards.
    integer, table, kept_float : tuple of str, the last is ``float`` in the file
        Op types that run in integers (``integer``), by a look-up table over all integers
        (``table``), or in float between DequantizeLinear and QuantizeLinear (``float``). Ops that
        only move values need no entry.
    assumed : dict of str to tuple of str
        Keys of this table that no source documents, each with its plausible values; the value in
        the table is one of them. Evaluation computes all combinations, and their figures decide
        nothing. A key with a single value counts as known.
    """

    requantize: Literal[
        "unknown", "float", "multiplier", "gemmlowp", "shift", "two-shifts", "hmx", "qdm"
    ]
    rounding: ShiftRounding = "half-even"
    product_rounding: ShiftRounding | None = None
    bias_rounding: Rounding = "half-even"
    float_rounding: Rounding = "half-even"
    float_scaling: Literal["divide", "multiply"] = "divide"
    float_type: Literal["float32", "float16"] = "float32"
    float_ops: Literal["float32", "float16"] = "float32"
    factor_type: Literal["float64", "float32", "float19", "float16"] = "float64"
    bias: Literal["plan", "int32"] = "plan"
    multiplier_bits: int = 32
    operand_bits: int = 32
    product_bits: Literal[8, 16] = 8
    rescaled_operands: bool = False
    fused_attention: bool = False
    in_float64: tuple[str, ...] = ()
    add: Literal["plain", "shift-one", "multiply-both"] = "plain"
    round_averages_twice: bool = False
    raw_means: bool = False
    integer: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    kept_float: tuple[str, ...] = msgspec.field(default=(), name="float")
    assumed: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)


class HardwareRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One chip, or one runtime.

    Attributes
    ----------
    name, vendor, summary : str
        ``name`` is the file's stem.
    sources : tuple of str
        Where each fact was read.
    notes : tuple of str
        What a user should know about the chip, and what is unknown about it.
    table : str or None
        Format of the calibration table that `strip` writes.
    target : str or None
        The chip's name for the vendor's compiler, see `onnxqat.handoff`.
    weight_bits, activation_bits : tuple of int
        Widths that the chip runs; others are allowed for study, with a warning.
    graph_outputs : {"quantized", "float"}
        ``float``: a graph output leaves the chip before it is quantized (high-precision output).
    bias : {"int32", "float"}
        ``int32``: a derived point of the plan, with scale s_x * s_w; ``float``: not quantized.
    bias_bits : int
        Width of the integers of a bias, 16 to 32.
    float_type : {"F32", "F16", "BF16"}
        Type of the ops that the chip runs in float, for tables that name it.
    symmetric, asymmetric : tuple of str
        Overrides, as ``--set`` takes them, for a second mode of the chip, in which all activations
        are symmetric, or all asymmetric. Empty if the chip has no second mode.
    specs : dict of str to RuleSpec
        Named specs. The op tables refer to them.
    fuse : tuple of tuple of str
        Chains of op types that the chip runs as one, without points between them. ``BiasAdd`` is
        an Add of a constant vector; a Clip matches if its lower limit is 0 or more.
    ops : dict of str to OpRule
        The table of each op type.
    split : tuple of str
        Patterns whose nodes this chip runs, and quantizes, one by one.
    kept_float, unsupported : dict of str to str, the first is ``float`` in the file
        For each op type: why the chip runs it in float, or cannot run it.
    exceptions : tuple of RuleException
        The first exception whose conditions hold for a node is applied.
    arithmetic : Arithmetic or None
        The integer arithmetic that `evaluate --mode integer` simulates; None if the chip's
        arithmetic is not documented.
    """

    name: str
    vendor: str
    summary: str
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()
    table: str | None = None
    target: str | None = None
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    graph_outputs: Literal["quantized", "float"] = "quantized"
    bias: Literal["int32", "float"] = "int32"
    bias_bits: int = 32
    float_type: Literal["F32", "F16", "BF16"] = "F32"
    symmetric: tuple[str, ...] = ()
    asymmetric: tuple[str, ...] = ()
    specs: dict[str, RuleSpec]
    fuse: tuple[tuple[str, ...], ...] = ()
    ops: dict[str, OpRule]
    split: tuple[str, ...] = ()
    kept_float: dict[str, str] = msgspec.field(default_factory=dict, name="float")
    unsupported: dict[str, str] = msgspec.field(default_factory=dict)
    exceptions: tuple[RuleException, ...] = ()
    arithmetic: Arithmetic | None = None
