"""A float model with Q/DQ pairs where a rule says."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from onnxqat.calibration import (
    Calibration,
    placeholder_params,
    resolved_plan,
    without_large_biases,
)
from onnxqat.choices import check_choice
from onnxqat.data import DataSet
from onnxqat.deploy import name_problems
from onnxqat.foreign import ForeignParams, read_foreign_qdq, take_over
from onnxqat.formats.format import refuse
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.plan import QuantPlan
from onnxqat.quantized import QuantizedModel, Stage, insert_pairs
from onnxqat.repair import RELU6, Equalized, Relu6
from onnxqat.rules import HardwareRule
from onnxqat.settings import Settings, settle
from onnxqat.verbs.calibrate import calibrate
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, float_model, name_of
from onnxqat.verbs.opening import AnyData, opened
from onnxqat.verbs.planning import AnyRule, Overrides, rule_of
from onnxqat.verbs.repairing import Equalization, repaired, repairs

__all__ = ["insert"]


def insert(
    model: AnySource,
    *,
    rules: AnyRule = "onnxruntime-cpu",
    overrides: Overrides = (),
    data: AnyData | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
    equalize: bool = False,
    relu6: Relu6 = "auto",
    format_name: str | None = None,
    listener: Listener = Listener(),  # noqa: B008 (without state)
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> QuantizedModel:
    """Return the model with Q/DQ pairs as the rule says, as ``onnxqat insert`` does.

    Pairs of another tool are taken out, and their parameters taken over where they fit the rule.

    Parameters
    ----------
    model : str, Path or Model
        The float model. It is not changed.
    rules : str, Path or HardwareRule
        A bundled rule's name, or a ``.toml`` file.
    overrides : path, or iterable of str or Override
        A TOML file, or ``SELECTOR.KEY=VALUE`` each, see `onnxqat.overrides`; later ones win.
    data : path, arrays or DataSet, optional
        Calibrates on them too; the scales are placeholders without.
    settings : Settings
        What becomes of the data, which the model remembers.
    calibration : Calibration
        With ``data``: how it is done.
    equalize, relu6 : bool, {"auto", "keep", "replace"}
        Whether channels are given ranges alike first, and how, see `onnxqat.repair.equalize`; with
        ``data``, as far as these are needed for it too.
    format_name : str, optional
        Calibration table that `strip` is to write, or ``none``; the rule's own by default.
    listener : Listener
        Is told what is done.
    workers : Workers
        The processes that calibrate together, see `onnxqat.parallel`.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, the rule quantizes nothing in the model, or
        the table cannot hold the model's names.
    """
    floats, foreign = read_foreign_qdq(float_model(model))
    settle(floats, settings)  # now, before any work is done for settings that are wrong
    check_choice("relu6", relu6, RELU6)
    rule = rule_of(rules)
    with ExitStack() as stack:

        def samples(prepared: Model) -> DataSet:
            assert data is not None
            return stack.enter_context(opened(prepared, data, settings, listener, labels=False))

        equalization = Equalization(relu6, samples if data is not None else None)
        prepared, found = repaired(
            floats, equalization if equalize else None, foreign, rule, overrides
        )
        _refuse_names(prepared, found, format_name or rule.table)
        result = _inserted(prepared, found, foreign, listener)
        if equalization.result is not None:
            result = replace(result, source=equalization.source)
            equalization.tell(listener)
        else:
            for line in repairs(prepared, found, name_of(model)):
                listener.note(line)
        result = result.with_stage(_stage(name_of(model), rule, found, equalization))
        if data is None:
            return result
        shared: Any = {"calibration": calibration, "listener": listener, "workers": workers}
        if equalization.samples is not None:  # open already: an iterator is read once
            return _told_of_data(calibrate(result, equalization.samples, **shared))
        return _told_of_data(calibrate(result, data, settings=settings, **shared))


def _stage(name: str, rule: HardwareRule, plan: QuantPlan, equalization: Equalization) -> Stage:
    done: dict[str, Any] = {"rules": rule.name, "set": list(plan.overrides)}
    if equalization.result is not None:
        done |= {"equalize": True, "relu6": equalization.relu6}
    inputs, figures = {"model": Path(name).name}, _figures(equalization.result)
    return Stage(name="insert", settings=done, inputs=inputs, figures=figures)


def _told_of_data(model: QuantizedModel) -> QuantizedModel:
    """Return a model whose history says that inserting read the data too, as calibrating did."""
    *earlier, inserted, calibrated = model.history
    inputs = inserted.inputs | calibrated.inputs
    inserted = msgspec.structs.replace(inserted, inputs=inputs)
    return replace(model, history=(*earlier, inserted, calibrated))


def _figures(found: Equalized | None) -> dict[str, float | None]:
    """Return what equalization changed: layers, and how far channels lie below the largest."""
    if found is None:
        return {}
    octaves = ((one.before, one.after) for one in found.spreads)
    before, after = map(max, zip((0.0, 0.0), *octaves, strict=True))
    layers, relu6 = float(len(found.layers)), float(len(found.relu6.nodes))
    return {
        "equalized": layers,
        "relu6_replaced": relu6,
        "octaves.before": before,
        "octaves.after": after,
    }


def _refuse_names(prepared: Model, plan: QuantPlan, table: str | None) -> None:
    """Refuse now what `strip` could not write after the training."""
    refuse(
        name_problems(prepared, plan, table),
        f"The table '{table}' could not be read. Rename these in the model, or give insert and "
        "strip --format onnxqat, which holds any name",
    )


def _inserted(
    prepared: Model, plan: QuantPlan, foreign: Mapping[str, ForeignParams], listener: Listener
) -> QuantizedModel:
    """Insert the pairs, with the parameters of another tool where the model had some."""
    params = placeholder_params(prepared, plan)
    taken, ignored = take_over(plan, prepared.graph, foreign)
    missing = params.keys() - taken.keys()
    if not foreign:
        return insert_pairs(prepared, plan, params, state="uncalibrated")
    listener.note(f"{len(taken)} of {len(params)} parameters are those of the model's pairs.")
    if missing:
        listener.note(f"Calibration measures the others: {', '.join(sorted(missing))}.")
    if ignored:
        listener.note(f"Pairs that do not fit the rule: {', '.join(ignored)}.")
    if missing:
        result = insert_pairs(prepared, plan, params | taken, state="uncalibrated")
        return replace(result, taken=tuple(sorted(taken)))
    plan = without_large_biases(resolved_plan(plan, taken), taken, prepared.graph.tensors())
    return insert_pairs(prepared, plan, taken, state="calibrated")
