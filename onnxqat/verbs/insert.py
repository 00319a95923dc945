"""Insert Q/DQ pairs into a float model as a hardware rule says."""

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
    calibration: Calibration | None = Calibration(),  # noqa: B008 (frozen)
    equalize: bool = False,
    relu6: Relu6 = "auto",
    format_name: str | None = None,
    listener: Listener = Listener(),  # noqa: B008 (without state)
    workers: Workers = Workers(),  # noqa: B008 (without state)
) -> QuantizedModel:
    """Return the model with Q/DQ pairs as the rule says, like ``onnxqat insert``.

    Pairs of another tool are removed; their parameters are used if they fit the rule.

    Parameters
    ----------
    model : str, Path or Model
        The float model. It is not changed.
    rules : str, Path or HardwareRule
        The name of a bundled rule, or a ``.toml`` file.
    overrides : path, or iterable of str or Override
        A TOML file, or texts ``SELECTOR.KEY=VALUE``, see `onnxqat.overrides`; later ones override
        earlier ones.
    data : path, arrays or DataSet, optional
        Samples for calibration. Without them, the scales are placeholders.
    settings : Settings
        How data become model inputs; the model stores these settings.
    calibration : Calibration or None
        The calibration settings, used with ``data``. None: ``data`` are read to equalize only, and
        the scales stay placeholders.
    equalize, relu6 : bool, {"auto", "keep", "replace"}
        Whether channel ranges are equalized first, and how ReLU6 is handled, see
        `onnxqat.repair.equalize`. Steps that need samples use ``data``.
    format_name : str, optional
        Format of the calibration table that `strip` will write, or ``none`` (default: the format
        of the rule).
    listener : Listener
        Gets messages and progress.
    workers : Workers
        The processes that calibrate together, see `onnxqat.parallel`.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, the rule quantizes nothing in the model, or
        the table cannot contain the model's names.
    """
    floats, foreign = read_foreign_qdq(float_model(model))
    settle(floats, settings)  # first, so that wrong settings are refused before any work
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
        if data is None or calibration is None:
            return result
        shared: Any = {"calibration": calibration, "listener": listener, "workers": workers}
        if equalization.samples is not None:  # already open: an iterator can be read only once
            return _told_of_data(calibrate(result, equalization.samples, **shared))
        return _told_of_data(calibrate(result, data, settings=settings, **shared))


def _stage(name: str, rule: HardwareRule, plan: QuantPlan, equalization: Equalization) -> Stage:
    done: dict[str, Any] = {"rules": rule.name, "set": list(plan.overrides)}
    if equalization.result is not None:
        done |= {"equalize": True, "relu6": equalization.relu6}
    inputs, figures = {"model": Path(name).name}, _figures(equalization.result)
    return Stage(name="insert", settings=done, inputs=inputs, figures=figures)


def _told_of_data(model: QuantizedModel) -> QuantizedModel:
    """Return a model whose history lists the data of calibrating as input of inserting, too."""
    *earlier, inserted, calibrated = model.history
    inputs = inserted.inputs | calibrated.inputs
    inserted = msgspec.structs.replace(inserted, inputs=inputs)
    return replace(model, history=(*earlier, inserted, calibrated))


def _figures(found: Equalized | None) -> dict[str, float | None]:
    """Return the figures of an equalization: what it changed, and spreads of the channels."""
    if found is None:
        return {}
    octaves = ((one.before, one.after) for one in found.spreads)
    before, after = map(max, zip((0.0, 0.0), *octaves, strict=True))
    others = {"migrated": found.migrations, "absorbed": found.absorbed, "fitted": found.fitted}
    return {
        "equalized": float(len(found.layers)),
        "relu6_replaced": float(len(found.relu6.nodes)),
        "octaves.before": before,
        "octaves.after": after,
    } | {name: float(len(ones)) for name, ones in others.items() if ones}


def _refuse_names(prepared: Model, plan: QuantPlan, table: str | None) -> None:
    """Refuse names that `strip` could not write after training."""
    refuse(
        name_problems(prepared, plan, table),
        f"The table '{table}' cannot hold this. Rename tensors with such names, or pass --format "
        "onnxqat to insert and strip, which allows any name, and several scales of a tensor",
    )


def _inserted(
    prepared: Model, plan: QuantPlan, foreign: Mapping[str, ForeignParams], listener: Listener
) -> QuantizedModel:
    """Insert the pairs, with the parameters of another tool if they fit."""
    params = placeholder_params(prepared, plan)
    taken, ignored = take_over(plan, prepared.graph, foreign)
    missing = params.keys() - taken.keys()
    if not foreign:
        return insert_pairs(prepared, plan, params, state="uncalibrated")
    listener.note(f"{len(taken)} of {len(params)} parameters were taken from the model's pairs.")
    if missing:
        listener.note(f"Calibration will measure the others: {', '.join(sorted(missing))}.")
    if ignored:
        listener.note(f"Ignored pairs that do not fit the rule: {', '.join(ignored)}.")
    if missing:
        result = insert_pairs(prepared, plan, params | taken, state="uncalibrated")
        return replace(result, taken=tuple(sorted(taken)))
    plan = without_large_biases(resolved_plan(plan, taken), taken, prepared.graph.tensors())
    return insert_pairs(prepared, plan, taken, state="calibrated")
