"""What leaves for the chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxqat.deploy import Deployment, Weights, write_deployment
from onnxqat.verbs.models import AnySource, quantized_model

__all__ = ["strip"]


def strip(
    model: AnySource,
    output: str | Path,
    *,
    format_name: str | None = None,
    weights: Weights = "snapped",
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    force: bool = False,
) -> Deployment:
    """Write the float ``model.onnx`` and the calibration table, as ``onnxqat strip`` does.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        Calibrated or fine-tuned. It is not changed.
    output : str or Path
        Directory to write into.
    format_name : str, optional
        Name of the table, see docs/formats.md, or ``none``; the rule's own by default.
    weights : {"snapped", "tuned"}
        On the grid, as training computed with them, or as trained.
    batch : int, optional
        Length of the first axis of every input where it is free; free by default.
    input_shapes : mapping of str to sequence of int, optional
        Whole shapes of inputs, by name, for compilers that want them fixed.
    force : bool
        Replace files that are there.

    Raises
    ------
    OnnxQatError
        A file cannot be read or written, the model is not calibrated, or the table cannot say
        what the plan says.
    """
    loaded = quantized_model(model)
    return write_deployment(
        loaded,
        output,
        table=format_name,
        weights=weights,
        batch=batch,
        input_shapes=input_shapes,
        force=force,
    )
