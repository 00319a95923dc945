"""Write the files for the chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxqat.camera import Camera, CameraFormat, YuvRange
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
    input_type_rt: CameraFormat | None = None,
    yuv_range: YuvRange = "full",
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
    input_type_rt : {"yuv444", "nv12"}, optional
        Format of the pixels that a camera feeds to a Horizon chip: nodes in front of the model
        convert them to the RGB or BGR pixels of its training (default: no nodes).
    yuv_range : {"full", "video"}
        Range of the camera's values: 0 to 255, or 16 to 235 of Y and 16 to 240 of U and V.
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
        camera=None if input_type_rt is None else Camera(kind=input_type_rt, yuv_range=yuv_range),
        force=force,
    )
