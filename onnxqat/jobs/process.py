"""The process of one job: ``python -P -m onnxqat.jobs.process FOLDER FD``.

The first line of stdin is the job. At the end of stdin the process ends, as soon as a training has
saved its state. Reports are written to the file descriptor, one JSON document per line. Messages
for people go to stderr, which is the job's log.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from onnxqat.errors import OnnxQatError
from onnxqat.jobs.job import Order
from onnxqat.jobs.records import Record, file_digest, key_of_step, read_record, write_record
from onnxqat.jobs.rows import Step, steps_of
from onnxqat.jobs.work import Ending, Tell, Work
from onnxqat.locks import claimed
from onnxqat.terminal import LineFormatter
from onnxqat.train import DivergedError, StoppedError

__all__ = ["run_job"]

logger = logging.getLogger("onnxqat.jobs")

PATIENCE = 60.0  # seconds that a training may take to save its state
STDIN = 0
GARBAGE_THRESHOLD = 200_000  # the same as in the command line


def run_job(
    order: Order,
    folder: Path,
    tell: Tell,
    ending: Ending = Ending(),  # noqa: B008 (never asked)
) -> None:
    """Run the steps of a job that are not finished yet.

    Parameters
    ----------
    order : Order
        The job.
    folder : Path
        Folder of its results.
    tell : callable
        Called with each report, a document for JSON.
    ending : Ending
        Tells whether to stop.

    Raises
    ------
    OnnxQatError
        A step failed.
    """
    job = order.job()
    os.chdir(job.base)
    with _claimed_soon(folder / "job"):
        for step in (steps := steps_of(job)):
            tell({"step": step.name, "state": "waiting"})
        work = Work(job, folder, lambda progress: tell({"step": now.name, **progress}), ending)
        for now in steps:
            work.keys[now.name] = key_of_step(job, now, work.keys)
            record = _record_of(work, now, again=order.again, tell=tell)
            state = {"seconds": record.seconds, "figures": record.figures, "notes": record.notes}
            tell({"step": now.name, "state": "done", **state})


@contextmanager
def _claimed_soon(path: Path) -> Iterator[None]:
    """Lock a job against other runs; wait while the process of a killed run saves its state."""
    until = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(claimed(path))
                break
            except OnnxQatError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        yield


def _record_of(work: Work, step: Step, *, again: bool, tell: Tell) -> Record:
    """Return the record of a step from an earlier run; else run it and return its record."""
    key = work.keys[step.name]
    found = None if again else read_record(work.folder, step, key)
    if found is not None:
        logger.info("%s: already done by an earlier run", step.name)
        tell({"step": step.name, "state": "cached"})
        return found
    logger.info("%s: started", step.name)
    tell({"step": step.name, "state": "running"})
    started = time.monotonic()
    result = step.row.run(work, step)
    for note in result.notes:
        logger.info("%s: %s", step.name, note)
    record = Record(
        key=key,
        seconds=round(time.monotonic() - started, 3),
        figures=result.figures,
        notes=result.notes,
        files={str(path.relative_to(work.folder)): file_digest(path) for path in result.files},
    )
    write_record(work.folder, step, record)
    logger.info("%s: done in %.1f s %s", step.name, record.seconds, record.figures)
    return record


def main() -> None:
    """Run the job from stdin."""
    folder, events = Path(sys.argv[1]), int(sys.argv[2])
    order = msgspec.json.decode(_first_line(), type=Order)
    gc.set_threshold(GARBAGE_THRESHOLD)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    ending = Ending()
    threading.Thread(target=_follow, args=(ending,), daemon=True).start()

    def tell(document: dict[str, Any]) -> None:
        with suppress(OSError):  # the parent is gone; go on, since a training must save its state
            os.write(events, json.dumps(document).encode() + b"\n")

    status, message = "done", ""
    try:
        run_job(order, folder, tell, ending)
    except StoppedError:  # its message names an option of finetune
        status, message = "stopped", "Interrupted. Run the job again to continue."
    except (OnnxQatError, DivergedError) as error:
        status, message = "failed", str(error)
    except MemoryError:
        status, message = "failed", "Out of memory. Set a smaller batch-size."
    except Exception as error:
        traceback.print_exc()
        status, message = "failed", f"{type(error).__name__}: {error}. See job.log."
    if message:
        logger.error("%s: %s", status, message)
    tell({"status": status, "message": message})


def _first_line() -> bytes:
    """Read one line from stdin; Python's file object would read beyond it."""
    line = b""
    while not line.endswith(b"\n") and (part := os.read(STDIN, 1 << 16)):
        line += part
    return line


def _follow(ending: Ending) -> None:
    """Wait for the end of stdin, then end: the parent is gone or asks this process to end.

    A training saves its state first. All other files are whole or absent at any time.
    """
    while os.read(STDIN, 1 << 16):
        pass
    ending.asked.set()
    until = time.monotonic() + PATIENCE
    while ending.saves and time.monotonic() < until:
        time.sleep(0.1)
    os._exit(130)


if __name__ == "__main__":
    main()
