"""Peak signal-to-noise ratio of images: ``10 log10(peak^2 / mean((x - y)^2))``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxqat.errors import DataError
from onnxqat.evaluation.metrics.batch import MetricBatch, Values
from onnxqat.evaluation.similarity import decibels

__all__ = ["psnr"]

BYTE = 255


def psnr(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the mean PSNR of the samples in dB.

    The peak is 255 if the true images are uint8, else 1. The true images must lie between 0 and the
    peak; output values outside of this range are clipped, as they are when an image is saved.

    Raises
    ------
    DataError
        The true images have another shape than the output, or values outside of their range.
    """
    found: list[float] = []
    for values, batch in zip(outputs, data, strict=True):
        for name, truth in batch.truth.items():
            peak = BYTE if truth.dtype == np.uint8 else 1
            if truth.shape != values[name].shape:
                raise DataError(
                    f"--metric psnr: the images for '{name}' have the shape {truth.shape}, the "
                    f"output {values[name].shape}. Store them in the output's shape."
                )
            if truth.min(initial=0) < 0 or truth.max(initial=0) > peak:
                raise DataError(
                    f"--metric psnr: the images for '{name}' range from {truth.min():g} to "
                    f"{truth.max():g}. Store floats from 0 to 1, or uint8."
                )
            clipped = np.clip(values[name].astype(np.float64), 0, peak)
            errors = np.square(clipped - truth).reshape(len(truth), -1).mean(axis=1)
            found += [decibels(peak**2 / e) if e else math.inf for e in errors.tolist()]
    return {"psnr": math.fsum(found) / len(found)}
