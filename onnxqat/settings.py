"""The user's settings for the data, stored in the model's metadata for later commands."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import onnx_graphsurgeon as gs

from onnxqat.data import DataSet, InputSpec, Preprocessing, check_count, check_preprocessing
from onnxqat.errors import DataError, ModelError
from onnxqat.operators import moving
from onnxqat.quantized import AnyModel, float_part

__all__ = [
    "Settings",
    "adopt",
    "class_count",
    "input_specs",
    "settings_of",
    "settle",
    "stored_settings",
]

KEY = "onnxqat.data"
# Ops that look up rows of a table: the inputs with the indices, and those with the tables.
LOOKUPS = {
    "Gather": ((1, 0),),
    "GatherElements": ((1, 0),),
    "EmbedLayerNormalization": ((0, 2), (1, 4)),  # com.microsoft
}
# Ops whose output contains each value of their first input; a Cast does not change indices.
MOVES = (*moving("axes", "blocks", "repeats"), "Cast")


class Settings(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How data become model inputs; None for settings that the user did not give.

    The fields from ``mean`` to ``pixel_format`` are those of `onnxqat.data.Preprocessing`. Its
    ``layout`` is not stored, because it belongs to one set of arrays and not to the model.
    """

    mean: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    resize_dims: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resize_by: Literal["pillow", "opencv"] | None = None
    keep_aspect_ratio: bool | None = None
    pad_value: float | None = None
    pixel_format: Literal["rgb", "bgr", "gray"] | None = None
    label: str | None = None
    input_map: dict[str, str] | None = None
    classes: dict[str, int] | None = None

    def preprocessing(self, layout: Literal["nchw", "nhwc"] | None = None) -> Preprocessing:
        """Return the preprocessing, with defaults for settings that were not given.

        Parameters
        ----------
        layout : {"nchw", "nhwc"}, optional
            Layout of the data arrays.

        Raises
        ------
        DataError
            A value is out of its range, or contradicts another.
        """
        given = {
            name: value
            for name in Preprocessing.__struct_fields__
            if (value := getattr(self, name, None)) is not None
        }
        return Preprocessing(**given, layout=layout)


def stored_settings(model: AnyModel) -> Settings:
    """Return the data settings stored in a model.

    Raises
    ------
    ModelError
        The stored settings cannot be read.
    """
    text = float_part(model).metadata.get(KEY)
    if text is None:
        return Settings()
    try:
        settings = msgspec.convert(_by_name(msgspec.json.decode(text)), Settings)
        settings.preprocessing()
    except (msgspec.MsgspecError, DataError) as error:
        raise ModelError(
            f"{model.name}: metadata '{KEY}' cannot be read ({str(error).rstrip('.')}). "
            "Run 'onnxqat insert' again."
        ) from error
    return settings


def _by_name(stored: Any) -> Any:
    """Return settings whose classes are a mapping; earlier files have a tuple of names."""
    if isinstance(stored, dict) and isinstance(stored.get("classes"), list):
        by_index = stored["classes"]
        return stored | {"classes": {name: index for index, name in enumerate(by_index)}}
    return stored


def settings_of(data: DataSet) -> Settings:
    """Return the settings with which a data set was opened; defaults count as not given."""
    said, usual = data.said, Preprocessing()
    found = {
        name: value
        for name in Preprocessing.__struct_fields__
        if name != "layout" and (value := getattr(said.preprocessing, name)) != getattr(usual, name)
    }
    return Settings(
        **found,
        label=said.label,
        input_map=None if said.input_map is None else dict(said.input_map),
        classes=None if data.classes is None else dict(data.classes),
    )


def _checked(given: Settings) -> Settings:
    """Return the settings after checking the types of their fields, which msgspec does not do.

    Raises
    ------
    DataError
        A value has another type.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(given), Settings)
    except (msgspec.ValidationError, TypeError) as error:
        raise DataError(f"Settings: {error}.") from error


def settle(model: AnyModel, given: Settings) -> Settings:
    """Merge the stored settings with those given now, and store the result in ``model``.

    Raises
    ------
    DataError
        The settings contradict each other, or a value is out of its range or does not fit the
        model.
    """
    stored, given = stored_settings(model), _checked(given)
    joined: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        old, new = getattr(stored, name), getattr(given, name)
        if old is not None and new is not None and old != new:
            option = "--" + name.replace("_", "-").replace("input-map", "input")
            now, was = _differing(new, old)
            raise DataError(
                f"{model.name}: {option} is {now} now, but was {was} when the file was made. "
                f"Leave {option} out, or run 'onnxqat insert' again with the new value."
            )
        joined[name] = new if old is None else old
    settings = Settings(**joined)
    check_preprocessing(input_specs(model), settings.preprocessing(), model.name)
    check_count(settings.classes or {}, class_count(model), model.name)
    if settings != Settings():
        try:
            text = msgspec.json.encode(settings, order="deterministic").decode()
        except UnicodeEncodeError as error:  # file names need not be text
            name = error.object.encode("utf-8", "backslashreplace").decode()
            raise DataError(f"'{name}': is not UTF-8. Rename it.") from error
        float_part(model).metadata[KEY] = text
    return settings


def adopt(model: AnyModel, other: AnyModel) -> None:
    """Store in ``model`` the data settings of ``other``, so that both read the same data.

    Raises
    ------
    DataError
        The models were made with different data settings.
    """
    ours, theirs = stored_settings(model), stored_settings(other)
    for name in Settings.__struct_fields__:
        mine, its = getattr(ours, name), getattr(theirs, name)
        if mine is not None and its is not None and mine != its:
            here, there = _differing(mine, its)
            raise DataError(
                f"{model.name}: reads data with {name} = {here}, but {other.name} with {there}. "
                "Compare models that read the same data."
            )
    settle(model, theirs)


def _differing(first: Any, second: Any) -> tuple[str, str]:
    """Return two values as text; for mappings, only an entry that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        name = next(n for n in (first | second) if first.get(n) != second.get(n))
        return f"{name}={first.get(name)}", f"{name}={second.get(name)}"
    return _text(first), _text(second)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def class_count(model: AnyModel) -> int | None:
    """Return the number of classes of a classifier, whose first output has shape (N, classes)."""
    outputs = float_part(model).graph.outputs
    shape = list(outputs[0].shape or ()) if outputs else []
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None


def input_specs(model: AnyModel, beside: AnyModel | None = None) -> list[InputSpec]:
    """Return the model's inputs in the form that `onnxqat.data` needs.

    Parameters
    ----------
    model : Model
        The model that runs on the data.
    beside : Model, optional
        A model with the same inputs that runs on the same batches. If only its batch is fixed, that
        batch size is used.

    Raises
    ------
    ModelError
        The models are fixed to different batch sizes.
    """
    others = (
        {}
        if beside is None
        else {t.name: tuple(t.shape or ()) for t in float_part(beside).graph.inputs}
    )
    specs = []
    for tensor in float_part(model).graph.inputs:
        shape, other = tuple(tensor.shape or ()), others.get(tensor.name, ())
        if shape and other and isinstance(other[0], int) and shape[0] != other[0]:
            if beside is not None and isinstance(shape[0], int):
                raise ModelError(
                    f"{model.name}: input '{tensor.name}' needs batches of {shape[0]}, but in "
                    f"{beside.name} batches of {other[0]}. Export one of them with a dynamic batch."
                )
            shape = (other[0], *shape[1:])
        kind, rows = str(tensor.dtype), _rows_looked_up(tensor)
        specs.append(InputSpec(name=tensor.name, shape=shape, dtype=kind, rows=rows))
    return specs


def _rows_looked_up(tensor: gs.Tensor) -> int | None:
    """Return the number of rows of the smallest table that a tensor's values index, or None."""
    found: list[int] = []
    seen, waiting = {tensor.name}, [tensor]
    while waiting:
        reached = waiting.pop()
        for node in reached.outputs:
            if node.op in MOVES and node.inputs[0] is reached:
                moved = [t for t in node.outputs[:1] if t.name not in seen]
                seen.update(t.name for t in moved)
                waiting += moved
            for index, table in LOOKUPS.get(node.op, ()):
                if len(node.inputs) > max(index, table) and node.inputs[index] is reached:
                    shape, axis = node.inputs[table].shape or (), node.attrs.get("axis", 0)
                    length = shape[axis] if -len(shape) <= axis < len(shape) else None
                    found += [length] if isinstance(length, int) and length > 0 else []
    return min(found, default=None)
