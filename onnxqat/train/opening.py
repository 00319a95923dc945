"""Open the training state: in numpy, or on a device."""

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
from onnxqat.train.resident.feeds import AHEAD, Uploader, ahead

__all__ = ["bringing", "open_descent"]

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
    """Return the training state of a network on a device.

    Parameters
    ----------
    form, delayed : TrainingForm
        The training forms of the quantized network and, if it is trained first, the float network.
    model : QuantizedModel
        The Q/DQ model: the plan and the calibrated parameters.
    loss, arrays, config, workers
        See `onnxqat.train.engine.StepSession`, `Config` and `Workers`.
    device : Device
        The device that trains.

    Returns
    -------
    descent : Descent
    classes : dict of str to (int, int or None)
        For each input of labels: the number of classes, and the label that is ignored.
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
    """Return a function that uploads batches to the device; `iter` if numpy holds the arrays.

    Parameters
    ----------
    teaching : InferenceSession or None
        The teacher's session on the device.
    inputs : set of str
        The names of the inputs of the training graph.
    """
    if not device.resident:
        return iter
    upload = Uploader(device, teaching, inputs)
    return lambda batches: ahead(map(upload, batches), AHEAD)
