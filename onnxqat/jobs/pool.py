"""Run jobs in parallel, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import IO, TypeAlias

import msgspec

from onnxqat.jobs.job import Order
from onnxqat.jobs.outcome import Outcome, StepState

__all__ = ["Hear", "run_side_by_side"]

REFRESH = 0.25  # seconds
WAIT = 70.0  # seconds that a process may take to save its training and end

Hear: TypeAlias = Callable[[Outcome, StepState | None], None]


def run_side_by_side(
    work: Sequence[tuple[Order, Outcome]], jobs: int, hear: Hear, refresh: Callable[[], None]
) -> None:
    """Run jobs until all have ended; if interrupted, end them and wait for that.

    Parameters
    ----------
    work : sequence of (Order, Outcome)
        The jobs to run, and the objects that record their results.
    jobs : int
        Number of jobs to run at the same time.
    hear : callable
        Called after each report, in the threads that wait for the processes.
    refresh : callable
        Called a few times a second.
    """
    processes = _Processes()
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="onnxqat-job") as pool:
        futures = [pool.submit(processes.run, order, outcome, hear) for order, outcome in work]
        try:
            _wait(futures, refresh)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    for future in futures:
        future.result()  # raises unexpected errors


def _wait(futures: Iterable[Future[None]], refresh: Callable[[], None]) -> None:
    waiting = set(futures)
    while waiting:
        refresh()
        _, waiting = wait(waiting, timeout=REFRESH, return_when=FIRST_COMPLETED)
    refresh()


class _Processes:
    """The processes that run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._ending = False

    def run(self, order: Order, outcome: Outcome, hear: Hear) -> None:
        """Run one job to its end."""
        try:
            self._run(order, outcome, hear)
        except OSError as error:  # the process cannot start, or the log cannot be written
            outcome.end("failed", f"The job's process cannot be run ({error.strerror}).")
            hear(outcome, None)

    def _run(self, order: Order, outcome: Outcome, hear: Hear) -> None:
        with (outcome.folder / "job.log").open("ab") as log:
            started = self._start(order, outcome, log)
            if started is None:
                return
            process, events = started
            hear(outcome, None)
            with events:
                for line in events:
                    step = outcome.take(json.loads(line))
                    if step is not None:
                        hear(outcome, step)
            code = process.wait()
            _close(process)
        with self._lock:
            self._running.remove(process)
        if outcome.status == "running":
            stopped = self._ending
            outcome.end("stopped" if stopped else "failed", "" if stopped else _reason(code))
        hear(outcome, None)

    def _start(
        self, order: Order, outcome: Outcome, log: IO[bytes]
    ) -> tuple[subprocess.Popen[bytes], IO[bytes]] | None:
        with self._lock:
            if self._ending:
                return None
            outcome.begin()
            reading, writing = os.pipe()
            # -P: do not import modules from the current folder instead of installed packages
            module = [sys.executable, "-P", "-m", "onnxqat.jobs.process"]
            process = subprocess.Popen(
                [*module, str(outcome.folder), str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                process_group=0,  # else Ctrl-C in the terminal would reach it too
            )
            self._running.append(process)
        os.close(writing)
        assert process.stdin is not None
        with suppress(OSError):  # the process ended already; its exit code is read later
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            process.stdin.flush()
        return process, os.fdopen(reading, "rb")

    def end(self) -> None:
        """Ask all processes to end, and wait for them."""
        with self._lock:
            self._ending = True
            running = list(self._running)
        for process in running:
            _close(process)
        for process in running:
            try:
                process.wait(timeout=WAIT)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe that a process reads, which asks a running process to end."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()


def _reason(code: int) -> str:
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"The job's process {ended}. See job.log for the cause; run the job again to continue."
