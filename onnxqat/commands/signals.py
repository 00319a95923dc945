"""Record signals that ask a command to end, so that it can save its state first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["noted_signals"]


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yield a list to which the first signal is added; a second signal acts as usual.

    The signals are SIGINT (Ctrl-C), SIGTERM (kill) and SIGHUP (the terminal is closed). Signals
    that the caller ignores stay ignored, as under nohup.
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
