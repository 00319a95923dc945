"""Batches prepared ahead of the one in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")


def prefetched(jobs: Iterable[Callable[[], T | None]]) -> Iterator[T]:
    """Yield what the jobs return, the next one running in a thread while a result is used.

    What is None is left out.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnxqat-data")
    try:
        ahead: Future[T | None] | None = None
        for job in jobs:
            current, ahead = ahead, pool.submit(job)
            if current is not None and (result := current.result()) is not None:
                yield result
        if ahead is not None and (result := ahead.result()) is not None:
            yield result
    finally:  # also when the caller gives up, or a job failed
        pool.shutdown(wait=True, cancel_futures=True)
