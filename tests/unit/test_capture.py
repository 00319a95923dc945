"""What differs on a GPU, on the CPU: steps that are replayed, and arrays copied when bound."""

from __future__ import annotations

import ctypes
import logging
import math
import re

import numpy as np
import onnx.parser
import pytest

from onnxqat.device import Device
from onnxqat.errors import ModelError
from onnxqat.runtime import Session
from onnxqat.train import Config, finetune
from onnxqat.train.resident import bound
from onnxqat.train.resident.arrays import DeviceVector
from onnxqat.train.resident.bound import BoundStep
from onnxqat.train.resident.capture import CapturedStep
from onnxqat.train.resident.feeds import Uploader
from onnxqat.train.resident.replayable import obstacle
from tests.digits import calibrated_lenet, training_digits

RESIDENT = Device(resident=True)
CAPTURING = Device(resident=True, captures=True)
FAST = {"epochs": 1, "batch_size": 16, "threads": 1, "lr": 5e-4, "accumulate": 2}  # 5 steps
SAID = "Training runs without a CUDA graph: "


@pytest.fixture(scope="module")
def data():
    with training_digits(180) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(data):
    return calibrated_lenet(data, "weight.bits=2")


@pytest.fixture(scope="module")
def plain(coarse, data):
    return trained(coarse, data)


def trained(model, data, device=RESIDENT, **settings) -> tuple[bytes, list[float]]:
    """Return the file of the best state, and the held-out loss after each epoch."""
    config = Config(**FAST | settings, select="loss")
    found = finetune(model, data, config=config, device=device)
    losses = [figures.loss for _, figures in found.tried]
    assert losses[-1] != found.before.loss
    return found.model.to_proto().SerializeToString(deterministic=True), losses


def test_replayed_steps_are_those_of_plain_runs(coarse, data, plain, monkeypatch):
    """Each batch is another array, but the session that replays is given one address."""
    run, given, read = CapturedStep.run, set(), set()

    def seen(self, feeds):
        given.add(feeds["input"].data_ptr())
        run(self, feeds)
        read.update(value.data_ptr() for name, value in self._fixed.items() if name == "input")

    monkeypatch.setattr(CapturedStep, "run", seen)
    assert trained(coarse, data, CAPTURING) == plain
    assert len(given) > 1
    assert len(read) == 1


@pytest.mark.parametrize("when", ["when it is opened", "in the first run"])
def test_a_graph_that_is_refused_is_replaced_by_plain_runs(
    coarse, data, plain, monkeypatch, caplog, when
):
    opened, run, refused = bound.open_session, BoundStep.run, []

    def refusing(*arguments, device, **others):
        if device.captured and when == "when it is opened":
            raise ModelError("the training graph: there are Memcpy nodes.")
        session = opened(*arguments, device=device, **others)
        session.captured = device.captured
        return session

    def failing(self, feeds):
        if self.session.captured:
            refused.append(feeds)
            raise ModelError("the training graph: CUDA failure 900.")
        run(self, feeds)

    monkeypatch.setattr(bound, "open_session", refusing)
    monkeypatch.setattr(BoundStep, "run", failing)
    with caplog.at_level(logging.WARNING):
        assert trained(coarse, data, CAPTURING) == plain

    said = [line for line in caplog.messages if line.startswith(SAID)]
    assert len(said) == 1
    assert said[0].endswith("CUDA failure 900." if refused else "there are Memcpy nodes.")
    assert len(refused) == (when == "in the first run")


def test_only_batches_of_the_first_shape_are_replayed():
    ran = []

    class Step:
        elsewhere: frozenset[str] = frozenset()

        def run(self, feeds):
            ran.append({name: value.numpy() for name, value in feeds.items()})

    upload = Uploader(RESIDENT, None, {"x", "labels"})
    one, other = (
        upload({"x": np.full((n, 3), n, np.float32), "labels": np.arange(n)}) for n in (4, 2)
    )
    step = CapturedStep(Step(), RESIDENT)

    assert step.fits(one)
    step.run(one)
    assert step.recorded
    assert step.fits(one)
    assert not step.fits(other)
    np.testing.assert_array_equal(ran[0]["x"], one["x"].numpy())
    np.testing.assert_array_equal(ran[0]["labels"], np.arange(4))


def test_a_graph_that_would_not_see_a_change_is_not_replayed():
    step = BoundStep.__new__(BoundStep)
    step.elsewhere = {"conv1/scale"}
    with pytest.raises(ModelError, match="'conv1/scale' is, or may be, read on the CPU"):
        CapturedStep(step, RESIDENT)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("y = Concat<axis = 0>(a, a)", None),
        ("y = Concat<axis = 0>(a, b)", r"'y' \(Concat\) has parts of different shapes"),
        (f"y = Concat<axis = 0>({', '.join('a' * 33)})", "has more than 32 parts"),
        (
            "sizes = Constant<value_ints = [1, 3]>() u, v = Split(a, sizes) y = Identity(u)",
            "of different shapes",
        ),
        ("u, v = Split(a) y = Identity(u)", None),
        ("p = com.microsoft.FusedMatMul(e, e) y = Concat<axis = 0>(p, p)", None),
        (
            (
                "p = com.microsoft.FusedMatMul(e, e) q = Concat<axis = 0>(p, p) "
                "r = Concat<axis = 0>(p, p, p) y = Concat<axis = 0>(q, r)"
            ),
            "'y' .* has parts of different shapes",
        ),
        ("y = MatMul(c, c)", None),
        ("y = MatMul(c, d)", r"\(MatMul\) multiplies batches of different shapes"),
        ("y = MatMul(c, e)", None),
        ("i = Constant<value = int64[1, 1] {0}>() y = ScatterND(a, i, f)", "cannot be replayed"),
    ],
)
def test_a_graph_that_could_be_replayed_with_other_data_is_known(graph, reason):
    ends = "float[4, 3] a, float[2, 3] b, float[2, 5, 3, 3] c, float[5, 3, 3] d, float[3, 3] e"
    text = f"agraph ({ends}, float[1, 3] f) => (float[N] y) {{ {graph} }}"
    found = obstacle(
        onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> {text}'
        )
    )

    assert (found is None) == (reason is None)
    assert found is None or re.search(reason, found)


class Copying:
    """An IO binding that, like one on a GPU, copies an array of the CPU when it is bound."""

    def __init__(self, binding, vectors, elsewhere):
        self.binding, self.vectors, self.elsewhere, self.kept = binding, vectors, elsewhere, {}

    def __getattr__(self, name):
        return getattr(self.binding, name)

    def bind_input(self, name, kind, index, dtype, shape, address):
        starts = {vector._value.data_ptr(): vector.size for vector in self.vectors}
        on_device = any(0 <= address - start < 4 * size for start, size in starts.items())
        if not on_device or name in self.elsewhere:
            memory = (ctypes.c_float * math.prod(shape)).from_address(address)
            self.kept[name] = np.array(memory, np.float32)
            address = self.kept[name].ctypes.data
        self.binding.bind_input(name, kind, index, dtype, shape, address)

    def bind_cpu_input(self, name, array):
        self.binding.bind_cpu_input(name, np.array(array))


@pytest.mark.parametrize("settings", [{}, {"method": "moving-average"}], ids=str)
def test_arrays_that_are_copied_when_bound_are_bound_again(coarse, data, monkeypatch, settings):
    """The scales of the training graph are read on the CPU here, so each step binds them again."""
    expected, vectors = trained(coarse, data, **settings), []
    made, binding = DeviceVector.__init__, Session.io_binding

    def listed(self, device, size):
        vectors.append(self)
        made(self, device, size)

    def elsewhere(session, device=RESIDENT):
        names = {value.name for value in session.get_inputs()}
        return {n for n in names if n.endswith("scale") and session.name == "the training graph"}

    monkeypatch.setattr(DeviceVector, "__init__", listed)
    monkeypatch.setattr(bound, "_read_on_the_cpu", elsewhere)
    monkeypatch.setattr(
        Session, "io_binding", lambda self: Copying(binding(self), vectors, elsewhere(self))
    )
    assert trained(coarse, data, **settings) == expected
