"""A path or a model, as a model that nobody else holds the notes of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from onnxqat.errors import ModelError, OptionError
from onnxqat.model import Model
from onnxqat.quantized import AnyModel, QuantizedModel, load_model, require_quantized

__all__ = ["AnySource", "any_model", "float_model", "name_of", "quantized_model"]

AnySource: TypeAlias = str | Path | Model | QuantizedModel


def any_model(source: AnySource) -> AnyModel:
    """Return the model of a path, or one with metadata of its own.

    What is said about the data is stored in the metadata, and the caller's model must not change.
    The graph is shared: no stage changes it.

    Raises
    ------
    ModelError, PlanError
        See `onnxqat.quantized.load_model`.
    OptionError
        It is neither a path nor a model.
    """
    if isinstance(source, str | Path):
        return load_model(source)
    if isinstance(source, QuantizedModel):
        return replace(source, floats=_with_own_metadata(source.floats))
    if isinstance(source, Model):
        return _with_own_metadata(source)
    raise OptionError(
        f"A model is of type '{type(source).__name__}'. Give a path, or what load_model returns."
    )


def _with_own_metadata(model: Model) -> Model:
    return replace(model, metadata=dict(model.metadata))


def name_of(source: AnySource) -> str:
    """Return what the caller calls a model: its path, or its name."""
    return str(source) if isinstance(source, str | Path) else source.name


def float_model(source: AnySource) -> Model:
    """Return a float model.

    Raises
    ------
    ModelError
        It has Q/DQ pairs of ours.
    """
    model = any_model(source)
    if isinstance(model, QuantizedModel):  # preparing would fold what the plan names
        raise ModelError(f"{model.name}: already holds Q/DQ pairs. Give the float model.")
    return model


def quantized_model(source: AnySource) -> QuantizedModel:
    """Return a Q/DQ model of ours.

    Raises
    ------
    ModelError
        It is float.
    """
    return require_quantized(any_model(source))
