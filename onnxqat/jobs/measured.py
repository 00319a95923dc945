"""Choose the preprocessing of a first job: the one with which the float model is right most often.

With class labels, top-1 decides; with boxes, mAP. Without either, nothing can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from onnxqat.data.beside import BOXES
from onnxqat.data.splits import usual_split
from onnxqat.errors import OnnxQatError
from onnxqat.model import Model
from onnxqat.outputs import outputs_of
from onnxqat.settings import Settings
from onnxqat.verbosity import ALWAYS_SAID
from onnxqat.verbs import DataSource, Listener, evaluate
from onnxqat.verbs.opening import TO_LEARN, opened

__all__ = ["Found", "Goal", "find_preprocessing"]

# Usual normalizations of pixels from 0 to 255: x = (pixel - mean) * scale.
PLAIN = {
    "none": Settings(),
    "0 to 1": Settings(scale=(1 / 255,)),
    "-1 to 1": Settings(mean=(127.5,), scale=(1 / 127.5,)),
    "-1 to 1 by 128": Settings(mean=(128.0,), scale=(1 / 128,)),
}
# ImageNet normalization from the documentation of torchvision's models, times 255
IMAGENET = Settings(mean=(123.675, 116.28, 103.53), scale=(1 / 58.395, 1 / 57.12, 1 / 57.375))
# Those of the detectors that can be decoded, as their packages evaluate them.
DETECTORS = {
    "YOLOv5 to YOLO11": Settings(scale=(1 / 255,), keep_aspect_ratio=True, pad_value=114.0),
    "YOLOX": Settings(pixel_format="bgr", keep_aspect_ratio=True, pad_value=114.0),
    "NanoDet": Settings(
        mean=(103.53, 116.28, 123.675), scale=(1 / 57.375, 1 / 57.12, 1 / 58.395),
        pixel_format="bgr", keep_aspect_ratio=True,
    ),
    "SSD": Settings(mean=(123.0, 117.0, 104.0)),
    "SSDLite": Settings(mean=(127.5,), scale=(1 / 127.5,)),
}  # fmt: skip


class Goal(NamedTuple):
    """The figure that a job is judged by.

    Attributes
    ----------
    figure : str
        Name of the figure.
    limit : float
        How far it may fall.
    metric : str or None
        The metric to ask for; None if the figure is measured anyway.
    """

    figure: str
    limit: float
    metric: str | None = None


TOP1, MAP = Goal("top1", 0.01), Goal("map", 0.01, "map")
SAMPLES = {TOP1: 200, MAP: 32}  # on which preprocessings are compared


@dataclass(frozen=True)
class Found:
    """Preprocessing settings, and how they were found.

    Attributes
    ----------
    settings : Settings
        The settings.
    comment : str
        How they were found.
    goal : Goal
        What the job can be judged by.
    measured : bool
        Whether the settings are more than a usual choice.
    """

    settings: Settings
    comment: str
    goal: Goal
    measured: bool = True


def find_preprocessing(model: Model, data: Path, listener: Listener) -> Found:
    """Return the preprocessing with which the float model has the best figure on the data."""
    classes = any(output.scores is not None for output in outputs_of(model.graph))
    alike = Goal("agreement", 0.05) if classes else Goal("cosine", 0.01, "cosine")
    usual = IMAGENET if _image_shapes(model) else Settings()
    source = DataSource(source=data, split=usual_split(data, TO_LEARN))
    try:
        goal = _goal(model, source, listener)
    except OnnxQatError as error:
        return Found(usual, f"the data could not be read: {error}", alike, measured=False)
    if goal is None:
        why = "without labels or boxes, preprocessings cannot be compared"
        return Found(usual, why, alike, measured=False)
    candidates = DETECTORS if goal is MAP else _normalizations(model)
    tried, problem = _tried(model, source, goal, candidates, listener)
    if not tried:
        why = f"{goal.figure} could not be measured: {problem}"
        return Found(usual, why, alike, measured=False)
    best = max(tried, key=lambda name: tried[name])
    others = ", ".join(f"{n}: {100 * v:.1f} %" for n, v in tried.items() if n != best)
    comment = (
        f"{'top-1' if goal is TOP1 else 'mAP'} of the float model on up to {SAMPLES[goal]} "
        f"samples: {100 * tried[best]:.1f} %" + (f" ({others})" if others else "")
    )
    return Found(candidates[best], comment, goal)


def _goal(model: Model, source: DataSource, listener: Listener) -> Goal | None:
    """Return the figure that the data can decide; None without labels and boxes."""
    with opened(model.copy(), source, Settings(), listener) as samples:
        if samples.has_labels:
            return TOP1
        return MAP if BOXES in samples.array_names else None


def _tried(
    model: Model,
    source: DataSource,
    goal: Goal,
    candidates: Mapping[str, Settings],
    listener: Listener,
) -> tuple[dict[str, float], str]:
    """Return the figure of each preprocessing that can be measured, and the first problem."""
    tried: dict[str, float] = {}
    problem = ""
    for name, settings in candidates.items():
        try:
            with _quiet():
                result = evaluate(
                    model,
                    replace(source, samples=SAMPLES[goal]),
                    mode="float",
                    metrics=[goal.metric] if goal.metric else [],
                    settings=settings,
                    listener=listener,
                )
        except OnnxQatError as error:
            problem = problem or str(error)
            continue
        tried[name] = result.metrics[goal.figure]
    return tried, problem


def _normalizations(model: Model) -> dict[str, Settings]:
    images = _image_shapes(model)
    if not images:
        return {"none": Settings()}
    colour = any(3 in shape[1:] for shape in images)
    return PLAIN | ({"ImageNet": IMAGENET} if colour else {})


def _image_shapes(model: Model) -> list[list[int | str]]:
    shapes = [list(t.shape or ()) for t in model.graph.inputs if str(t.dtype).startswith("float")]
    return [shape for shape in shapes if len(shape) == 4]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages about preprocessings that turn out to be wrong."""
    levels = {name: logging.getLogger(name).level for name in ("onnxqat", *ALWAYS_SAID)}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
