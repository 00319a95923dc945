"""The bytes of models, and of Q/DQ files without the record of the commands that made them."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel


def content(path: Path) -> bytes:
    """Return the bytes of a file without its history (the options and inputs of each command)."""
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != "onnxqat.history"]
    assert len(kept) == len(model.metadata_props) - 1
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model.SerializeToString(deterministic=True)


def as_bytes(model: Model | QuantizedModel) -> bytes:
    """Return the bytes of a model in memory; equal models have equal bytes."""
    return model.to_proto().SerializeToString(deterministic=True)
