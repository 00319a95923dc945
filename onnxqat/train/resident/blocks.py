"""Train one block with its arrays on a device, as `BlockTraining` does in numpy."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from onnxqat.device import Device
from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.train.blocks.block import BlockTraining, Feeds
from onnxqat.train.config import Config
from onnxqat.train.engine import Flat, step_graph
from onnxqat.train.form import TrainingForm
from onnxqat.train.losses import Loss
from onnxqat.train.resident.arrays import DeviceVector
from onnxqat.train.resident.bound import Values
from onnxqat.train.resident.feeds import AHEAD, Uploader, ahead
from onnxqat.train.resident.operations import GradientMean
from onnxqat.train.resident.ranges import DeviceRanges
from onnxqat.train.resident.rounding import DevicePressure
from onnxqat.train.resident.step import DeviceStep
from onnxqat.train.resident.updater import DeviceUpdater, layout_of

__all__ = ["DeviceBlockTraining"]


class DeviceBlockTraining(BlockTraining):
    """The training of one block on a device.

    The arrays of the updater and of the roundings are in numpy: they are the start, and receive
    the values that are downloaded.

    Parameters
    ----------
    model, form, loss, config, still, steps, by_level
        See `BlockTraining`.
    device : Device
        The device that trains.
    """

    def __init__(
        self,
        model: QuantizedModel,
        form: TrainingForm,
        loss: Loss,
        config: Config,
        still: Collection[str],
        steps: int,
        by_level: bool = False,
        *,
        device: Device,
    ) -> None:
        self.device = device
        super().__init__(model, form, loss, config, still, steps, by_level)

    def _open(self, learning: TrainingForm) -> None:
        size = self.config.samples
        self._graph = step_graph(learning, self.loss, batch_size=size, device=self.device)
        outputs = {value.name for value in self._graph.model.graph.output}
        gradients = Flat(learning.with_gradient(outputs))
        self.updater = self._updater(Flat(learning.parameters), gradients)

    def _start(self) -> None:
        device, plan, config = self.device, self.updater, self.config
        start = plan.values.views
        self.layout = layout_of(plan, {name: value.shape for name, value in start.items()})
        self._values, self._gradients = (DeviceVector(device, self.layout.size) for _ in range(2))
        self._values.set(self.layout.joined(start))
        vectors = (self.layout, self._values, self._gradients, device)
        self._step = DeviceStep(self._graph, *vectors, threads=config.threads)
        self.inputs = self._step.inputs
        self._upload = Uploader(device, None, self.inputs)
        self._mean = GradientMean(device, self._gradients, config.batches)
        self._mover = DeviceUpdater(plan, *vectors)
        self._pressure = DevicePressure(self.rounding, *vectors)
        self._ranges: DeviceRanges | None = None
        if self.form.observed:
            constant, model = config.averaging_constant, self.model
            self._ranges = DeviceRanges(
                self.form, model, constant, self.layout, self._values, device
            )

    @property
    def values(self) -> dict[str, FloatArray]:
        """The current values of the parameters, by name, downloaded from the device."""
        self._download()
        return self.updater.values.views | self.rounding.weights()

    def _download(self) -> None:
        for name, value in self.layout.views(self._values.get()).items():
            self.updater.values.views[name][...] = value

    @contextmanager
    def _decided(self) -> Iterator[None]:
        if not self.rounding.moving:
            yield
            return
        self._download()
        with self.rounding.decided():
            self._values.set(self.layout.joined(self.updater.values.views))
            yield
        self._values.set(self.layout.joined(self.updater.values.views))

    def _loss(self, feeds: Feeds) -> float:
        return self._step.run(self._upload(feeds))[0]

    def _ready(self, batches: Iterator[Feeds]) -> Iterator[Values]:
        return ahead(map(self._upload, batches), AHEAD)

    def step(self, batches: Iterator[Any], factor: float, number: int) -> float:
        """Run one step and return its loss; if it is not finite, nothing is changed."""
        if self._ranges is not None:
            self._ranges.begin()
        losses, correct = [], True
        for index, feeds in enumerate(batches):
            loss, finite = self._step.run(feeds)
            losses.append(loss)
            correct = correct and finite
            if self._ranges is not None:
                self._ranges.see(self._step)
            self._mean.add(index)
        self._mean.end()
        mean = float(np.mean(losses))
        if not (correct and np.isfinite(mean)):
            return np.nan
        self._pressure.press(number)
        self._mover.step(factor, number)
        if self._ranges is not None:
            self._ranges.step(Workers(), lambda name: self._frozen(name, number))
        return mean
