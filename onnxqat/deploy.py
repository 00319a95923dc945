"""Write the files for the chip: the float model with tuned weights, and the calibration table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec
import numpy as np

from onnxqat.calibration import without_large_biases
from onnxqat.camera import Camera, take_yuv
from onnxqat.choices import check_choice
from onnxqat.errors import FormatError, OnnxQatError, OptionError, RuleError
from onnxqat.files import atomic_outputs, check_readable, check_writable
from onnxqat.fixed_shapes import fix_shapes
from onnxqat.formats import FORMATS, Calibrated, Format, Table, Written
from onnxqat.formats.format import listed
from onnxqat.handoff import HANDOFF_FILES, HANDOFFS, facts_of
from onnxqat.model import Model, write_model
from onnxqat.nodes import state_attributes
from onnxqat.plan import QuantPlan, QuantPoint, Skip, remove_requantizations
from onnxqat.preparation.float16 import FLOAT16_KEY, narrow_to_float16
from onnxqat.qparams import QuantParams, quantize
from onnxqat.quantized import QuantizedModel, require_quantized, without_notes
from onnxqat.rules import HardwareRule, load_rule
from onnxqat.settings import stored_settings
from onnxqat.snap import snap_weights

__all__ = [
    "MODEL_NAME",
    "Deployment",
    "Weights",
    "deployed_model",
    "deployed_names",
    "name_problems",
    "read_table",
    "write_deployment",
]

logger = logging.getLogger(__name__)

MODEL_NAME = "model.onnx"
Weights: TypeAlias = Literal["snapped", "tuned"]
MAX_BYTES = 256 * 2**20  # ten times the size of a table for a billion-parameter network


@dataclass(frozen=True, kw_only=True, repr=False)
class Deployment:
    """The written files, and what the calibration table cannot express.

    Attributes
    ----------
    files : dict of str to Path
        ``model``, ``table``, other files of the format, and files that call the vendor's compiler,
        by their names (``compile.sh``).
    left_out : dict of str to tuple of str
        Names that the plan contains and the table cannot express, by kind.
    regridded : dict of str to int
        Weights that the target quantizes on another grid than training did, because the table has
        no scales for them, and the number of their integers that differ.
    """

    files: Mapping[str, Path]
    left_out: Mapping[str, tuple[str, ...]]
    regridded: Mapping[str, int]

    def __repr__(self) -> str:
        files = ", ".join(f"{kind} '{path}'" for kind, path in self.files.items())
        return f"Deployment({files})"


def deployed_model(model: QuantizedModel, *, weights: Weights) -> Model:
    """Return the float model of a Q/DQ model, in float16 if the original model was float16.

    Parameters
    ----------
    model : QuantizedModel
        A calibrated or fine-tuned model.
    weights : {"snapped", "tuned"}
        ``snapped`` puts each quantized weight on its grid, ``round(w / s) * s``, so that a compiler
        that rounds it to this grid gets the integers that training used; other readers of the same
        constant keep its values. ``tuned`` keeps the weights as trained.
    """
    check_choice("weights", weights, get_args(Weights))
    if weights == "snapped":
        model.check_calibrated()
    floats = model.floats.copy()
    remove_requantizations(floats.graph)
    note = floats.metadata.get(FLOAT16_KEY)
    floats.metadata = without_notes(floats.metadata)
    if weights == "snapped":
        points = (p for p in model.plan.grid_points() if p.role == "weight")
        snap_weights(floats.graph, ((p, model.params[p.parameters]) for p in points))
    return floats if note is None else narrow_to_float16(floats, note)


def write_deployment(
    model: QuantizedModel,
    folder: str | Path,
    *,
    table: str | None = None,
    weights: Weights = "snapped",
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    camera: Camera | None = None,
    force: bool = False,
) -> Deployment:
    """Write ``model.onnx`` and the calibration table into ``folder``.

    Parameters
    ----------
    table : str, optional
        A name in `onnxqat.formats.FORMATS`, or ``none`` (default: the format of the rule).
    batch : int, optional
        Length for the first axis of each input, if it is dynamic (default: it stays dynamic).
    input_shapes : mapping of str to sequence of int, optional
        Complete shapes of inputs, see `onnxqat.fixed_shapes`.
    camera : Camera, optional
        Pixels that the model is fed, for Horizon's table (default: as it was trained).

    Raises
    ------
    OptionError
        A shape does not fit the model, or the model cannot take a camera's pixels.
    PlanError
        The model is not calibrated.
    FormatError
        The table cannot express the plan.
    """
    require_quantized(model).check_calibrated()
    check_choice("weights", weights, get_args(Weights))
    name = table or _table_of_rule(model.plan.rule)
    chosen = _format(name)
    floats = deployed_model(model, weights=weights)
    if chosen:
        state_attributes(floats.graph, chosen.stated)
    if batch is not None or input_shapes:
        floats = fix_shapes(floats, batch, input_shapes or {})
    rule = _bundled_rule(model.plan.rule)
    written = chosen.write(Calibrated(model, rule)) if chosen else Written(files={})
    regridded = _regridded(chosen, written, model, floats) if chosen else {}
    if camera is not None:
        _check_camera(name)
        floats = take_yuv(floats, stored_settings(model).preprocessing(), camera)
    folder = Path(folder)
    paths = {"model": folder / MODEL_NAME}
    paths |= {kind: folder / f"model_{chosen.files[kind]}" for kind in written.files if chosen}
    handoff = {}  # the commands of some vendors' compilers are unknown
    tool = name if name in HANDOFFS else (rule and rule.target) or ""
    if tool in HANDOFFS:
        names = {kind: path.name for kind, path in paths.items()}
        handoff = HANDOFFS[tool](facts_of(model, floats, rule=rule, files=names, camera=camera))
    paths |= {file: folder / file for file in handoff}
    # a table of an earlier model could be taken for one of this model
    outdated = [folder / file for file in deployed_names()]
    _make_folder(folder, (*paths.values(), *filter(Path.exists, outdated)), force=force)
    with atomic_outputs(*paths.values(), outdated=outdated, force=force) as (model_file, *others):
        write_model(floats, model_file)
        contents = (*written.files.values(), *handoff.values())
        for path, content in zip(others, contents, strict=True):
            path.write_bytes(_bytes(content))
    _tell(written.left_out, regridded)
    return Deployment(files=paths, left_out=written.left_out, regridded=regridded)


def _check_camera(table: str) -> None:
    if table != "horizon":
        raise OptionError(
            f"--input-type-rt works only with the table 'horizon', not with '{table}'. Leave the "
            "option out, or pass --format horizon."
        )


def _bundled_rule(name: str) -> HardwareRule | None:
    """Return a bundled rule; None for a rule file of the user."""
    try:
        return load_rule(name)
    except RuleError:
        return None


def deployed_names() -> list[str]:
    """Return the names of all files that can be written beside the model."""
    tables = {f"model_{suffix}" for f in FORMATS.values() for suffix in f.files.values()}
    return sorted({*tables, *HANDOFF_FILES})


def name_problems(model: Model, plan: QuantPlan, table: str | None) -> list[str]:
    """Return the names that a table cannot express, with reasons; no parameters are needed.

    Parameters
    ----------
    model : Model
        The prepared float model that the plan was made for.
    table : str or None
        A name in `onnxqat.formats.FORMATS`, or ``none``.

    Raises
    ------
    FormatError
        The format is unknown.
    """
    chosen = _format(table or "none")
    return chosen.name_problems(model.graph, plan) if chosen else []


def _format(name: str) -> Format | None:
    check_choice("Table", name, (*FORMATS, "none"), FormatError)
    return FORMATS.get(name)


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


def _regridded(
    chosen: Format, written: Written, model: QuantizedModel, floats: Model
) -> dict[str, int]:
    """Read the table back; return the weights whose integers differ from those of training.

    Raises
    ------
    FormatError
        An activation has other parameters after reading the table back.
    """
    source = Calibrated(model)
    table = Table(name="table", data=_bytes(written.files["table"]))
    found = chosen.read(table, floats.graph, source.plan).params
    for point, params in source.points("activation"):
        if point.parameters in found and not params.same_as(found[point.parameters]):
            raise FormatError(
                f"'{point.tensor}' has other parameters when its table is read back. Calibrate "
                "again."
            )
    old, new = source.graph.tensors(), floats.graph.tensors()
    differing = {}
    for point, params in source.points("weight"):
        if point.parameters in found:
            trained = quantize(old[point.tensor].values, params, point.spec)
            by_target = quantize(new[point.tensor].values, found[point.parameters], point.spec)
            differing[point.tensor] = int(np.count_nonzero(trained != by_target))
    return {name: count for name, count in differing.items() if count}


def _tell(left_out: Mapping[str, tuple[str, ...]], regridded: Mapping[str, int]) -> None:
    for kind, names in left_out.items():
        logger.info("The table leaves out %d %s: %s.", len(names), kind, listed(names))
    if regridded:
        logger.warning(
            "The table does not contain the grid of %d weights, so the compiler will choose other "
            "integers than training (their number in brackets): %s. See docs/formats.md.",
            len(regridded),
            listed([f"{name} ({count})" for name, count in regridded.items()]),
        )


def _make_folder(folder: Path, outputs: Iterable[Path], *, force: bool) -> None:
    """Create the folder, and refuse outputs that could not be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxQatError(
            f"{folder}: cannot be created ({error.strerror}). Choose another directory."
        ) from error
    for path in outputs:
        check_writable(path, force=force)


def _table_of_rule(name: str) -> str:
    """Return the table format of a bundled rule; for other rules the user must name it."""
    try:
        return load_rule(name).table or "none"
    except RuleError as error:
        raise RuleError(
            f"Rule '{name}' is not bundled, so its table format is unknown. Name the format with "
            "--format."
        ) from error


def read_table(
    path: str | Path, model: Model, plan: QuantPlan, *, table: str | None = None
) -> tuple[QuantPlan, dict[str, QuantParams]]:
    """Read a calibration table for a prepared float model and a plan made for it.

    Parameters
    ----------
    table : str, optional
        A name in `onnxqat.formats.FORMATS` (default: the format of the rule).

    Returns
    -------
    plan, params
        The plan with the signedness of the table, without points that the table cannot express and
        without biases that overflow at the table's scales; and the parameters. Weights without
        scales in the table are quantized by their largest absolute value.

    Raises
    ------
    FormatError
        The file is not such a table, or it does not belong to this model and rule.
    """
    path = Path(path)
    chosen = _format(table or _table_of_rule(plan.rule))
    if chosen is None:
        raise FormatError(
            f"{path}: the rule '{plan.rule}' has no table format. Name the format of the file "
            f"with --format: one of {', '.join(FORMATS)}."
        )
    params = chosen.read(_read_file(path), model.graph, plan).complete()
    plan = _as_far_as(plan, params, model)

    def resolved(point: QuantPoint) -> QuantPoint:
        if point.role == "bias" or (point.role == "weight" and point.group is None):
            return point
        signedness = "signed" if params[point.parameters].signed else "unsigned"
        spec = msgspec.structs.replace(point.spec, signedness=signedness)
        return msgspec.structs.replace(point, spec=spec)

    plan = msgspec.structs.replace(plan, points=tuple(map(resolved, plan.points)))
    return without_large_biases(plan, params, model.graph.tensors()), params


def _as_far_as(plan: QuantPlan, params: Mapping[str, QuantParams], model: Model) -> QuantPlan:
    """Return the plan without the points that have no parameters; they stay float."""
    kept = {p.tensor for p in plan.grid_points() if p.parameters in params}
    if len(kept) == len(plan.grid_points()):
        return plan
    points = tuple(
        p
        for p in plan.points
        if (set(p.derived_from or ()) if p.role == "bias" else {p.tensor}) <= kept
    )
    before, after = (
        {e.node for p in found for e in p.consumers} for found in (plan.points, points)
    )
    reason = "the calibration table has no entry for its inputs"
    skips = [Skip(n.name, n.op, reason) for n in model.graph.nodes if n.name in before - after]
    return msgspec.structs.replace(plan, points=points, skips=(*plan.skips, *skips))


def _read_file(path: Path) -> Table:
    check_readable(path, FormatError)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{path}: larger than 256 MiB. This is not a calibration table.")
        return Table(name=str(path), data=path.read_bytes())
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}). Give a calibration table."
        raise FormatError(message) from error
