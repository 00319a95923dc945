"""The types of a plan: pure data with a stable text and JSON form."""

from __future__ import annotations

from typing import Literal

import msgspec

from onnxqat.errors import PlanError
from onnxqat.qparams import QuantSpec

__all__ = ["REQUANTIZED", "Edge", "QuantPlan", "QuantPoint", "Skip", "describe_spec"]


# in the name of a requantized tensor, and of the node that writes it
REQUANTIZED = "/requantized/"


class Edge(msgspec.Struct, frozen=True, order=True):
    """Input ``index`` of the node named ``node``; if ``node`` is "", graph output ``index``."""

    node: str
    index: int


class QuantPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One quantized tensor.

    Attributes
    ----------
    tensor : str
        The tensor's name in the float graph.
    role : {"weight", "activation", "bias"}
        A bias stays float in the working model; its point describes how it is exported.
    consumers : tuple of Edge
        The readers of the quantized values.
    spec : QuantSpec
        How the tensor is quantized.
    group : str or None
        The tensor that names the group; all points of a group share one set of parameters.
    derived_from : (str, str) or None
        The activation and the weight whose scales are multiplied to give the scale of a bias;
        None for other points.
    observed : bool
        Whether calibration uses this tensor's values, or only those of others in its group.
    reason : str
        Why the tensor is quantized, and which overrides changed the point.
    """

    tensor: str
    role: Literal["weight", "activation", "bias"]
    consumers: tuple[Edge, ...]
    spec: QuantSpec
    group: str | None = None
    derived_from: tuple[str, str] | None = None
    observed: bool = True
    reason: str

    @property
    def parameters(self) -> str:
        """The name under which the point's scale and zero_point are stored."""
        return self.group or self.tensor

    def __str__(self) -> str:
        """Return one line of text: tensor -> consumers, spec, role, reason."""
        readers = " ".join(f"{e.node or 'output'}[{e.index}]" for e in self.consumers)
        group = f" group={self.group}" if self.group else ""
        group += "" if self.observed else " unobserved"
        derived = f" scale={' * '.join(self.derived_from)}" if self.derived_from else ""
        return (
            f"{self.tensor} -> {readers}  {describe_spec(self.spec)}{group}{derived}  "
            f"{self.role}  ({self.reason})"
        )


class Skip(msgspec.Struct, frozen=True):
    """A node that stays float, and why; ``unsupported`` if the chip cannot run it."""

    node: str
    op_type: str
    reason: str
    unsupported: bool = False


class QuantPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The quantized tensors, the skipped nodes and the reasons, with a stable JSON form.

    Attributes
    ----------
    rule : str
        Name of the hardware rule.
    points, skips : tuple
        The quantized tensors, and the nodes that stay float.
    chains : tuple of tuple of str
        Names of the nodes that the chip runs as one.
    overrides : tuple of str
        The overrides of the user.
    """

    rule: str
    points: tuple[QuantPoint, ...]
    skips: tuple[Skip, ...]
    chains: tuple[tuple[str, ...], ...] = ()
    overrides: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return JSON; equal plans give the same text."""
        return msgspec.json.encode(self, order="deterministic").decode()

    @staticmethod
    def from_json(text: str) -> QuantPlan:
        """Read the text that `to_json` wrote.

        Raises
        ------
        PlanError
            The text is not a plan.
        """
        try:
            return msgspec.json.decode(text, type=QuantPlan)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise PlanError(
                f"The stored plan cannot be read ({error}). Run 'onnxqat insert' again."
            ) from error

    def __repr__(self) -> str:
        return (
            f"QuantPlan(rule '{self.rule}', {len(self.grid_points())} tensors quantized, "
            f"{len(self.skips)} nodes in float)"
        )

    def __str__(self) -> str:
        """Return `lines` as one text."""
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return one line for each point, then one for each skip."""
        skips = (
            f"{'unsupported' if s.unsupported else 'float'}: {s.node} ({s.op_type}): {s.reason}"
            for s in self.skips
        )
        return [*map(str, self.points), *skips]

    def grid_points(self) -> tuple[QuantPoint, ...]:
        """Return the points that have Q/DQ nodes (all except biases)."""
        return tuple(p for p in self.points if p.role != "bias")

    def requantized(self) -> dict[str, str]:
        """Return the tensor that each requantized tensor comes from, by the latter's name.

        A node with the name of the requantized tensor stands for the requantization. It is the
        consumer of the original tensor's point.
        """
        return {
            edge.node: point.tensor
            for point in self.points
            for edge in point.consumers
            if REQUANTIZED in edge.node
        }


def describe_spec(spec: QuantSpec) -> str:
    """Return a spec in words: type, symmetry, axis, and other fields that are not the default."""
    kind = {"signed": "int", "unsigned": "uint", "from_range": "int|uint"}[spec.signedness]
    words = [kind.replace("|", f"{spec.bits}|") + str(spec.bits)]
    words.append("sym" if spec.symmetric else "asym")
    words += ["narrow"] if spec.narrow_range else []
    words += ["off-center"] if spec.off_center else []
    words += ["pow2"] if spec.power_of_two else []
    words += [f"scale_ratio={spec.scale_ratio:g}"] if spec.scale_ratio else []
    words += [f"axis={spec.axis}"] if spec.axis is not None else []
    words += [f"heads={spec.heads}"] if spec.heads is not None else []
    words += [f"range={list(spec.fixed_range)}"] if spec.fixed_range else []
    words += [f"observer={spec.observer}"] if spec.observer else []
    words += [f"range_factor={spec.range_factor:g}"] if spec.range_factor != 1 else []
    words += [f"method={spec.method}"] if spec.method else []
    return " ".join(words)
