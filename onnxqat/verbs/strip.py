"""Write the files for the chip."""

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
    """Write the float ``model.onnx`` and the calibration table, like ``onnxqat strip``.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        A calibrated or fine-tuned model. It is not changed.
    output : str or Path
        The directory for the files.
    format_name : str, optional
        The format of the table, see docs/formats.md, or ``none`` (default: the format of the rule).
    weights : {"snapped", "tuned"}
        Weights on their grid, as training computed with them, or before rounding.
    batch : int, optional
        Length for the first axis of each input, if it is dynamic (default: it stays dynamic).
    input_shapes : mapping of str to sequence of int, optional
        Complete shapes of inputs, by name, for compilers that require fixed shapes.
    force : bool
        Replace existing files.

    Raises
    ------
    OnnxQatError
        A file cannot be read or written, the model is not calibrated, or the table cannot express
        the plan.
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
