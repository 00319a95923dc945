"""The quantized model: a float graph, and what is quantized in it with which parameters.

Every stage takes one and returns a new one, which shares what the stage does not change. The graph
has Q/DQ nodes only in a file and in what is made for a runtime: `onnxqat.pairs` adds them there.
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

OURS = "onnxqat."  # how the keys begin that we add to a file's metadata
VERSION = "1"  # of what the metadata say; files without one are of version 1 too
VERSION_KEY, PLAN_KEY, STATE_KEY = "onnxqat.version", "onnxqat.plan", "onnxqat.state"
SOURCE_KEY, TAKEN_KEY, HISTORY_KEY = "onnxqat.source", "onnxqat.taken_over", "onnxqat.history"
KEYS = (VERSION_KEY, PLAN_KEY, STATE_KEY, SOURCE_KEY, TAKEN_KEY, HISTORY_KEY)


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage did, for the report.

    Nothing in it depends on the time or the folder of a run: the same run gives the same bytes.

    Attributes
    ----------
    name : str
        The command: ``insert``, ``calibrate``, ``finetune``, ``import-table``.
    settings : dict
        What it was told, by the names of the options.
    figures : dict of str to float or None
        What it measured, by name; None where it is not finite.
    inputs : dict of str to str
        Names of the files that it read, without their folders, by argument: ``model``, ``data`` ...
    epochs : tuple of dict
        Figures of a fine-tuning on the held-out data, by name: ``epoch`` is 0 at the start.
        Training that began again with a smaller rate comes back to epoch 1.
    notes : tuple of str
        What the user was told.
    versions : dict of str to str
        Versions of Python and of the packages that computed it.
    """

    name: str
    settings: dict[str, Any] = {}
    figures: dict[str, float | None] = {}
    inputs: dict[str, str] = {}
    epochs: tuple[dict[str, float | None], ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}

    def document(self) -> dict[str, Any]:
        """Return what a file stores: files of earlier versions lack the fields that are empty."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return {k: v for k, v in told.items() if v or k in ("name", "settings", "figures")}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedModel:
    """A float model, its quantization plan, and the parameters.

    Attributes
    ----------
    floats : Model
        The prepared float model; its metadata hold what is known of the data, see
        `onnxqat.settings`. Models of several stages share its graph: change a copy.
    plan : QuantPlan
        What is quantized, and why.
    params : mapping of str to QuantParams
        By `QuantPoint.parameters`; one entry for each weight and activation of the plan.
    state : {"uncalibrated", "calibrated", "finetuned"}
        How far it has come; the scales of an uncalibrated one are placeholders.
    source : str
        SHA-256 of the weights of the float model that it was made from, see `weights_hash`.
    taken : tuple of str
        Parameters that another tool chose, and calibration leaves alone.
    history : tuple of Stage
        What was done, and measured.
    """

    floats: Model
    plan: QuantPlan
    params: Mapping[str, QuantParams]
    state: State
    source: str
    taken: tuple[str, ...] = ()
    history: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        # models of several stages share them
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
        """Return the model with other parameters, state and, where given, plan and weights.

        Raises
        ------
        PlanError
            They disagree with each other.
        """
        changed = replace(
            self, params=params, state=state, plan=plan or self.plan, floats=floats or self.floats
        )
        check_points(changed.floats.graph, changed.plan, params)
        return changed

    def check_calibrated(self) -> None:
        """Refuse a model whose scales are placeholders, for all that reads them.

        Raises
        ------
        PlanError
            It is not calibrated.
        """
        if self.state == "uncalibrated":
            raise PlanError(f"{self.name}: is not calibrated. Calibrate or fine-tune it first.")

    def with_stage(self, stage: Stage) -> QuantizedModel:
        """Return the model with one more stage in its history, which gets the versions."""
        stage = msgspec.structs.replace(stage, versions=package_versions())
        return replace(self, history=(*self.history, stage))

    def qdq(self) -> Model:
        """Return a copy of the float model with Q/DQ pairs and our metadata: what a file has."""
        result = self.floats.copy()
        add_pairs(result.graph, self.plan, self.params)
        result.metadata |= self._metadata()
        return result

    @contextmanager
    def as_qdq(self) -> Iterator[Model]:
        """Yield what `qdq` returns without a copy of the graph: it has the pairs meanwhile."""
        floats = self.floats
        add_pairs(floats.graph, self.plan, self.params)
        try:
            yield replace(floats, metadata=floats.metadata | self._metadata())
        finally:
            remove_pairs(floats.graph, self.plan)

    def to_proto(self) -> onnx.ModelProto:
        """Return the model with Q/DQ pairs as a message that shares nothing with it."""
        with self.as_qdq() as model:
            return model.to_proto()

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the model with Q/DQ pairs; see `Model.save`."""
        with self.as_qdq() as model:
            model.save(path, force=force)

    def _metadata(self) -> dict[str, str]:
        """Return what a file says beside its nodes."""
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
    """Return the float model of a quantized one; of a float model, itself."""
    return model.floats if isinstance(model, QuantizedModel) else model


def require_quantized(model: AnyModel) -> QuantizedModel:
    """Return the model as a quantized one.

    Raises
    ------
    ModelError
        It is float.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"{model.name}: holds no quantization plan. Run 'onnxqat insert' on it first."
        )
    return model


def without_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without what we added."""
    return {key: value for key, value in metadata.items() if not key.startswith(OURS)}


def needs_16_bits(plan: QuantPlan) -> bool:
    """Return whether a plan has points that QuantizeLinear writes as 16 bits."""
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
        The prepared float model that the plan was made for; shared, not changed.
    plan : QuantPlan
        What to quantize.
    params : mapping of str to QuantParams
        By `QuantPoint.parameters`; one entry for each weight and activation.
    state : {"uncalibrated", "calibrated", "finetuned"}
        How far it has come.

    Raises
    ------
    PlanError
        Plan, parameters and model disagree.
    """
    check_choice("State", state, get_args(State), PlanError)
    if isinstance(floats, QuantizedModel) or PLAN_KEY in floats.metadata:
        raise ModelError(f"{floats.name}: already holds a quantization plan. Strip it first.")
    if needs_16_bits(plan) and floats.graph.opset < OPSET_OF_16_BITS:
        raise PlanError(
            f"{floats.name}: the plan has 16-bit points, which QuantizeLinear of opset "
            f"{floats.graph.opset} cannot write. Prepare with opset={OPSET_OF_16_BITS}, plan again."
        )
    check_points(floats.graph, plan, params)
    source = weights_hash(floats.graph)
    return QuantizedModel(floats=floats, plan=plan, params=params, state=state, source=source)


def load_model(path: str | Path) -> AnyModel:
    """Read an ONNX file, see `onnxqat.model.load_model`; one with Q/DQ pairs of ours as such.

    Raises
    ------
    ModelError
        Also where pairs and stored plan disagree.
    PlanError
        The stored plan cannot be read.
    """
    model = load_file(path)
    return read_pairs(model) if PLAN_KEY in model.metadata else model


def read_pairs(model: Model) -> QuantizedModel:
    """Return the quantized model that a Q/DQ file holds; ``model`` becomes its float part.

    Constant nodes, which another tool may have made, are read as initializers.

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
        raise ModelError(f"{model.name}: state is {state!r}. Run 'onnxqat insert' again.")
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
            f"{name}: was written by a newer onnxqat (metadata of version '{version}', this one "
            f"reads {VERSION}). Upgrade onnxqat."
        )


def _stored(model: Model, key: str, kind: Any) -> Any:
    """Return what the metadata hold as JSON; an empty tuple where they hold nothing."""
    if key not in model.metadata:
        return ()
    try:
        return msgspec.json.decode(model.metadata[key], type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        message = f"{model.name}: '{key}' cannot be read ({error}). Insert again."
        raise ModelError(message) from error
