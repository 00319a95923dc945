"""What trains, opened where it is to happen: over numpy's arrays, or over those of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import onnxruntime as ort

from onnxqat.device import Device
from onnxqat.parallel import Workers
from onnxqat.quantized import QuantizedModel
from onnxqat.train.batches import Feeds
from onnxqat.train.config import Config
from onnxqat.train.descent import Descent, HostDescent
from onnxqat.train.engine import StepSession, step_graph
from onnxqat.train.form import TrainingForm
from onnxqat.train.losses import Arrays, Loss
from onnxqat.train.resident.descent import DeviceDescent
from onnxqat.train.resident.feeds import Uploader, ahead

__all__ = ["bringing", "open_descent"]

AHEAD = 2  # batches that lie on the device before they are needed
Classes: TypeAlias = dict[str, tuple[int, int | None]]


def open_descent(
    form: TrainingForm,
    delayed: TrainingForm | None,
    model: QuantizedModel,
    *,
    loss: Loss,
    arrays: Arrays | None,
    config: Config,
    workers: Workers,
    device: Device,
) -> tuple[Descent, Classes]:
    """Return what trains.

    Parameters
    ----------
    form, delayed : TrainingForm
        Those of the quantized network, and of the float one, if that is trained first.
    model : QuantizedModel
        The Q/DQ model: the plan and the calibrated parameters.
    loss, arrays, config, workers
        As `onnxqat.train.engine.StepSession` takes them.
    device : Device
        Where it happens.

    Returns
    -------
    descent : Descent
    classes : dict of str to (int, int or None)
        By input of labels: how many classes there are, and the label that does not count.
    """
    if device.resident:
        drawn = partial(
            step_graph, loss=loss, batch_size=config.samples, arrays=arrays, device=device
        )
        graph, late = drawn(form), None if delayed is None else drawn(delayed)
        on_device = DeviceDescent(form, graph, late, model, config, workers, device)
        return on_device, graph.classes
    opened = partial(
        StepSession, loss=loss, batch_size=config.samples, threads=config.threads, arrays=arrays
    )
    session = opened(form)
    other = None if delayed is None else opened(delayed, other=session)
    return HostDescent(form, session, other, model, config, workers), session.classes


def bringing(
    device: Device, teaching: ort.InferenceSession | None, inputs: set[str]
) -> Callable[[Iterator[Feeds]], Iterator[Any]]:
    """Return what brings batches to where training is.

    Parameters
    ----------
    teaching : InferenceSession or None
        The teacher, on the device.
    inputs : set of str
        What the training graph reads.
    """
    if not device.resident:
        return iter
    upload = Uploader(device, teaching, inputs)
    return lambda batches: ahead(map(upload, batches), AHEAD)
