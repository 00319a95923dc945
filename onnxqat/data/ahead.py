"""Prepare the next batch while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")


def prefetched(jobs: Iterable[Callable[[], T | None]]) -> Iterator[T]:
    """Yield the results of jobs, except None; the next job runs in a thread meanwhile."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnxqat-data")
    try:
        ahead: Future[T | None] | None = None
        for job in jobs:
            current, ahead = ahead, pool.submit(job)
            if current is not None and (result := current.result()) is not None:
                yield result
        if ahead is not None and (result := ahead.result()) is not None:
            yield result
    finally:  # also if the caller stops iterating, or a job fails
        pool.shutdown(wait=True, cancel_futures=True)
