"""Turn a path or a model into a model whose metadata can be changed."""

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
    """Return the model at a path, or a model with its own copy of the metadata.

    Data settings are stored in the metadata, and the caller's model must not change. The graph is
    shared, because no stage changes it.

    Raises
    ------
    ModelError, PlanError
        See `onnxqat.quantized.load_model`.
    OptionError
        The argument is neither a path nor a model.
    """
    if isinstance(source, str | Path):
        return load_model(source)
    if isinstance(source, QuantizedModel):
        return replace(source, floats=_with_own_metadata(source.floats))
    if isinstance(source, Model):
        return _with_own_metadata(source)
    raise OptionError(
        f"A model has the type '{type(source).__name__}'. Give a path, or a model from load_model."
    )


def _with_own_metadata(model: Model) -> Model:
    return replace(model, metadata=dict(model.metadata))


def name_of(source: AnySource) -> str:
    """Return the name of a model for messages: its path, or its own name."""
    return str(source) if isinstance(source, str | Path) else source.name


def float_model(source: AnySource) -> Model:
    """Return a float model.

    Raises
    ------
    ModelError
        The model has Q/DQ pairs of onnxqat.
    """
    model = any_model(source)
    if isinstance(model, QuantizedModel):  # preparation would fold tensors that the plan names
        raise ModelError(f"{model.name}: already contains Q/DQ pairs. Give the float model.")
    return model


def quantized_model(source: AnySource) -> QuantizedModel:
    """Return a Q/DQ model of onnxqat.

    Raises
    ------
    ModelError
        The model is float.
    """
    return require_quantized(any_model(source))
