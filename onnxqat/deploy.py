"""What leaves for the chip: the float model with tuned weights, and the calibration table."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from onnxqat.errors import FormatError, OnnxQatError, PlanError, RuleError
from onnxqat.files import check_writable, write_text
from onnxqat.formats import float_ops, params_from_table, sophgo, table_of
from onnxqat.insert import plan_of, read_params, state_of, strip
from onnxqat.model import Model, save_model
from onnxqat.plan import QuantPlan
from onnxqat.qparams import QuantParams, fake_quantize
from onnxqat.rules import load_rule

__all__ = ["deployed_model", "read_table", "write_deployment"]


def deployed_model(model: Model, *, weights: Literal["snapped", "tuned"]) -> Model:
    """Return the float model of a Q/DQ model.

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
                tensor.values = fake_quantize(tensor.values, params[point.parameters], point.spec)
    return floats


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
    if state_of(model) == "uncalibrated":
        raise PlanError(f"{model.name}: is not calibrated. Calibrate or fine-tune it first.")
    chosen = table or _table_of_rule(plan_of(model).rule)
    texts: dict[str, str] = {}
    if chosen == "sophgo":
        texts["table"] = sophgo.write(table_of(model))
        if floats := float_ops(model):
            texts["qtable"] = sophgo.write_qtable(floats)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxQatError(f"{folder}: cannot be made ({error.strerror}).") from error
    paths = {"model": folder / "model.onnx"}
    paths |= {kind: folder / f"model_{SUFFIXES[kind]}" for kind in texts}
    for path in paths.values():
        check_writable(path, force=force)
    save_model(deployed_model(model, weights=weights), paths["model"], force=force)
    for kind, text in texts.items():
        write_text(paths[kind], text, force=force)
    return paths


SUFFIXES = {"table": "cali_table", "qtable": "qtable"}


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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error}).") from error
    params = params_from_table(model.graph, plan, sophgo.read(text, str(path)), str(path))

    def signed(name: str) -> str:
        return "signed" if params[name].signed else "unsigned"

    points = tuple(
        msgspec.structs.replace(
            p, spec=msgspec.structs.replace(p.spec, signedness=signed(p.parameters))
        )
        if p.role == "activation"
        else p
        for p in plan.points
    )
    return msgspec.structs.replace(plan, points=points), params
