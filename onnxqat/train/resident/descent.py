"""The state that training changes, on a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from onnxqat.device import Device
from onnxqat.parallel import Workers
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.train.config import Config
from onnxqat.train.descent import Descent
from onnxqat.train.engine import Flat, StepGraph
from onnxqat.train.form import TrainingForm
from onnxqat.train.monitoring.divergence import explain_loss, not_finite
from onnxqat.train.optimization.updater import Updater
from onnxqat.train.resident.arrays import DeviceVector
from onnxqat.train.resident.bound import Values
from onnxqat.train.resident.graphs import average_graph
from onnxqat.train.resident.operations import GradientMean, Operation
from onnxqat.train.resident.ranges import DeviceRanges
from onnxqat.train.resident.step import DeviceStep
from onnxqat.train.resident.updater import DeviceUpdater, layout_of

__all__ = ["DeviceDescent"]


class DeviceDescent(Descent):
    """The state of one network during training on a device, and its training steps.

    A checkpoint contains the same arrays as with `HostDescent`, so a run can resume on another
    device.

    Parameters
    ----------
    form : TrainingForm
        The training form of the network.
    graph : StepGraph
        The graph of the loss and the gradients.
    delayed : StepGraph or None
        The same for the float network, if the first steps train it.
    model, config, workers
        See `HostDescent`.
    device : Device
        The device that trains.
    """

    def __init__(
        self,
        form: TrainingForm,
        graph: StepGraph,
        delayed: StepGraph | None,
        model: QuantizedModel,
        config: Config,
        workers: Workers,
        device: Device,
    ) -> None:
        self.form, self.model, self.config = form, model, config
        self.workers, self.device = workers, device
        outputs = {value.name for value in graph.model.graph.output}
        reached = form.with_gradient(outputs)
        self._best = Flat(form.parameters)
        self._plan = Updater(form, Flat(form.parameters), Flat(reached), model, config)
        self.layout = layout_of(self._plan, {n: v.shape for n, v in form.parameters.items()})
        size = self.layout.size
        self.values, self.gradients = DeviceVector(device, size), DeviceVector(device, size)
        opened = partial(
            DeviceStep,
            layout=self.layout,
            values=self.values,
            gradients=self.gradients,
            device=device,
            threads=config.threads,
        )
        self._step = opened(graph)
        self._delayed = None if delayed is None else opened(delayed)
        self.inputs = self._step.inputs
        self._mean = GradientMean(device, self.gradients, config.batches)
        self._open_average(size)
        self.reset()

    def _open_average(self, size: int) -> None:
        """Open the graph of the moving average of the parameters, if there is one."""
        self._kept = self.values
        if self.config.ema is not None:
            self._kept = DeviceVector(self.device, size)
            self._average = Operation(
                average_graph(size, self.config.ema),
                self.device,
                average=self._kept,
                values=self.values,
                target=self._kept,
            )

    @property
    def best(self) -> Mapping[str, FloatArray]:
        """The parameters of the best state, by name."""
        return self._best.views

    @property
    def kept(self) -> Mapping[str, FloatArray]:
        """The parameters to evaluate, by name, downloaded from the device."""
        return self._downloaded(self._kept)

    @property
    def lr(self) -> float:
        """The learning rate of weights without a learning rate of their own."""
        return self._plan.lr

    def _downloaded(self, vector: DeviceVector) -> dict[str, FloatArray]:
        return self.layout.views(vector.get())

    def reset(self) -> None:
        """Reset everything except the best state to its value at the start."""
        start = self.layout.joined(self.form.parameters)
        self.values.set(start)
        self._kept.set(start)
        self.gradients.set(np.zeros_like(start))
        self.updater = DeviceUpdater(
            self._plan, self.layout, self.values, self.gradients, self.device
        )
        self.ranges = None
        if self.form.observed:
            constant = self.config.averaging_constant
            self.ranges = DeviceRanges(
                self.form, self.model, constant, self.layout, self.values, self.device
            )
        self._finite = True

    def gradient(self, batches: Iterator[Values], step: int) -> float:
        """Set the gradients to their mean over a step's batches and workers; return the loss."""
        late = self._delayed is not None and step < self.config.quant_delay
        session = self._delayed if late and self._delayed is not None else self._step
        if self.ranges is not None:
            self.ranges.begin()
        losses, self._finite = [], True
        for number, feeds in enumerate(batches):
            loss, finite = session.run(feeds)
            losses.append(loss)
            self._finite = self._finite and finite
            if self.ranges is not None:
                self.ranges.see(session)
            self._mean.add(number)
        self._mean.end()
        mean = np.array(sum(losses) / len(losses))
        if self.workers.size > 1:
            gradients = self.gradients.get()
            self.workers.average(gradients)
            self.gradients.set(gradients)
            self._finite = bool(np.isfinite(gradients).all())
            self.workers.average(mean)
        return float(mean)

    def wrong(self, step: int) -> list[str]:
        """Return the parameters that change at ``step`` and have a gradient that is not finite."""
        if self._finite:
            return []
        vector = self.gradients.get()
        wrong = not_finite(self.layout.views(vector), vector)
        return [n for n in wrong if n in self._plan.rates and not self._plan.frozen(n, step)]

    def explained(self, *, moved: bool) -> str:
        """Return why the loss is not finite, see `explain_loss`."""
        vector = self.values.get()
        return explain_loss(self.layout.views(vector), vector, moved=moved)

    def move(self, factor: float, step: int) -> None:
        """Take a step at ``factor`` times the learning rates; ``step`` counts from 0."""
        self.updater.step(factor, step)
        if self.ranges is not None:
            self.ranges.step(self.workers, partial(self._plan.frozen, step=step))
        if self.config.ema is not None:
            self._average.run()

    def keep(self) -> None:
        """Save the current state as the best."""
        for name, value in self.kept.items():
            self._best.views[name][...] = value

    def arrays(self) -> dict[str, FloatArray]:
        """Return every array that training changes, for a checkpoint, in numpy."""
        learned, every = self._plan.gradients.views, self.form.parameters
        arrays: dict[str, FloatArray] = {}
        for name, vector in self.updater.state.items():
            found = self._downloaded(vector)
            if name == "latent":
                arrays |= {f"latent/{n}": found[n] for n in self._plan.latents}
            else:
                arrays[f"optimizer/{name}"] = _joined(found, learned)
        if self.ranges is not None:
            arrays["ranges"] = self.ranges.averages()
        if self.config.ema is not None:
            arrays["average"] = _joined(self.kept, every)
        values = _joined(self._downloaded(self.values), every)
        return arrays | {"values": values, "best": self._best.buffer}

    def restore(self, arrays: Mapping[str, FloatArray], step: int) -> None:
        """Continue after ``step`` steps with the arrays of a checkpoint, named as in `arrays`."""
        learned, every = self._plan.gradients.views, self.form.parameters
        for name, vector in self.updater.state.items():
            if name == "latent":
                found = {n: arrays[f"latent/{n}"] for n in self._plan.latents}
            else:
                found = _parted(arrays[f"optimizer/{name}"], learned)
            vector.set(self.layout.joined(found))
        self.values.set(self.layout.joined(_parted(arrays["values"], every)))
        if self.config.ema is not None:
            self._kept.set(self.layout.joined(_parted(arrays["average"], every)))
        if self.ranges is not None:
            self.ranges.restore(arrays["ranges"])
        self.updater.steps = step


def _joined(views: Mapping[str, FloatArray], names: Iterable[str]) -> FloatArray:
    """Return the named arrays in one buffer, in the layout of `Flat`."""
    return Flat({name: views[name] for name in names}).buffer


def _parted(buffer: FloatArray, shaped: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Return the arrays in a buffer with the layout of `Flat`."""
    flat = Flat(shaped)
    flat.buffer[...] = buffer
    return flat.views
