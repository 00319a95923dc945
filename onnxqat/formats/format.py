"""The parts that all formats share: the model to write, the table read, the parameters found.

`Format.write` turns a calibrated model into files; `Format.read` finds the parameters of a plan in
one of these files. A format never decides what is quantized: the plan does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import ArrayLike

from onnxqat.calibration import weight_range
from onnxqat.errors import FormatError
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams, choose_qparams, quantized_range, storage_dtype
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule

__all__ = [
    "Calibrated",
    "Format",
    "Found",
    "Key",
    "Table",
    "Written",
    "edges_of",
    "listed",
    "refuse",
]

logger = logging.getLogger(__name__)

LISTED = 5


def listed(names: Sequence[str]) -> str:
    """Return the first few names as text, for a message."""
    return ", ".join(names[:LISTED]) + (" ..." if len(names) > LISTED else "")


def refuse(problems: Iterable[str], advice: str) -> None:
    """Raise FormatError if there are any problems; the message lists them."""
    found = list(problems)
    if found:
        raise FormatError(f"{listed(found)}. {advice}")


class Calibrated:
    """A calibrated model, as the writers of formats need it.

    Attributes
    ----------
    model : QuantizedModel
        The model to write.
    graph : onnx_graphsurgeon.Graph
        Its float graph, with the names that the target sees. Must not be changed.
    plan : QuantPlan
        The plan of the model.
    rule : HardwareRule or None
        The rule of the plan; None if it is a file of the user's.

    Raises
    ------
    PlanError
        The model is not calibrated.
    """

    def __init__(self, model: QuantizedModel, rule: HardwareRule | None = None) -> None:
        model.check_calibrated()
        self.model = model
        self.rule = rule
        self.graph = model.floats.graph
        self.plan = model.plan
        self._params = model.params

    def params(self, point: QuantPoint) -> QuantParams:
        """Return the parameters of a point."""
        return self._params[point.parameters]

    def points(self, role: str) -> Iterator[tuple[QuantPoint, QuantParams]]:
        """Yield the points of a role, with their parameters."""
        return ((p, self.params(p)) for p in self.plan.grid_points() if p.role == role)

    def others(self, covered: Set[str], *roles: str) -> dict[str, tuple[str, ...]]:
        """Return the tensors whose parameters are not in ``covered``, for `Written.left_out`."""
        points = (p for p in self.plan.grid_points() if p.role in roles)
        names = tuple(p.tensor for p in points if p.parameters not in covered)
        return {"tensors of other ops": names} if names else {}

    def left_out(self, *kinds: str) -> dict[str, tuple[str, ...]]:
        """Return the names of all biases or weights, for formats that cannot hold them."""
        roles = {"biases": "bias", "weight scales": "weight"}
        found = {
            kind: tuple(p.tensor for p in self.plan.points if p.role == roles[kind])
            for kind in kinds
        }
        return {kind: names for kind, names in found.items() if names}


def edges_of(plan: QuantPlan) -> dict[tuple[str, int], QuantPoint]:
    """Return the point that each quantized input (node, index) reads."""
    return {(e.node, e.index): p for p in plan.grid_points() for e in p.consumers}


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result of a writer.

    Attributes
    ----------
    files : dict of str to str or bytes
        Contents by kind; the kinds are those of `Format.files`.
    left_out : dict of str to tuple of str
        Names that the plan has and the format cannot hold, by kind (such as ``"biases"``).
    """

    files: Mapping[str, str | bytes]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file that was read.

    Attributes
    ----------
    name : str
        Name for error messages, usually the path.
    data : bytes
        The whole contents.
    """

    name: str
    data: bytes

    def text(self) -> str:
        """Return the contents as text.

        Raises
        ------
        FormatError
            The contents are not UTF-8.
        """
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{self.name}: cannot be read (not UTF-8 text). Give a calibration table."
            raise FormatError(message) from error


class _HasTensor(Protocol):
    tensor: str


_Named = TypeVar("_Named", bound=_HasTensor)


class Found:
    """The parameters that a table gives the points of a plan, each checked when it is added.

    Attributes
    ----------
    params : dict of str to QuantParams
        By `QuantPoint.parameters`.
    missing : list of str
        Names that the plan needs and the table lacks.
    unsaid : list of str
        Tensors of the plan that this format has no name for: its target runs them in float.
    unused : list of str
        Names in the table that the plan does not need.
    """

    def __init__(self, source: str, graph: gs.Graph) -> None:
        self.source = source
        self.tensors: dict[str, gs.Tensor] = graph.tensors()
        self.params: dict[str, QuantParams] = {}
        self.missing: list[str] = []
        self.unsaid: list[str] = []
        self.unused: list[str] = []

    def entries(
        self, plan: QuantPlan, entries: Sequence[_Named]
    ) -> Iterator[tuple[QuantPoint, _Named]]:
        """Yield the points of a plan with their entries; record missing and unused names.

        Raises
        ------
        FormatError
            A tensor has two entries.
        """
        by_tensor = {entry.tensor: entry for entry in entries}
        if len(by_tensor) < len(entries):
            raise FormatError(f"{self.source}: a tensor appears twice. Write the table again.")
        for point in plan.grid_points():
            entry = by_tensor.pop(point.tensor, None)
            if entry is None:
                self.missing.append(point.tensor)
            else:
                yield point, entry
        self.unused += by_tensor

    def put(
        self,
        point: QuantPoint,
        scale: ArrayLike,
        zero_point: ArrayLike = 0,
        *,
        signed: bool,
        name: str,
    ) -> None:
        """Add the parameters that the table has under ``name`` for a point.

        A weight with a scale for each head gets those that the compiler computes from it, whatever
        the table says.

        Parameters
        ----------
        scale : float64 of shape () or (C,)
            Rounded to float32 here.
        zero_point : int of shape () or as ``scale``
            Counted in the integers of the quantized tensor.
        signed : bool
            Whether the integers are signed.

        Raises
        ------
        FormatError
            The numbers are not valid parameters, or differ from others of the same group.
        """
        if point.spec.heads is not None:
            self.params[point.parameters] = self._by_absmax(point)
            return
        place = f"{self.source}: '{name}'"
        scales = _float32(scale, place)
        axis = point.spec.axis
        wanted = () if axis is None else (self.tensors[point.tensor].shape[axis],)
        if scales.size != int(np.prod(wanted)):
            raise FormatError(
                f"{place} has {scales.size} scales; its tensor takes {int(np.prod(wanted))}. "
                "Is the rule the one that the table was made with?"
            )
        zeros = np.broadcast_to(np.asarray(zero_point, np.int64).reshape(-1), scales.shape)
        self._check_zero_points(point, zeros, signed=signed, place=place)
        params = QuantParams(
            scale=scales.reshape(wanted),
            zero_point=zeros.astype(storage_dtype(point.spec, signed=signed)).reshape(wanted),
        )
        known = self.params.setdefault(point.parameters, params)
        if not known.same_as(params):
            raise FormatError(
                f"{place} differs from another entry of the same group ({params.scale} instead "
                f"of {known.scale}). Tensors that share parameters need equal entries."
            )

    def _check_zero_points(
        self, point: QuantPoint, zeros: np.ndarray[Any, Any], *, signed: bool, place: str
    ) -> None:
        qmin, qmax = quantized_range(point.spec, signed=signed)
        wanted = point.spec.signedness
        if wanted != "from_range" and signed != (wanted == "signed"):
            raise FormatError(
                f"{place} is {'signed' if signed else 'unsigned'}, but {wanted} in the plan. "
                "Are --rules and --set those that the table was made with?"
            )
        if zeros.min() < qmin or zeros.max() > qmax:
            raise FormatError(
                f"{place} has a zero_point outside of [{qmin}, {qmax}]. Is the rule the one that "
                "the table was made with?"
            )
        if point.spec.symmetric and zeros.any():
            raise FormatError(
                f"{place} has a zero_point other than 0, but is symmetric in the plan. Are --rules "
                "and --set those that the table was made with?"
            )

    def put_weights_by_absmax(self, plan: QuantPlan) -> None:
        """Give weights without an entry the scale that compilers compute: absmax / qmax.

        The scale is per channel where the plan is per-axis.
        """
        for point in plan.grid_points():
            if point.role == "weight" and point.parameters not in self.params:
                self.params[point.parameters] = self._by_absmax(point)

    def _by_absmax(self, point: QuantPoint) -> QuantParams:
        values = self.tensors[point.tensor].values
        whole = msgspec.structs.replace(point.spec, range_factor=1.0)
        return choose_qparams(*weight_range(values, whole, "minmax"), point.spec)

    def complete(self) -> dict[str, QuantParams]:
        """Return all parameters of the plan that this format can hold.

        Raises
        ------
        FormatError
            The table lacks some of them, or has none at all.
        """
        if self.missing:
            raise FormatError(
                f"{self.source}: lacks {len(self.missing)} names that the model needs: "
                f"{listed(self.missing)}. Is it the table of this model and rule?"
            )
        if self.unsaid and not self.params:
            raise FormatError(
                f"{self.source}: has no entry for any tensor of the plan. Is it the table of this "
                "model and rule?"
            )
        if self.unsaid:
            logger.warning(
                "%s: has no entries for %d tensors, which stay float: %s.",
                self.source,
                len(self.unsaid),
                listed(self.unsaid),
            )
        if self.unused:  # the plan that the table was written from leaves none
            logger.warning(
                "%s: %d entries match no quantized tensor of the plan (%s). Are --rules and "
                "--set those that the table was made with?",
                self.source,
                len(self.unused),
                listed(self.unused),
            )
        return self.params

    def signed(self, point: QuantPoint, name: str, *, lowest: bool | None = None) -> bool:
        """Return whether a point is signed, for tables that do not record it.

        Parameters
        ----------
        lowest : bool, optional
            Whether 0.0 is the lowest integer, as in a range without negative values. For tables
            whose integers count from another origin than the plan's.

        Raises
        ------
        FormatError
            Neither the table nor the plan determines it.
        """
        if point.parameters in self.params:
            return self.params[point.parameters].signed
        if point.spec.signedness != "from_range":
            return point.spec.signedness == "signed"
        if lowest is None:
            raise FormatError(
                f"{self.source}: '{name}' may be signed or unsigned, and the table does not say. "
                f"Add --set 'tensor:{point.tensor}.signedness=signed' or =unsigned."
            )
        return not lowest


def _float32(scale: ArrayLike, place: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return positive float32 scales of shape (n,)."""
    values = np.atleast_1d(np.asarray(scale, np.float64))
    with np.errstate(over="ignore", under="ignore"):
        scales = values.astype(np.float32)
    if not (scales.size and np.isfinite(scales).all() and (scales > 0).all()):
        raise FormatError(f"{place} has a scale that is not a positive float32. Calibrate again.")
    return scales


class Key(NamedTuple):
    """The key of a table entry.

    Attributes
    ----------
    name : str
        Name as written in the file.
    parameters : str
        The `QuantPoint.parameters` of the entry; empty where the entry holds no numbers.
    section : str
        Section of the file; the same name may appear in several.
    """

    name: str
    parameters: str = ""
    section: str = ""


def _no_keys(_graph: gs.Graph, _plan: QuantPlan) -> Iterable[Key]:
    return ()


def _any_name(_name: str) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of calibration tables.

    Attributes
    ----------
    summary : str
        One line that names the target and the file.
    files : dict of str to str
        Suffix of each kind of file that `writer` makes; `read` reads the kind ``table``.
    writer : function
        Calibrated -> Written. Raises FormatError if the plan lacks what the target needs.
    read : function
        (Table, Graph, QuantPlan) -> Found. Raises FormatError if the file is not such a table.
    keys : function
        (Graph, QuantPlan) -> the keys that `writer` writes. Needed only where names may collide or
        the file cannot hold every name (JSON can).
    misread : function
        name -> why the target would not read it as one name, or None.
    per_reader : bool
        Whether the file can hold one scale of a tensor for one reader, and another for others.
    stated : dict of str to tuple of str
        Attributes that the target takes for another value than ONNX's default if a node leaves
        them out, or refuses, by op type. `strip` writes them out.
    """

    summary: str
    files: Mapping[str, str]
    writer: Callable[[Calibrated], Written]
    read: Callable[[Table, gs.Graph, QuantPlan], Found]
    keys: Callable[[gs.Graph, QuantPlan], Iterable[Key]] = _no_keys
    misread: Callable[[str], str | None] = _any_name
    per_reader: bool = False
    stated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def name_problems(self, graph: gs.Graph, plan: QuantPlan) -> list[str]:
        """Return the names that the file cannot hold; the model need not be calibrated."""
        problems: dict[str, None] = {}
        for name in () if self.per_reader else plan.requantized().values():
            problems[f"{name!r} has two scales; the table holds one for each tensor"] = None
        known: dict[tuple[str, str], str] = {}
        for key in self.keys(graph, plan):
            why = self.misread(key.name)
            if why:
                problems[f"{key.name!r} {why}"] = None
            elif known.setdefault((key.section, key.name), key.parameters) != key.parameters:
                problems[f"{key.name!r} would be the name of two tensors"] = None
        return list(problems)

    def write(self, source: Calibrated) -> Written:
        """Write a calibrated model as files.

        Raises
        ------
        FormatError
            The model has names or a plan that the target could not read.
        """
        refuse(
            self.name_problems(source.graph, source.plan),
            "Rename these in the model, or use the table 'onnxqat'",
        )
        return self.writer(source)
