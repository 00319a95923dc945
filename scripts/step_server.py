"""Run a training step for each line on stdin; used by both sides of `bench_step.py`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def serve(step: Callable[[], object]) -> None:
    """Print ``ready``, then the seconds and CPU seconds of each step, and the peak GB at the end.

    The peak memory does not include the preparation: the kernel's mark is reset after it (proc(5),
    clear_refs).
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    print("ready", flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        step()
        print(time.perf_counter() - start, time.process_time() - cpu, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flush=True)
