"""What the user said about the data, stored in the model's metadata for later commands."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from onnxqat.data import InputSpec, Preprocessing
from onnxqat.errors import DataError, ModelError
from onnxqat.model import Model

__all__ = ["Settings", "input_specs", "settle", "stored_settings"]

KEY = "onnxqat.data"


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How data become model inputs; None where the user said nothing.

    The fields from ``mean`` to ``layout`` are those of `onnxqat.data.Preprocessing`.
    """

    mean: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    resize_dims: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    keep_aspect_ratio: bool | None = None
    pad_value: float | None = None
    pixel_format: Literal["rgb", "bgr", "gray"] | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    label: str | None = None
    input_map: dict[str, str] | None = None
    classes: tuple[str, ...] | None = None

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing, with the defaults where nothing was said."""
        given = {
            name: value
            for name in Preprocessing.__struct_fields__
            if (value := getattr(self, name)) is not None
        }
        return Preprocessing(**given)


def stored_settings(model: Model) -> Settings:
    """Return what the file knows about its data."""
    text = model.metadata.get(KEY)
    if text is None:
        return Settings()
    try:
        return msgspec.json.decode(text, type=Settings)
    except msgspec.MsgspecError as error:
        raise ModelError(f"{model.name}: metadata '{KEY}' cannot be read ({error}).") from error


def settle(model: Model, given: Settings) -> Settings:
    """Join what the file knows with what the user says now, and store it in ``model``.

    Raises
    ------
    DataError
        The two contradict each other.
    """
    stored = stored_settings(model)
    joined: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        old, new = getattr(stored, name), getattr(given, name)
        if old is not None and new is not None and old != new:
            option = "--" + name.replace("_", "-").replace("input-map", "input")
            raise DataError(
                f"{model.name}: {option} is {_text(new)} now, and was {_text(old)} when the file "
                f"was made. Leave {option} out, or insert again with the new value."
            )
        joined[name] = new if old is None else old
    settings = Settings(**joined)
    if settings != Settings():
        model.metadata[KEY] = msgspec.json.encode(settings, order="deterministic").decode()
    return settings


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def input_specs(model: Model) -> list[InputSpec]:
    """Return the model's inputs as the data room wants them."""
    return [
        InputSpec(name=t.name, shape=tuple(t.shape or ()), dtype=str(t.dtype))
        for t in model.graph.inputs
    ]
