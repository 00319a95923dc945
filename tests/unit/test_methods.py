"""How scales and zero_points move: each method against its formula, and in a whole run."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from onnxqat.calibration import weight_range
from onnxqat.errors import TrainingError
from onnxqat.parallel import Workers
from onnxqat.qparams import choose_qparams, quantize, quantized_range
from onnxqat.quantized import insert_pairs
from onnxqat.train import Checkpoints, Config, StoppedError, finetune
from onnxqat.train.engine import Flat, forward_session
from onnxqat.train.fake_quantize import DSQ_ALPHA
from onnxqat.train.form import training_form
from onnxqat.train.optimization.ranges import Ranges
from tests.digits import calibrated_lenet, training_digits
from tests.fake_quantizers import SPECS, one_op, values_with_ties_and_ends, variant_of
from tests.oracles import run_ort

FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "lr": 5e-4}  # 12 steps an epoch
METHODS = ("lsq", "lsq+", "pact", "dsq", "moving-average", "ste")


class Case:
    """A tensor, its grid, an upstream gradient, and what numpy says of them."""

    def __init__(self, spec):
        channels = () if spec.axis is None else ((4, 6, 5)[spec.axis],)
        high = np.linspace(0.5, 1.5, int(np.prod(channels)), dtype=np.float32).reshape(channels)
        low = np.zeros_like(high) if spec.signedness == "unsigned" and spec.symmetric else -high
        self.spec, self.params = spec, choose_qparams(low, high, spec)
        self.x = values_with_ties_and_ends(spec, self.params)
        self.upstream = np.random.default_rng(1).normal(size=self.x.shape).astype(np.float32)
        self.s, z = self.aligned(self.params.scale), self.aligned(self.params.zero_point)
        qmin, qmax = quantized_range(spec, signed=self.params.signed)
        position = self.x / self.s + z.astype(np.float32)
        self.inside = (qmin <= np.rint(position)) & (np.rint(position) <= qmax)
        ends = np.minimum(abs(position - (qmax + 0.5)), abs(position - (qmin - 0.5)))
        self.inside |= ends < 2**-13  # either answer will do; the mask says inside
        self.levels = quantize(self.x, self.params, spec).astype(np.float64) - z

    def aligned(self, values):
        if self.spec.axis is None:
            return values
        return np.expand_dims(values, [i for i in range(3) if i != self.spec.axis])

    def total(self, terms):
        axes = [i for i in range(3) if i != self.spec.axis]
        return terms.sum(axis=None if self.spec.axis is None else tuple(axes))

    def gradients(self, **options):
        return one_op(variant_of(self.spec, self.params, 3, **options), self.x, self.params,
                      self.upstream)  # fmt: skip


@pytest.mark.parametrize("method", ["ste", "moving-average"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_learns_no_scale_passes_what_is_inside(spec, method):
    case = Case(spec)
    found = case.gradients(method=method)

    assert "s_grad" not in found
    np.testing.assert_array_equal(found["x_grad"], case.upstream * case.inside)


@pytest.mark.parametrize("learns_x", [True, False], ids=["x", "data"])
@pytest.mark.parametrize("method", ["pact", "dsq"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_only_clipped_values_move_a_clipping_range(spec, method, learns_x):
    case = Case(spec)
    found = case.gradients(method=method, learns_x=learns_x)
    terms = case.upstream * case.levels * ~case.inside

    assert 4 <= (~case.inside).sum() < case.x.size
    bound = 2.0**-21 * case.total(np.abs(terms))
    assert (np.abs(found["s_grad"] - case.total(terms)) <= bound).all()
    if learns_x and method == "pact":
        np.testing.assert_array_equal(found["x_grad"], case.upstream * case.inside)


def staircase(position, alpha=DSQ_ALPHA):
    """The soft staircase as MQBench writes it (mqbench/fake_quantize/dsq.py), in levels."""
    scale = 1 / (1 - alpha)
    k = np.log((scale + 1) / (scale - 1))
    whole = np.floor(position)
    return whole + scale * np.tanh(k * (position - whole - 0.5)) / 2 + 0.5


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_slope_of_dsq_is_that_of_the_soft_staircase(spec):
    case = Case(spec)
    found = case.gradients(method="dsq")["x_grad"]
    position = case.x.astype(np.float64) / case.s
    # its slope has a kink on each level, where float32 does not say on which side it lies
    smooth = np.abs(position - np.rint(position)) > 1e-3
    slope = (staircase(position + 1e-6) - staircase(position - 1e-6)) / 2e-6
    expected = case.upstream * case.inside * slope

    assert smooth.sum() > 90
    # float32 rounds the distance from a level, of up to 256, to 2^-16; tanh's slope is below 2
    np.testing.assert_allclose(found[smooth], expected[smooth], rtol=2e-4, atol=1e-6)


def test_the_slope_of_dsq_is_one_in_the_mean():
    case = Case(SPECS["int8"])
    case.x = np.linspace(-3, 3, 6001, dtype=np.float32)[:-1] * case.params.scale
    case.upstream = np.ones_like(case.x)

    assert case.gradients(method="dsq")["x_grad"].mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("learns_x", [True, False], ids=["x", "data"])
@pytest.mark.parametrize("name", ["asymmetric", "per-axis 0"])
def test_clipped_values_move_the_zero_point(name, learns_x):
    case = Case(SPECS[name])
    moving = {"method": "lsq+", "moves_zero_point": True, "learns_x": learns_x}
    found = case.gradients(**moving)
    lsq = case.gradients(method="lsq", learns_x=learns_x)
    terms = -case.s * case.upstream * ~case.inside

    np.testing.assert_array_equal(found["s_grad"], lsq["s_grad"])
    bound = 2.0**-21 * case.total(np.abs(terms))
    assert (np.abs(found["z_grad"] - case.total(terms)) <= bound).all()


@pytest.fixture(scope="module")
def data():
    with training_digits(220) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(data):
    """Asymmetric activations, 4 bits."""
    return calibrated_lenet(data, "weight.bits=4", "activation.bits=4", rule="onnxruntime-cpu")


def last_state(model, data, **settings):
    """Return the state after the last step, be it the best or not."""
    states = []
    finetune(model, data, config=Config(**FAST | settings), report=lambda p: states.append(p.model))
    return states[-1]


@pytest.mark.parametrize("method", METHODS)
def test_the_form_computes_what_the_tuned_file_computes(model, data, method):
    tuned = last_state(model, data, method=method)
    form = training_form(tuned, method=method)
    images = next(iter(data.batches(16))).inputs
    trained = forward_session(form, threads=1).run(None, images | form.parameters)

    np.testing.assert_array_equal(trained[0], run_ort(tuned.to_proto(), images)[0])


@pytest.mark.parametrize("method", METHODS)
def test_what_moves(model, data, method):
    before = model.params
    fast = {"scale_lr": 0.05, "averaging_constant": 0.5}
    after = last_state(model, data, method=method, **fast).params
    moved = {n for n in before if not np.array_equal(before[n].scale, after[n].scale)}
    shifted = {n for n in before if not np.array_equal(before[n].zero_point, after[n].zero_point)}
    asymmetric = {p.parameters for p in model.plan.grid_points() if not p.spec.symmetric}

    assert len(moved) == 0 if method == "ste" else len(moved) > len(before) / 2
    assert shifted <= asymmetric
    assert bool(shifted) == (method in ("lsq+", "moving-average"))


def test_no_gradient_moves_a_zero_point_that_stays_off_the_center(model):
    points = tuple(
        msgspec.structs.replace(p, spec=msgspec.structs.replace(p.spec, off_center=True))
        if not p.spec.symmetric else p
        for p in model.plan.points
    )  # fmt: skip
    plan = msgspec.structs.replace(model.plan, points=points)
    fixed = insert_pairs(model.floats, plan, model.params, state="calibrated")

    assert training_form(model, method="lsq+").zero_points
    assert not training_form(fixed, method="lsq+").zero_points
    assert training_form(fixed, method="moving-average").zero_points


def test_the_plan_names_the_method_of_a_point(data):
    model = calibrated_lenet(data, "weight.method=ste", "tensor:input.method=pact")
    form = training_form(model, method="dsq")
    weights = {p.tensor for p in model.plan.grid_points() if p.role == "weight"}
    ops = {n.name.rpartition("/")[0]: n.op_type for n in form.proto.graph.node if n.domain}

    assert {n for n, op in ops.items() if not op.endswith(("pact", "dsq"))} == weights
    assert [n for n, op in ops.items() if op.endswith("pact")] == ["input"]
    assert not form.learned & {f"{n}/scale" for n in weights}


def test_a_range_that_the_chip_forces_stays(data):
    """Of one batch; the scale has no gradient, whatever the method."""
    model = calibrated_lenet(data, "tensor:output.spec=unit")
    for method in METHODS:
        form = training_form(model, method=method)

        assert "output/scale" not in form.learned
        assert "output" not in form.observed


def followed(data, constant, batches):
    """Return how the ranges lie after the batches, which move nothing else."""
    model = calibrated_lenet(data, rule="onnxruntime-cpu")
    form = training_form(model, method="moving-average")
    values = Flat(form.parameters)
    ranges = Ranges(form, values, model, constant)
    for low, high in batches:
        ranges.begin()
        for part in (low, 0.5 * high), (0.5 * low, high):  # two accumulated batches
            ranges.see(dict.fromkeys(form.observed, part))
        ranges.step(Workers(), lambda name: name == "output/scale")
    return model, values.views


def test_ranges_follow_the_moving_average(data):
    model, views = followed(data, 0.25, [(-2.0, 1.0), (-4.0, 3.0)])
    spec = next(p.spec for p in model.plan.points if p.tensor == "input")
    start = model.params["input"]
    low, high = ((end - int(start.zero_point)) * float(start.scale) for end in (0, 255))
    for batch_low, batch_high in ((-2.0, 1.0), (-4.0, 3.0)):
        low, high = low + 0.25 * (batch_low - low), high + 0.25 * (batch_high - high)
    expected = choose_qparams(np.float32(low), np.float32(high), spec)

    # the range is kept in float32, and moved twice
    np.testing.assert_array_max_ulp(views["input/scale"], expected.scale, 4)
    assert views["input/zero_point"] == expected.zero_point
    assert views["output/scale"] == model.params["output"].scale  # frozen


def test_an_infinite_range_is_named(data):
    with pytest.raises(TrainingError, match=r"'input': its values reached \[-2.0, inf\]"):
        followed(data, 1.0, [(-2.0, np.inf)])


def test_ranges_stay_with_constant_zero_and_weights_follow(data):
    model, views = followed(data, 0.0, [(-2.0, 1.0)])
    before = model.params
    for point in model.plan.grid_points():
        if point.role == "weight":
            low, high = weight_range(views[point.tensor], point.spec, "minmax")
            expected = choose_qparams(low, high, point.spec).scale
        else:
            expected = before[point.parameters].scale
        np.testing.assert_array_equal(views[f"{point.parameters}/scale"], expected)


def test_the_input_is_observed_batch_by_batch(model, data):
    """With constant 1 the range is that of the last batch, which the tuned file shows."""
    tuned = last_state(model, data, method="moving-average", averaging_constant=1.0)
    found = tuned.params["input"]
    spec = next(p.spec for p in model.plan.points if p.tensor == "input")
    images = data.subset(np.arange(220)).batches(1)
    lows, highs = zip(*((b.inputs["input"].min(), b.inputs["input"].max()) for b in images),
                      strict=True)  # fmt: skip
    possible = {float(choose_qparams(low, high, spec).scale)
                for low in set(lows) for high in set(highs)}  # fmt: skip

    assert float(found.scale) in possible


def test_a_scale_that_follows_can_be_frozen(model, data):
    group = ("tensor:input/scale.freeze=true",)
    fast = {"method": "moving-average", "averaging_constant": 0.5}
    start, free, frozen = (
        m.params["input"]
        for m in (
            model,
            last_state(model, data, **fast),
            last_state(model, data, **fast, groups=group),
        )
    )

    assert frozen.same_as(start)
    assert not free.same_as(start)


def test_decay_pulls_a_clipping_range_together(model, data):
    group = ("scale.weight_decay=10", "scale.lr=0.01")
    start = model.params
    after = last_state(model, data, method="pact", groups=group).params

    assert all((after[n].scale < start[n].scale).all() for n in start)


def test_quantization_waits(model, data):
    losses = {}
    config = Config(**FAST | {"lr": 0.0}, loss="kl", scale_lr=0.0, quant_delay=5)
    finetune(model, data, config=config, report=lambda p: losses.setdefault(p.step, p.loss))

    # the float network is its own teacher; then quantization shows, in a mean that starts anew
    assert max(abs(losses[step]) for step in range(1, 6)) < 1e-6
    assert losses[6] > 1e-3


def test_quantization_cannot_wait_for_ever(model, data):
    with pytest.raises(TrainingError, match="--quant-delay 24: the run has only 24 steps"):
        finetune(model, data, config=Config(**FAST, quant_delay=24))


@pytest.fixture(scope="module", params=[
    {"method": "moving-average", "averaging_constant": 0.2},
    {"method": "lsq+", "ema": 0.8},
    {"method": "dsq", "quant_delay": 9},
    {"method": "moving-average", "quant_delay": 9, "accumulate": 2},
], ids=["moving-average", "lsq+", "dsq", "delayed"])  # fmt: skip
def uninterrupted(request, model, data):
    """Settings, and what a run with them gives that nobody stops."""
    config = Config(**FAST, **request.param, select="loss")
    return config, finetune(model, data, config=config)


@pytest.mark.parametrize("count", [10, 12, 15])
def test_a_resumed_run_gives_the_same_bytes(model, data, tmp_path, uninterrupted, count):
    config, whole = uninterrupted
    asked = iter(range(1, 1000))
    with pytest.raises(StoppedError):
        finetune(model, data, config=config, checkpoints=Checkpoints(tmp_path / "c"),
                 stop=lambda: next(asked) >= count)  # fmt: skip
    resumed = finetune(model, data, config=config,
                       checkpoints=Checkpoints(tmp_path / "c", resume=True))  # fmt: skip

    def as_bytes(result):
        return result.model.to_proto().SerializeToString(deterministic=True)

    assert as_bytes(resumed) == as_bytes(whole)
