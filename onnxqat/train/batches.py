"""The feeds of the training steps: samples in a seeded order, labels and the teacher's outputs.

The order of an epoch and the augmentation of a batch depend only on the seed, the epoch and the
step, so that a run can resume at any step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.data import Augmentation, Batch, DataSet
from onnxqat.data.beside import MASK, TARGETS, TARGETS_COUNT
from onnxqat.errors import DataError
from onnxqat.model import Model
from onnxqat.parallel import Workers
from onnxqat.train.config import Config
from onnxqat.train.losses import LABELS, TENSOR, array_input, array_of, teacher_input

__all__ = ["Feeds", "TrainingBatches", "feeds_of", "taught"]

T = TypeVar("T")
Feeds = dict[str, NDArray[Any]]
NONE = np.zeros(0, np.int64)


def feeds_of(batch: Batch, inputs: Feeds, teacher: ort.InferenceSession | None) -> Feeds:
    """Return the feeds of a batch: ``inputs``, the teacher's outputs, labels and other arrays."""
    feeds = dict(inputs)
    if teacher is not None:
        feeds |= taught(teacher, teacher.run(None, inputs))
    if batch.labels is not None:
        feeds[LABELS] = np.resize(batch.labels, batch.size)
    return feeds | batch.arrays


def taught(teacher: ort.InferenceSession, outputs: Sequence[T]) -> dict[str, T]:
    """Return the teacher's outputs, by the names of the loss's inputs that read them."""
    found: dict[str, T] = {}
    names = [o.name for o in teacher.get_outputs()]
    for prefix in ("", TENSOR):  # a loss may also name an output as a tensor
        found |= {teacher_input(f"{prefix}{n}"): o for n, o in zip(names, outputs, strict=True)}
    return found


class TrainingBatches:
    """The feeds of every step.

    Parameters
    ----------
    model : Model
        The Q/DQ model, which determines the number of classes.
    data : DataSet
        Training samples, with the arrays that the loss reads.
    teacher : InferenceSession or None
        The teacher, whose outputs are fed too.
    config : Config
        Batch size, augmentation and seed.
    workers : Workers
        The processes that share the samples.
    classes : mapping of str to (int, int or None), optional
        For each input of labels: the number of classes, and the label that is ignored.
    finish : callable, optional
        Converts the iterator of batches to what the training session takes.

    Attributes
    ----------
    steps : int
        Steps per epoch. Samples that do not fill a step are left out, different ones in each epoch.
    """

    def __init__(
        self,
        model: Model,
        data: DataSet,
        teacher: ort.InferenceSession | None,
        config: Config,
        workers: Workers,
        classes: Mapping[str, tuple[int, int | None]] | None = None,
        finish: Callable[[Iterator[Feeds]], Iterator[Any]] = iter,
    ) -> None:
        self.data, self.teacher, self.config, self.workers = data, teacher, config, workers
        self.finish = finish
        shape = list(model.graph.outputs[0].shape or ())
        counted = len(shape) > 1 and isinstance(shape[1], int)
        self.classes = ({LABELS: (shape[1], None)} if counted else {}) | dict(classes or {})
        self.steps = len(data) // (config.samples * config.batches * workers.size)
        self._shuffles, self._shuffled = np.random.default_rng(config.seed), 0
        self._waited = self._seconds = 0.0

    @property
    def waiting(self) -> float | None:
        """Share of their time that the steps so far waited for data; None before the first."""
        return self._waited / self._seconds if self._seconds else None

    def epoch(self, number: int, *, done: int = 0) -> Iterator[Iterator[Any]]:
        """Yield the batches of each step of an epoch (from 1), without the first ``done`` steps."""
        parts = self.config.batches
        batches = self.finish(self._batches(number, done))
        for _ in range(done, self.steps):
            yield islice(batches, parts)

    def _batches(self, epoch: int, done: int) -> Iterator[Feeds]:
        """Yield this worker's batches; the samples of a step are divided in order of rank."""
        size, parts, workers = self.config.samples, self.config.batches, self.workers
        numbers = np.arange(self.steps * workers.size * parts)
        mine = numbers.reshape(self.steps, workers.size, parts)[done:, workers.rank].reshape(-1)
        order = self._order(epoch)[: len(numbers) * size].reshape(-1, size)[mine].reshape(-1)
        change = partial(self._augmented, epoch, mine) if self.config.augment else None
        begun = time.monotonic()
        for batch in self.data.batches(size, indices=order, full=True, change=change):
            waited = time.monotonic() - begun
            feeds = feeds_of(batch, batch.inputs, self.teacher)
            self._check_labels(feeds)
            yield feeds
            self._waited += waited
            self._seconds += time.monotonic() - begun
            begun = time.monotonic()

    def _augmented(
        self, epoch: int, numbers: NDArray[np.int64], position: int, batch: Batch
    ) -> Batch:
        """Return a batch with other images, and what lies in them moved along."""
        rng = np.random.default_rng((self.config.seed, epoch, int(numbers[position])))
        images = {name: batch.inputs[name] for name in self.data.sample_inputs}
        changes = Augmentation(images, self.config.augment, rng)
        inputs = batch.inputs | changes.images(self.data.pixels)
        arrays = {
            name: self._moved(changes, name, values, batch) for name, values in batch.arrays.items()
        }
        return replace(batch, inputs=inputs, arrays=arrays)

    def _moved(
        self, changes: Augmentation, name: str, values: NDArray[Any], batch: Batch
    ) -> NDArray[Any]:
        """Return an array that a loss reads, moved as the images are."""
        key, _ = array_of(name) or (name, "")
        if key not in self.data.moved_arrays:
            return values
        if key == MASK:
            return changes.masks(values)
        if key == TARGETS:
            return changes.targets(values)
        assert key == TARGETS_COUNT
        left = changes.targets(batch.arrays[array_input(TARGETS, "float32")])
        return np.asarray((left[:, :, 0] >= 0).sum(axis=1, dtype=values.dtype))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of the samples in an epoch, from the seed and the epoch."""
        if epoch <= self._shuffled:
            self._shuffles, self._shuffled = np.random.default_rng(self.config.seed), 0
        for _ in range(epoch - self._shuffled):
            order = self._shuffles.permutation(len(self.data))
        self._shuffled = epoch
        return order

    def _check_labels(self, feeds: Feeds) -> None:
        for name, (classes, ignored) in self.classes.items():
            labels = feeds.get(name, NONE)
            counting = labels if ignored is None else labels[labels != ignored]
            wrong = counting[(counting < 0) | (counting >= classes)]
            if wrong.size:
                raise DataError(
                    f"A label is {wrong.max()}, but the model has {classes} classes, 0 to "
                    f"{classes - 1}. Check the labels, or distil with --loss kl."
                )
