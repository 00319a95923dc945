"""Lines off a terminal, with a clock of the test's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from onnxqat.progress import FinetuneReport, Pulse, progress_bar, time_left


class Clock:
    """Seconds that pass when it is waited."""

    def __init__(self) -> None:
        self.seconds, self.waits = 0.0, 0

    def __call__(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        self.waits += 1
        return self.waits > 4


def test_a_line_every_ten_seconds_whatever_goes_on():
    clock, lines = Clock(), []

    def slow(line):  # writing may take time too
        lines.append((clock.seconds, line))
        clock.seconds += 3

    Pulse(lambda: f"at {clock.seconds:g}", slow, clock=clock, wait=clock.wait).run()

    assert lines == [(t, f"at {t:g}") for t in (10, 20, 30, 40)]


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_nobody_listens(error):
    clock = Clock()

    def closed(_):
        raise error

    Pulse(str, closed, clock=clock, wait=clock.wait).run()

    assert clock.waits == 1


def test_the_time_that_is_left():
    assert time_left(20.0, 4, 10) == "20 s, about 30 s left"
    assert time_left(7.0, 0, 10) == "7 s"
    assert time_left(9.0, 10, 10) == "9 s, about 0 s left"


@pytest.fixture
def pulses(monkeypatch):
    """Return the lines' functions of every pulse that is started, in the place of a thread."""
    found = []
    monkeypatch.setattr(Pulse, "__enter__", lambda self: found.append(self) or self)
    monkeypatch.setattr(Pulse, "__exit__", lambda *_: None)
    return found


def test_batches(pulses):
    clock = Clock()
    with progress_bar("calibrating", 8, clock=clock) as advance:
        (pulse,) = pulses
        clock.seconds = 6
        first = pulse._line()
        for _ in range(2):
            advance()
        second = pulse._line()
        for _ in range(6):
            advance()
        third = pulse._line()

    assert first == "calibrating: 0 of 8 batches, 6 s"
    assert second == "calibrating: 2 of 8 batches, 6 s, about 18 s left"
    assert third == "calibrating: all 8 batches seen, 6 s, finishing"


def progress(step, epoch=1, validation=None):
    return SimpleNamespace(
        step=step, steps=100, part="epoch", epoch=epoch, epochs=2, loss=0.5, note="",
        validation=validation,
    )  # fmt: skip


def test_a_fine_tuning(pulses, capfd):
    clock = Clock()
    with FinetuneReport(clock) as report:
        lines = [report.line()]
        report.stage("evaluating the start", 3, 8)
        clock.seconds = 12
        lines.append(report.line())
        for step in (1, 2, 3, 4, 5):
            report(progress(step))
            clock.seconds += 2
        lines.append(report.line())
        report.stage("evaluating epoch 1", 1, 8)
        lines.append(report.line())
        figures = SimpleNamespace(metrics={"top1": 0.5}, agreement=None, loss=0.25)
        report(progress(50, validation=figures))
        lines.append(report.line())

    assert len(pulses) == 1
    where = "step 5 of 100, epoch 1/2, loss 0.5000"
    assert lines == [
        "preparing, 0 s",
        "evaluating the start: 3 of 8 batches, 12 s",
        f"{where}, 10 s, about 190 s left",
        f"{where}, evaluating epoch 1: 1 of 8 batches, 10 s, about 190 s left",
        "step 50 of 100, epoch 1/2, loss 0.5000, 10 s, about 10 s left",
    ]
    assert capfd.readouterr().err == (
        "epoch 1/2  loss 0.5000  top1 50.00 %  held-out loss 0.25  10 s, about 10 s left\n"
    )


def test_the_thread_ends_with_what_it_tells_of():
    with Pulse(str, print) as pulse:
        assert pulse._thread.is_alive()

    assert not pulse._thread.is_alive()
