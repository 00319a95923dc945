"""The events of a fine-tuning log, in order of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

__all__ = ["Epoch", "Event", "Note", "Resume", "Start", "Step", "figures", "stale_from"]

Schema: TypeAlias = Literal["onnxqat.log/1"]
Count = Annotated[int, Meta(ge=0, lt=2**53)]


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """The common fields of all events; ``event`` is the name of the class in lower case."""


class Start(_Event, frozen=True, kw_only=True):
    """A run begins.

    Attributes
    ----------
    metrics : dict of str to float or None
        Figures of the start on the held-out data; None where not finite.
    engine, device, precision : str
        Where the run computes: ``onnxruntime-gpu 1.31.1``, ``cuda:0``, ``tf32``; empty in logs of
        earlier versions.
    """

    schema: Schema = "onnxqat.log/1"
    step: Count = 0
    metrics: dict[str, float | None] = {}
    engine: str = ""
    device: str = ""
    precision: str = ""


class Resume(_Event, frozen=True, kw_only=True):
    """A run resumes after ``step``; events of later steps are logged again."""

    schema: Schema = "onnxqat.log/1"
    step: Count


class Note(_Event, frozen=True, kw_only=True):
    """A reaction to a rising loss; ``step`` is smaller than before if training restarted."""

    step: Count
    note: str


class Step(_Event, frozen=True, kw_only=True):
    """After a step: the mean loss of the last 20 steps, and the learning rates."""

    step: Count
    epoch: Count
    loss: float
    lr: float
    scale_lr: float


class Epoch(_Event, frozen=True, kw_only=True):
    """After an epoch.

    Attributes
    ----------
    step, epoch, loss
        See `Step`.
    metrics : dict of str to float or None
        Figures on the held-out data; None where not finite.
    scale_drift : dict of str to float
        log2 of the ratio of each scale to that of the start, by the name of the parameters.
    clipped : dict of str to float
        The fraction of clipped values, by point.
    """

    step: Count
    epoch: Count
    loss: float
    metrics: dict[str, float | None]
    scale_drift: dict[str, float]
    clipped: dict[str, float]


Event: TypeAlias = Start | Resume | Note | Step | Epoch


def figures(event: Event) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an event by name: ``loss``, ``lr``, ``clipped/POINT`` and so on."""
    if isinstance(event, Step | Epoch):
        yield "loss", event.loss
    if isinstance(event, Step):
        yield "lr", event.lr
        yield "scale_lr", event.scale_lr
    for kind in ("metrics", "scale_drift", "clipped"):
        for name, value in getattr(event, kind, {}).items():
            if value is not None:
                yield f"{kind}/{name}", value


def stale_from(event: Event, last: int) -> int | None:
    """Return the first step whose logged events are now invalid, or None.

    Parameters
    ----------
    event : Event
        The next event.
    last : int
        The step of the previous event.
    """
    if isinstance(event, Resume):
        return event.step + 1
    return event.step if event.step < last or isinstance(event, Start) else None
