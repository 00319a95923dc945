"""Run a model over data batch by batch and compute figures.

Mode ``float`` removes Q/DQ first. Mode ``qdq`` runs the file node by node without fusion, so that
it computes exactly what the pairs say. Mode ``integer`` uses the integer arithmetic of the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.choices import check_choice
from onnxqat.computable import computable
from onnxqat.data import Batch
from onnxqat.device import CPU, Device
from onnxqat.errors import DataError, ModelError
from onnxqat.evaluation.integer import IntegerProgram, PointDifference, other_programs
from onnxqat.evaluation.labels import Hits, doubt
from onnxqat.evaluation.likeness import Likeness, OutputFigures
from onnxqat.evaluation.metrics import Meters, Metric, figure_text
from onnxqat.outputs import outputs_of
from onnxqat.quantized import AnyModel, QuantizedModel, float_part, require_quantized
from onnxqat.rules import HardwareRule
from onnxqat.runtime import Optimization, UnknownOpError, open_session

__all__ = [
    "MODES",
    "Assumed",
    "Evaluation",
    "Mode",
    "Samples",
    "check_interface",
    "evaluate",
    "model_session",
]

Mode = Literal["float", "qdq", "integer"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Samples(Protocol):
    """The part of a batch that evaluation reads."""

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """Model inputs by name."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class indices of shape (N,), or None."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """Figures over a data set.

    Attributes
    ----------
    samples : int
        Number of samples.
    metrics : dict of str to float
        With labels: ``top1`` and, for ten classes or more, ``top5``, as fractions. Also the figures
        of the requested metrics.
    reference : dict of str to float
        The same figures of the reference model, except those that compare with it.
    first : dict of str to str
        Name of the first figure of each requested metric, by name of the metric.
    agreement : float or None
        Agreement of the first output that has one, see `OutputFigures`. None without a reference,
        and if no output has class scores or integers.
    max_abs_diff : float or None
        Largest difference between an output value and the reference model's, in the output's
        units; NaN if any is NaN.
    outputs : tuple of OutputFigures
        Figures of each output, compared with the reference model.
    points : tuple of PointDifference
        Differences of each quantized tensor from the fake-quantized model; only with
        ``mode="integer"``.
    loss : float or None
        The training loss, if the best state is chosen by it.
    classes : int or None
        Number of classes; None without labels.
    confidence, reference_confidence : float or None
        Mean of the largest probability, of the model and the reference; None without labels.
    note : str
        Which tensors replace outputs that onnxruntime cannot compute; empty if it computes all.
    assumed : tuple of Assumed
        With ``mode="integer"``, if the rule assumes a part of its chip's arithmetic: the figures of
        each combination. The other attributes belong to the first one.
    """

    samples: int
    metrics: dict[str, float]
    reference: dict[str, float]
    agreement: float | None = None
    max_abs_diff: float | None = None
    points: tuple[PointDifference, ...] = ()
    loss: float | None = None
    outputs: tuple[OutputFigures, ...] = ()
    classes: int | None = None
    confidence: float | None = None
    reference_confidence: float | None = None
    note: str = ""
    assumed: tuple[Assumed, ...] = ()
    first: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        found = self.metrics | ({} if self.agreement is None else {"agreement": self.agreement})
        figures = "".join(f", {name} {figure_text(name, value)}" for name, value in found.items())
        return f"Evaluation({self.samples} samples{figures})"

    @property
    def assumption(self) -> str:
        """What the rule assumes, and the range of the figures; empty if it assumes nothing."""
        if not self.assumed:
            return ""
        names = ", ".join(self.assumed[0].values)
        found = [
            one.metrics | ({} if one.agreement is None else {"agreement": one.agreement})
            for one in self.assumed
        ]
        ranges = (
            f"{name} {figure_text(name, min(f[name] for f in found))} to "
            f"{figure_text(name, max(f[name] for f in found))}"
            for name in found[0]
        )
        return (
            f"not documented: {names}; {len(found)} assumed combinations gave "
            f"{', '.join(ranges)}; the chip's figures may lie outside"
        )

    @property
    def doubt(self) -> str | None:
        """Why the labels cannot be the model's own, or None; see `onnxqat.evaluation.labels`.

        With a reference, the figures of the reference are judged, since it may be the float model.
        """
        figures, confidence = self.metrics, self.confidence
        if self.reference:
            figures, confidence = self.reference, self.reference_confidence
        if "top1" not in figures:
            return None
        return doubt(figures["top1"], self.samples, self.classes or 0, confidence)


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Figures for one combination of what a rule assumes of its chip's arithmetic.

    Attributes
    ----------
    values : dict of str to str
        The assumed values, by key of the rule's table ``arithmetic``.
    metrics, agreement : dict of str to float, float or None
        As in `Evaluation`.
    """

    values: dict[str, str]
    metrics: dict[str, float]
    agreement: float | None


class _Runner(Protocol):
    """A model that can run: an onnxruntime session or an `IntegerProgram`."""

    def run(self, names: None, inputs: dict[str, NDArray[Any]]) -> Any:
        """Return the model's outputs."""


def model_session(
    model: AnyModel,
    mode: Literal["float", "qdq"],
    *,
    threads: int = 0,
    device: Device = CPU,
) -> ort.InferenceSession:
    """Return a session of ``model`` in a mode; both modes run a float model as it is."""
    if mode == "float":
        model = float_part(model)
    optimization: Optimization = "all"
    if isinstance(model, QuantizedModel):
        model.check_calibrated()
        optimization = "none"
    return open_session(
        model.to_proto(),
        optimization=optimization,
        threads=threads,
        name=model.name,
        device=device,
    )


def evaluate(
    model: AnyModel,
    batches: Iterable[Samples],
    *,
    mode: Mode = "qdq",
    against: AnyModel | None = None,
    rule: HardwareRule | None = None,
    metrics: Sequence[Metric] = (),
    threads: int = 0,
    device: Device = CPU,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run a model over data; return its accuracy, its metrics and its agreement with a reference.

    Parameters
    ----------
    model : Model
        Float or Q/DQ.
    batches : iterable of batches
        Batches of data. Labels give ``top1`` and ``top5``.
    mode : {"float", "qdq", "integer"}
        How to run ``model``.
    against : Model, optional
        Reference model. A Q/DQ reference runs with its pairs. The default with ``integer`` is
        ``model`` itself with its pairs, with other modes no reference.
    rule : HardwareRule, optional
        Rule whose arithmetic ``integer`` uses (default: the bundled rule of the model's plan).
    metrics : sequence of Metric
        Further metrics; the batches must have the arrays that they need.
    device : Device
        The device that runs the models; mode ``integer`` always uses the CPU.
    progress : callable
        Called after each batch.

    Raises
    ------
    DataError
        There are no samples, a label is outside of the model's classes, or a metric raised.
    ModelError
        The reference has other inputs or outputs, or a model cannot run on the data.
    PlanError
        A model that is run with its Q/DQ pairs is not calibrated.
    RuleError
        ``integer``: the arithmetic of the rule, or of an op, is not documented.
    """
    check_choice("mode", mode, MODES)
    if against is not None:
        check_interface(model, against)
    try:
        program, runs = _runs(model, mode, against, rule, threads, device)
        lost = None
    except UnknownOpError:
        lost = computable(model)
        model, against = lost.model, against and computable(against).model
        if against is not None:
            check_interface(model, against)
        program, runs = _runs(model, mode, against, rule, threads, device)
    labelled = lost is None or not lost.first_lost
    values, programs = (
        other_programs(require_quantized(model), rule, threads) if program else ([], [])
    )
    with ExitStack() as stack:
        counts = [
            _Counts(
                model,
                stack.enter_context(
                    Meters(metrics, outputs_of(float_part(model).graph), compared=len(runs) > 1)
                ),
                labelled=labelled,
            )
            for _ in range(1 + len(programs))
        ]
        for batch in batches:
            outputs, *expected = (_run(session, batch, run) for session, run in runs)
            counts[0].add(batch, outputs, *expected)
            for other, one in zip(programs, counts[1:], strict=True):
                one.add(batch, _run(other, batch, model), *expected)
            progress()
        result, *others = (one.result() for one in counts)
    result = replace(
        result,
        note=lost.note if lost else "",
        assumed=tuple(
            Assumed(values=v, metrics=one.metrics, agreement=one.agreement)
            for v, one in zip(values, (result, *others), strict=False)
        ),
    )
    return replace(result, points=program.points) if program else result


def _runs(
    model: AnyModel,
    mode: Mode,
    against: AnyModel | None,
    rule: HardwareRule | None,
    threads: int,
    device: Device,
) -> tuple[IntegerProgram | None, list[tuple[_Runner, AnyModel]]]:
    """Return the integer program, if any, and a runner for the model and for its reference."""
    integer = mode == "integer"
    program = IntegerProgram(require_quantized(model), rule, threads=threads) if integer else None
    against = model if program and against is None else against
    ours: _Runner = program or model_session(
        model, "float" if mode == "float" else "qdq", threads=threads, device=device
    )
    runs = [(ours, model)]
    if against is not None:
        runs.append((model_session(against, "qdq", threads=threads, device=device), against))
    return program, runs


def check_interface(model: AnyModel, other: AnyModel, *, output_names: bool = False) -> None:
    """Refuse two models that cannot be compared.

    Parameters
    ----------
    output_names : bool
        Whether the names of the outputs must agree too, not only their number.

    Raises
    ------
    ModelError
        The models differ in the names of their inputs, or in their outputs.
    """
    inputs, others = ({t.name for t in float_part(m).graph.inputs} for m in (model, other))
    if inputs != others:
        raise ModelError(
            f"{other.name}: has the inputs {_listed(others)}, {model.name} has {_listed(inputs)}. "
            "Give models with the same inputs."
        )
    ours, theirs = ([t.name for t in float_part(m).graph.outputs] for m in (model, other))
    if len(ours) != len(theirs) or (output_names and ours != theirs):
        raise ModelError(
            f"{other.name}: has the outputs {_listed(theirs)}, {model.name} has {_listed(ours)}. "
            "Give models with the same outputs."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _halved(inputs: dict[str, NDArray[Any]], model: AnyModel) -> dict[str, NDArray[Any]]:
    """Return the inputs; convert those to float16 that a reference model takes as float16."""
    halves = {t.name for t in float_part(model).graph.inputs if t.dtype == np.float16}
    return {n: v.astype(np.float16) if n in halves else v for n, v in inputs.items()}


def _run(session: _Runner, batch: Samples, model: AnyModel) -> list[NDArray[Any]]:
    outputs: list[NDArray[Any]] = session.run(None, _halved(batch.inputs, model))
    if not isinstance(batch, Batch):
        return outputs
    count, size = len(batch.indices), batch.size
    first = [output.ndim > 0 and len(output) == size for output in outputs]
    return [o[:count] if f else batch.counting(o) for o, f in zip(outputs, first, strict=True)]


class _Counts:
    """Running sums of an evaluation."""

    def __init__(self, model: AnyModel, meters: Meters, *, labelled: bool) -> None:
        self.samples, self.labelled, self.meters = 0, labelled, meters
        self.hits, self.reference = Hits(), Hits()
        self.likeness = [Likeness(output) for output in outputs_of(float_part(model).graph)]
        self.compared = False

    def add(
        self,
        batch: Samples,
        outputs: list[NDArray[Any]],
        expected: list[NDArray[Any]] | None = None,
    ) -> None:
        rows = batch.indices if isinstance(batch, Batch) else next(iter(batch.inputs.values()))
        self.samples += len(rows)
        self.meters.add(batch, outputs, expected)
        labels = batch.labels if self.labelled else None
        if labels is not None:
            self.hits.add(outputs[0], labels)
        if expected is None:
            return
        self.compared = True
        if labels is not None:
            self.reference.add(expected[0], labels)
        for likeness, ours, theirs in zip(self.likeness, outputs, expected, strict=True):
            likeness.add(ours, theirs)

    def result(self) -> Evaluation:
        if not self.samples:
            raise DataError("There are no samples to evaluate.")
        outputs = tuple(one.result() for one in self.likeness) if self.compared else ()
        agreements = [o.agreement for o in outputs if o.agreement is not None]
        differences = [o.max_abs_diff for o in outputs if o.max_abs_diff is not None]
        measured = self.meters.result()
        return Evaluation(
            samples=self.samples,
            metrics=self.hits.fractions | measured.metrics,
            reference=self.reference.fractions | measured.reference,
            first=measured.first,
            agreement=agreements[0] if agreements else None,
            # Python's own max can lose a NaN
            max_abs_diff=float(np.max(differences)) if differences else None,
            outputs=outputs,
            classes=self.hits.classes or None,
            confidence=self.hits.confidence,
            reference_confidence=self.reference.confidence,
        )
