"""What leaves for the chip: the float model with tuned weights, and the calibration table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from onnxqat.errors import FormatError, OnnxQatError, PlanError, RuleError
from onnxqat.files import check_writable, write_text
from onnxqat.formats import float_ops, params_from_table, sophgo, table_of
from onnxqat.insert import plan_of, read_params, state_of, strip
from onnxqat.model import Model, save_model
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.prepare.float16 import FLOAT16_KEY, narrow_to_float16
from onnxqat.qparams import QuantParams, fake_quantize
from onnxqat.rules import load_rule

__all__ = ["deployed_model", "read_table", "write_deployment"]


def deployed_model(model: Model, *, weights: Literal["snapped", "tuned"]) -> Model:
    """Return the float model of a Q/DQ model; float16 where the model it was made from was.

    Parameters
    ----------
    model : Model
        Calibrated or fine-tuned.
    weights : {"snapped", "tuned"}
        ``snapped`` puts every quantized weight on its grid, ``round(w / s) * s``, so that any
        compiler that rounds it to this grid again gets the integers that training used;
        ``tuned`` keeps the weights as trained.
    """
    plan, params = plan_of(model), read_params(model)
    floats = strip(model)
    if weights == "snapped":
        tensors = floats.graph.tensors()
        for point in plan.grid_points():
            if point.role == "weight":
                tensor = tensors[point.tensor]
                snapped = fake_quantize(tensor.values, params[point.parameters], point.spec)
                tensor.values = np.asarray(snapped)  # of a scalar, arithmetic makes no array
    note = model.metadata.get(FLOAT16_KEY)
    return floats if note is None else narrow_to_float16(floats, note)


def write_deployment(
    model: Model,
    folder: str | Path,
    *,
    table: str | None = None,
    weights: Literal["snapped", "tuned"] = "snapped",
    force: bool = False,
) -> dict[str, Path]:
    """Write ``model.onnx`` and the calibration table into ``folder``.

    Parameters
    ----------
    table : {"sophgo", "none"}, optional
        The rule's own table by default.

    Returns
    -------
    dict of str to Path
        What was written: ``model``, ``table``, and ``qtable`` where ops run in float.

    Raises
    ------
    PlanError
        The model is not calibrated.
    FormatError
        The table cannot say what the plan says.
    """
    rule = plan_of(model).rule  # of a float model, an error
    if state_of(model) == "uncalibrated":
        raise PlanError(f"{model.name}: is not calibrated. Calibrate or fine-tune it first.")
    texts = _texts(model, table or _table_of_rule(rule))
    folder = Path(folder)
    tables = {kind: folder / f"model_{suffix}" for kind, suffix in SUFFIXES.items()}
    paths = {"model": folder / "model.onnx"} | {kind: tables[kind] for kind in texts}
    # a table of an earlier model would pass for one of this model
    stale = [path for kind, path in tables.items() if kind not in texts]
    _make_folder(folder, (*paths.values(), *filter(Path.exists, stale)), force=force)
    save_model(deployed_model(model, weights=weights), paths["model"], force=force)
    for kind, text in texts.items():
        write_text(paths[kind], text, force=force)
    for path in stale:
        path.unlink(missing_ok=True)
    return paths


SUFFIXES = {"table": "cali_table", "qtable": "qtable"}


def _texts(model: Model, table: str) -> dict[str, str]:
    """Return the tables' texts by kind."""
    if table != "sophgo":
        return {}
    texts = {"table": sophgo.write(table_of(model))}
    if floats := float_ops(model):
        texts["qtable"] = sophgo.write_qtable(floats)
    return texts


def _make_folder(folder: Path, outputs: Iterable[Path], *, force: bool) -> None:
    """Make the folder, and refuse outputs in it that could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxQatError(
            f"{folder}: cannot be made ({error.strerror}). Choose another directory."
        ) from error
    for path in outputs:
        check_writable(path, force=force)


def _table_of_rule(name: str) -> str:
    """Return the table a bundled rule asks for; a rule of the user's own says it with --format."""
    try:
        return load_rule(name).table or "none"
    except RuleError as error:
        raise RuleError(
            f"The model was made with rule '{name}', which is not bundled. Say which table to "
            "write with --format."
        ) from error


def read_table(
    path: str | Path, model: Model, plan: QuantPlan
) -> tuple[QuantPlan, dict[str, QuantParams]]:
    """Read a Sophgo table for a prepared float model and a plan made for it.

    Returns
    -------
    plan, params
        The plan with signedness as the table has it, and the parameters.

    Raises
    ------
    FormatError
        The file is not such a table, or not that of this model and rule.
    """
    path = Path(path)
    if not all(p.spec.symmetric for p in plan.grid_points()):
        raise FormatError(
            f"{path}: cannot be read under the rule '{plan.rule}', which is asymmetric; a Sophgo "
            "table holds symmetric ranges only. Name the rule it was made with by --rules."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise FormatError(f"{path}: cannot be read ({reason}). Give a cali_table.") from error
    params = params_from_table(model.graph, plan, sophgo.read(text, str(path)), str(path))

    def resolved(point: QuantPoint) -> QuantPoint:
        if point.role == "bias" or (point.role == "weight" and point.group is None):
            return point
        signedness = "signed" if params[point.parameters].signed else "unsigned"
        spec = msgspec.structs.replace(point.spec, signedness=signedness)
        return msgspec.structs.replace(point, spec=spec)

    return msgspec.structs.replace(plan, points=tuple(map(resolved, plan.points))), params
