"""What a Q/DQ file says but for the words that made it."""

from __future__ import annotations

from pathlib import Path

import onnx


def content(path: Path) -> bytes:
    """Return a file without its history, which names the options and inputs of each command."""
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != "onnxqat.history"]
    assert len(kept) == len(model.metadata_props) - 1
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model.SerializeToString(deterministic=True)
