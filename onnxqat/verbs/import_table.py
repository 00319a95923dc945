"""Make a calibrated Q/DQ model from a calibration table and its float model."""

from __future__ import annotations

from pathlib import Path

from onnxqat.deploy import read_table
from onnxqat.quantized import QuantizedModel, Stage, insert_pairs
from onnxqat.verbs.models import AnySource, float_model, name_of
from onnxqat.verbs.planning import AnyRule, Overrides, planned, rule_of

__all__ = ["import_table"]


def import_table(
    table: str | Path,
    model: AnySource,
    *,
    rules: AnyRule = "onnxruntime-cpu",
    overrides: Overrides = (),
    format_name: str | None = None,
) -> QuantizedModel:
    """Return the calibrated model of a table and its float model, like ``onnxqat import-table``.

    Parameters
    ----------
    table : str or Path
        The calibration table.
    model : str, Path or Model
        The float model. It is not changed.
    rules, overrides
        The rule and overrides that the table was made with, see `onnxqat.insert`.
    format_name : str, optional
        The format of the table, see docs/formats.md (default: the format of the rule).

    Raises
    ------
    OnnxQatError
        A file cannot be read, or the table does not belong to this model and rule.
    """
    prepared, found = planned(float_model(model), rule_of(rules), overrides)
    found, params = read_table(table, prepared, found, table=format_name)
    done = {"rules": found.rule, "set": list(found.overrides), "format": format_name}
    inputs = {"table": Path(table).name, "model": Path(name_of(model)).name}
    stage = Stage(
        name="import-table",
        settings=done,
        figures={"parameters": float(len(params))},
        inputs=inputs,
    )
    return insert_pairs(prepared, found, params, state="calibrated").with_stage(stage)
