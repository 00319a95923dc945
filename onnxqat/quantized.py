"""The quantized model: a float graph, its quantization plan, and the parameters.

Each stage takes a quantized model and returns a new one, which shares the unchanged parts. The
graph is float: Q/DQ nodes are added by `onnxqat.pairs` only for files and for runtimes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqat.check_pairs import check_pairs
from onnxqat.choices import check_choice
from onnxqat.environment import package_versions
from onnxqat.errors import ModelError, PlanError
from onnxqat.model import Model
from onnxqat.model import load_model as load_file
from onnxqat.pairs import add_pairs, check_points, params_of_pairs, remove_pairs
from onnxqat.plan import QuantPlan
from onnxqat.preparation.constants import lift_constants
from onnxqat.qparams import QuantParams
from onnxqat.requantizations import with_requantizations

__all__ = [
    "OPSET_OF_16_BITS",
    "AnyModel",
    "QuantizedModel",
    "Stage",
    "State",
    "float_part",
    "insert_pairs",
    "load_model",
    "needs_16_bits",
    "read_pairs",
    "require_quantized",
    "weights_hash",
    "without_notes",
]

OPSET_OF_16_BITS = 21  # https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
State = Literal["uncalibrated", "calibrated", "finetuned"]

OURS = "onnxqat."  # prefix of the metadata keys that onnxqat adds to a file
VERSION = "1"  # version of these metadata; files without a version are also of version 1
VERSION_KEY, PLAN_KEY, STATE_KEY = "onnxqat.version", "onnxqat.plan", "onnxqat.state"
SOURCE_KEY, TAKEN_KEY, HISTORY_KEY = "onnxqat.source", "onnxqat.taken_over", "onnxqat.history"
KEYS = (VERSION_KEY, PLAN_KEY, STATE_KEY, SOURCE_KEY, TAKEN_KEY, HISTORY_KEY)


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one stage, for the report.

    It does not depend on the time or the folder of a run: equal runs write equal bytes.

    Attributes
    ----------
    name : str
        The command: ``insert``, ``calibrate``, ``finetune``, ``import-table``.
    settings : dict
        The settings, by the names of the options.
    figures : dict of str to float or None
        The measured figures, by name; None if not finite.
    inputs : dict of str to str
        Names of the input files, without their folders, by argument: ``model``, ``data`` ...
    epochs : tuple of dict
        Figures of a fine-tuning on the held-out data, by name; ``epoch`` is 0 at the start. If
        training restarted with a smaller rate, epoch 1 follows again.
    notes : tuple of str
        The messages that the user got.
    versions : dict of str to str
        Versions of Python and of the packages that affect computed values.
    device : str
        Where it was computed, and in which precision: ``cuda:0 (tf32)``.
    """

    name: str
    settings: dict[str, Any] = {}
    figures: dict[str, float | None] = {}
    inputs: dict[str, str] = {}
    epochs: tuple[dict[str, float | None], ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    device: str = ""

    def document(self) -> dict[str, Any]:
        """Return the record as stored in a file, without empty fields (as in earlier versions)."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return {k: v for k, v in told.items() if v or k in ("name", "settings", "figures")}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedModel:
    """A float model, its quantization plan, and the parameters.

    Attributes
    ----------
    floats : Model
        The prepared float model; its metadata contain the data settings, see `onnxqat.settings`.
        Models of several stages share its graph: change only a copy.
    plan : QuantPlan
        The quantized tensors, and why.
    params : mapping of str to QuantParams
        The parameters, by `QuantPoint.parameters`; one entry for each weight and activation.
    state : {"uncalibrated", "calibrated", "finetuned"}
        The state of the model; the scales of an uncalibrated model are placeholders.
    source : str
        SHA-256 of the weights of the original float model, see `weights_hash`.
    taken : tuple of str
        Names of parameters that another tool chose, which calibration does not change.
    history : tuple of Stage
        The records of all stages.
    """

    floats: Model
    plan: QuantPlan
    params: Mapping[str, QuantParams]
    state: State
    source: str
    taken: tuple[str, ...] = ()
    history: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        # models of several stages share the arrays
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))

    @property
    def name(self) -> str:
        """The file name, for messages."""
        return self.floats.name

    def __repr__(self) -> str:
        counts = {r: sum(p.role == r for p in self.plan.points) for r in ("weight", "activation")}
        return (
            f"QuantizedModel('{self.name}', {self.state}, rule '{self.plan.rule}', "
            f"{counts['weight']} weights, {counts['activation']} activations)"
        )

    def with_params(
        self,
        params: Mapping[str, QuantParams],
        *,
        state: State,
        plan: QuantPlan | None = None,
        floats: Model | None = None,
    ) -> QuantizedModel:
        """Return the model with other parameters and state, and optionally another plan or weights.

        Raises
        ------
        PlanError
            The arguments disagree with each other.
        """
        changed = replace(
            self, params=params, state=state, plan=plan or self.plan, floats=floats or self.floats
        )
        check_points(changed.floats.graph, changed.plan, params)
        return changed

    def check_calibrated(self) -> None:
        """Refuse an uncalibrated model, whose scales are placeholders.

        Raises
        ------
        PlanError
            The model is not calibrated.
        """
        if self.state == "uncalibrated":
            raise PlanError(f"{self.name}: is not calibrated. Calibrate or fine-tune it first.")

    def with_stage(self, stage: Stage) -> QuantizedModel:
        """Return the model with this stage, completed by the versions, added to its history."""
        stage = msgspec.structs.replace(stage, versions=package_versions())
        return replace(self, history=(*self.history, stage))

    def qdq(self) -> Model:
        """Return a copy of the float model with Q/DQ pairs and metadata, as written to a file."""
        result = self.floats.copy()
        add_pairs(result.graph, self.plan, self.params)
        result.metadata |= self._metadata()
        return result

    @contextmanager
    def as_qdq(self) -> Iterator[Model]:
        """Yield the same as `qdq` without a copy: in the block, the float graph has the pairs."""
        floats = self.floats
        add_pairs(floats.graph, self.plan, self.params)
        try:
            yield replace(floats, metadata=floats.metadata | self._metadata())
        finally:
            remove_pairs(floats.graph, self.plan)

    def to_proto(self) -> onnx.ModelProto:
        """Return the model with Q/DQ pairs as an independent protobuf message."""
        with self.as_qdq() as model:
            return model.to_proto()

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the model with Q/DQ pairs; see `Model.save`."""
        with self.as_qdq() as model:
            model.save(path, force=force)

    def _metadata(self) -> dict[str, str]:
        """Return the metadata that a file contains beside its nodes."""
        ours = {
            VERSION_KEY: VERSION,
            PLAN_KEY: self.plan.to_json(),
            STATE_KEY: self.state,
            SOURCE_KEY: self.source,
        }
        if self.taken:
            ours[TAKEN_KEY] = _json(self.taken)
        if self.history:
            ours[HISTORY_KEY] = _json([stage.document() for stage in self.history])
        return ours


AnyModel: TypeAlias = Model | QuantizedModel


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()


def float_part(model: AnyModel) -> Model:
    """Return the float model inside a quantized model; a float model is returned unchanged."""
    return model.floats if isinstance(model, QuantizedModel) else model


def require_quantized(model: AnyModel) -> QuantizedModel:
    """Return the model if it is a quantized model.

    Raises
    ------
    ModelError
        The model is float.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"{model.name}: contains no quantization plan. Run 'onnxqat insert' on it first."
        )
    return model


def without_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without the entries of onnxqat."""
    return {key: value for key, value in metadata.items() if not key.startswith(OURS)}


def needs_16_bits(plan: QuantPlan) -> bool:
    """Return whether a plan has points with 16-bit integers."""
    return any(point.spec.bits > 8 for point in plan.grid_points())


def weights_hash(graph: gs.Graph) -> str:
    """Return the SHA-256 of all float32 initializers of a float graph, in order of name."""
    digest = hashlib.sha256()
    tensors = graph.tensors()
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32:
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.values).data)
    return digest.hexdigest()


def insert_pairs(
    floats: Model, plan: QuantPlan, params: Mapping[str, QuantParams], *, state: State
) -> QuantizedModel:
    """Return a prepared float model with the Q/DQ pairs of a plan.

    Parameters
    ----------
    floats : Model
        The prepared float model that the plan was made for; shared, not changed. The result has a
        copy with an Identity for each tensor that the plan requantizes.
    plan : QuantPlan
        The plan.
    params : mapping of str to QuantParams
        The parameters, by `QuantPoint.parameters`; one entry for each weight and activation.
    state : {"uncalibrated", "calibrated", "finetuned"}
        The state of the model.

    Raises
    ------
    PlanError
        Plan, parameters and model disagree.
    """
    check_choice("State", state, get_args(State), PlanError)
    if isinstance(floats, QuantizedModel) or PLAN_KEY in floats.metadata:
        raise ModelError(
            f"{floats.name}: already contains a quantization plan. Run 'onnxqat strip' on it first."
        )
    if needs_16_bits(plan) and floats.graph.opset < OPSET_OF_16_BITS:
        raise PlanError(
            f"{floats.name}: the plan has 16-bit tensors, which QuantizeLinear of opset "
            f"{floats.graph.opset} cannot write. Prepare with opset={OPSET_OF_16_BITS}, then "
            "plan again."
        )
    source = weights_hash(floats.graph)
    floats = with_requantizations(floats, plan)
    check_points(floats.graph, plan, params)
    return QuantizedModel(floats=floats, plan=plan, params=params, state=state, source=source)


def load_model(path: str | Path) -> AnyModel:
    """Read an ONNX file; one with a stored plan becomes a `QuantizedModel`.

    Raises
    ------
    ModelError
        See `onnxqat.model.load_model`; or the Q/DQ pairs disagree with the stored plan.
    PlanError
        The stored plan cannot be read.
    """
    model = load_file(path)
    return read_pairs(model) if PLAN_KEY in model.metadata else model


def read_pairs(model: Model) -> QuantizedModel:
    """Return the quantized model of a Q/DQ file; ``model`` is changed to its float part.

    Constant nodes, which another tool may have written, are read as initializers.

    Raises
    ------
    ModelError, PlanError
        See `load_model`.
    """
    metadata = model.metadata
    _check_version(metadata.get(VERSION_KEY, VERSION), model.name)
    lift_constants(model.graph)
    state = metadata.get(STATE_KEY)
    if state not in get_args(State):
        raise ModelError(
            f"{model.name}: the stored state {state!r} is unknown. Run 'onnxqat insert' again."
        )
    plan = QuantPlan.from_json(metadata[PLAN_KEY])
    check_pairs(model, plan)
    params = params_of_pairs(model.graph, plan)
    remove_pairs(model.graph, plan)
    result = QuantizedModel(
        floats=model,
        plan=plan,
        params=params,
        state=state,  # type: ignore[arg-type]
        source=metadata.get(SOURCE_KEY, ""),
        taken=tuple(n for n in _stored(model, TAKEN_KEY, tuple[str, ...]) if n in params),
        history=_stored(model, HISTORY_KEY, tuple[Stage, ...]),
    )
    for key in KEYS:
        metadata.pop(key, None)
    return result


def _check_version(version: str, name: str) -> None:
    if version != VERSION:
        raise ModelError(
            f"{name}: was written by a newer onnxqat (its metadata have version '{version}', this "
            f"onnxqat reads {VERSION}). Upgrade onnxqat."
        )


def _stored(model: Model, key: str, kind: Any) -> Any:
    """Return the JSON value of a metadata entry; an empty tuple if the entry is missing."""
    if key not in model.metadata:
        return ()
    try:
        return msgspec.json.decode(model.metadata[key], type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        message = f"{model.name}: '{key}' cannot be read ({error}). Run 'onnxqat insert' again."
        raise ModelError(message) from error
