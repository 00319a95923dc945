"""What a hardware rule file can say: frozen types, no behaviour.

A rule names *specs* (how a tensor is quantized) and lists, per ONNX op type, which spec its
inputs, weight and outputs get. Ops that no table names stay float, with that reason.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from onnxqat.qparams import QuantSpec, Signedness

__all__ = ["HardwareRule", "OpRule", "RuleSpec"]


class RuleSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named spec of a rule: a `QuantSpec` whose axis is not yet tied to an op.

    Attributes
    ----------
    axis : {"channel", "none"}
        ``channel``: one scale per output channel of the weight, whichever axis that is for
        the op; ``none``: per-tensor. The other attributes are those of `QuantSpec`.
    """

    bits: int = 8
    signedness: Signedness = "signed"
    symmetric: bool = True
    narrow_range: bool = False
    axis: Literal["channel", "none"] = "none"
    fixed_range: tuple[float, float] | None = None
    min_range: float = 1e-12

    def resolve(self, channel_axis: int | None) -> QuantSpec:
        """Return the spec for a tensor whose output channels lie along ``channel_axis``."""
        fields = msgspec.structs.asdict(self)
        fields["axis"] = channel_axis if self.axis == "channel" else None
        return QuantSpec(**fields)


class OpRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens around one op type. Values are names of specs.

    Attributes
    ----------
    inputs : str or None
        Spec of the activations it reads; None leaves them as they are.
    outputs : str or None
        Spec of the activations it writes.
    weight : str or None
        Spec of its constant operand; None leaves a constant float.
    parameters : {"own", "passthrough", "unify"}
        ``passthrough``: the outputs share the parameters of input 0; ``unify``: all inputs
        and outputs share one set.
    """

    inputs: str | None = None
    outputs: str | None = None
    weight: str | None = None
    parameters: Literal["own", "passthrough", "unify"] = "own"


class HardwareRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One chip, or one runtime.

    Attributes
    ----------
    name, vendor, summary : str
        ``name`` is the file's stem.
    sources : tuple of str
        Where each fact was read.
    notes : tuple of str
        What a person should know; what is unknown about the chip.
    table : str or None
        Calibration table that `strip` writes for it.
    weight_bits, activation_bits : tuple of int
        Widths the chip runs; others are allowed for study, with a warning.
    graph_outputs : {"quantized", "float"}
        ``float``: a graph output leaves the chip before it is quantized (high-precision output).
    bias : {"int32", "float"}
        ``int32``: of scale s_x * s_w, a derived point of the plan; ``float``: left as it is.
    specs : dict of str to RuleSpec
        Named specs. The op tables refer to them.
    fuse : tuple of tuple of str
        Chains of op types that the chip runs as one: no point between them. ``BiasAdd`` is an
        Add of a constant vector; a Clip is meant from 0 upwards.
    ops : dict of str to OpRule
        By ONNX op type.
    """

    name: str
    vendor: str
    summary: str
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()
    table: str | None = None
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    graph_outputs: Literal["quantized", "float"] = "quantized"
    bias: Literal["int32", "float"] = "int32"
    specs: dict[str, RuleSpec]
    fuse: tuple[tuple[str, ...], ...] = ()
    ops: dict[str, OpRule]
