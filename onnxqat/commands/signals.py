"""Signals that ask a command to end, held back until it has saved its state."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["noted_signals"]


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yield the list that a signal to end is noted in; a second one acts as usual.

    The signals are those of Ctrl-C, of kill, and of a terminal that goes away; what the caller
    ignores, as nohup does, stays ignored.
    """
    received: list[int] = []
    usual: dict[signal.Signals, Any] = {}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        for name, handler in usual.items():
            signal.signal(name, handler)

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:
            usual[name] = signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
