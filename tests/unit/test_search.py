"""Widths of weights within a budget."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxqat.analysis import (
    Probe,
    Ranking,
    Widths,
    average_bits,
    check_budget,
    search,
    verifying_passes,
    widths_of,
)
from onnxqat.analysis import rank as rank_weights
from onnxqat.analysis.search import order_of
from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import ModelError, OptionError
from onnxqat.overrides import parse_override
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule
from tests.networks import attention, convnet, detector, planned, quantized, samples
from tests.oracles import run_ort
from tests.unit.test_analysis_layers import batches

RULE = "onnxruntime-cpu"


@functools.cache
def widths(network=convnet, overrides=(), given=(2, 4, 8), rule=RULE):
    _, model = quantized(network(), rule, tuple(overrides), observer="mse")
    return Widths(model, load_rule(rule), given)


def with_dead_channel():
    """A network with a channel whose weights are too small for the scale of its bias."""
    network = convnet()
    for tensor in network.graph.initializer:
        values = np.array(numpy_helper.to_array(tensor))
        if tensor.name == "w1":
            values[0] *= 1e-12
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return network


@pytest.mark.parametrize("rule", ["onnxruntime-cpu", "sophgo-bm1688", "axera-ax650"])
@pytest.mark.parametrize("network", [with_dead_channel, attention])
def test_a_choice_is_the_model_that_insert_makes_with_its_overrides(rule, network):
    found = widths(network, ("weight.bits=8",), (2, 4, 8), rule)
    choices = np.random.default_rng(0).choice(found.widths, len(found.free))
    choice = {w.tensor: int(b) for w, b in zip(found.free, choices, strict=True)}
    overrides = tuple(map(str, found.overrides(choice)))
    floats, plan = planned(network(), rule, overrides)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    data = [{"input": samples(network(), 16, seed=s)} for s in range(2)]
    expected, model = calibrate(empty, data), found.at(choice)

    assert len(set(choice.values())) > 1
    assert overrides[0] == "weight.bits=8"
    assert [p.spec for p in model.plan.points] == [p.spec for p in expected.plan.points]
    assert model.params.keys() == expected.params.keys()
    for name, params in expected.params.items():
        np.testing.assert_array_equal(model.params[name].scale, params.scale)
        np.testing.assert_array_equal(model.params[name].zero_point, params.zero_point)


def test_weights_whose_widths_the_user_gave_keep_them():
    found = widths(overrides=("weight.bits=6", "first.bits=8", "tensor:w3.bits=5"))
    fixed = {w.tensor: (w.bits, w.fixed) for w in found.weights if w.fixed}
    narrow = found.at(found.uniform(2))

    assert fixed == {"w1": (8, "override first.bits=8"), "w3": (5, "override tensor:w3.bits=5")}
    assert {p.tensor: p.spec.bits for p in narrow.plan.points if p.role == "weight"} == {
        w.tensor: w.bits if w.fixed else 2 for w in found.weights
    }
    sizes = {w.tensor: w.elements for w in found.weights}
    bits = sum(sizes[t] * (8 if t == "w1" else 5 if t == "w3" else 2) for t in sizes)
    assert found.average(found.uniform(2)) == pytest.approx(bits / sum(sizes.values()))


def test_what_insert_is_told_covers_one_tensor_each():
    """A pattern that the user gave does not come twice: a file could not hold both."""
    found = widths(overrides=("tensor:w2.symmetric=true",), given=(4, 8))
    overrides = [str(o) for o in found.overrides(found.uniform(8) | {"w2": 4})]

    assert overrides == ["tensor:w2.symmetric=true", "tensor:(?:w2).bits=4"]


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_as_few_bits_costs_less_than_a_model_along_the_order(seed):
    found = widths(given=(2, 3, 4, 8))
    rng = np.random.default_rng(seed)
    costs = {w.tensor: dict(zip((2, 3, 4), rng.uniform(0, 1, 3), strict=True)) for w in found.free}
    # a narrower width that costs less than a wider one counts as much as that
    level = {t: {8: 0.0, 4: c[4], 3: max(c[4], c[3]), 2: max(c.values())} for t, c in costs.items()}
    all_choices = [
        dict(zip(costs, bits, strict=True))
        for bits in itertools.product((2, 3, 4, 8), repeat=len(costs))
    ]
    choice = found.uniform(8)
    for move in order_of(found, costs):
        assert choice[move.tensor] == move.before > move.bits
        choice[move.tensor] = move.bits
        average = found.average(choice)
        least = min(
            sum(level[t][b] for t, b in other.items())
            for other in all_choices
            if found.average(other) <= average + 1e-12
        )

        assert sum(level[t][b] for t, b in choice.items()) == pytest.approx(least, abs=1e-12)
    assert set(choice.values()) == {2}


class Additive:
    """Measures a model by the costs of its widths."""

    def __init__(self, found, costs):
        self.found, self.costs, self.count = found, costs, 0

    def __call__(self, model):
        self.count += 1
        bits = {p.tensor: p.spec.bits for p in model.plan.points if p.role == "weight"}
        return sum(self.costs[w.tensor].get(bits[w.tensor], 0.0) for w in self.found.free)


def ranking(costs):
    return Ranking(metric="error", costs=costs)


def random_costs(found, seed=0):
    """Return costs that grow as bits go."""
    rng, narrower = np.random.default_rng(seed), found.widths[:-1]
    costs = (sorted(rng.uniform(0, 1, len(narrower)), reverse=True) for _ in found.free)
    return {
        w.tensor: dict(zip(narrower, c, strict=True))
        for w, c in zip(found.free, costs, strict=True)
    }


@pytest.mark.parametrize("bits", [2, 3.3, 4, 5.5, 8])
def test_the_average_is_within_the_bits_that_are_given(bits):
    found = widths()
    costs = random_costs(found)
    probe = Additive(found, costs)
    result = search(found, ranking(costs), probe, bits=bits)
    chosen = result.chosen

    assert chosen.average == average_bits(found.weights, chosen.bits) <= bits
    assert chosen.cost == probe(found.at(chosen.bits))
    assert all(one.cost >= chosen.cost for w, one in result.uniform.items() if w <= bits)
    assert result.measured == probe.count - 1 <= verifying_passes(found, by_loss=False)
    # no move can be undone within the budget
    for tensor, known in chosen.bits.items():
        wider = min((w for w in found.widths if w > known), default=None)
        if wider and costs[tensor].get(wider, 0) < costs[tensor][known]:
            assert found.average({**chosen.bits, tensor: wider}) > bits or known in result.uniform


def test_a_dear_move_is_undone_where_the_last_one_saves_enough():
    """Of w1, w3 and w4, the cheap ones for their size; the large w2 makes them needless."""
    found = widths(given=(4, 8))
    sizes = {w.tensor: w.elements for w in found.free}
    large = max(sizes, key=sizes.get)
    dear = next(t for t in sizes if t != large)
    costs = {t: {4: 1e-9 * n} for t, n in sizes.items()}
    costs[dear], costs[large] = {4: 2e-9 * sizes[dear]}, {4: 3e-9 * sizes[large]}
    budget = found.average({**found.uniform(4), dear: 8})
    result = search(found, ranking(costs), Additive(found, costs), bits=budget)

    assert result.chosen.bits == {**found.uniform(4), dear: 8}


@pytest.mark.parametrize("max_loss", [0.0, 0.3, 1.0, 100.0])
def test_the_loss_is_within_what_is_allowed(max_loss):
    found = widths(given=(2, 3, 4, 8))
    costs = random_costs(found)
    probe = Additive(found, costs)
    result = search(found, ranking(costs), probe, max_loss=max_loss)
    chosen = result.chosen
    choice, after = found.uniform(8), []
    for move in order_of(found, costs):
        choice = {**choice, move.tensor: move.bits}
        after.append(choice)
    within = [c for c in after if sum(costs[t].get(b, 0) for t, b in c.items()) <= max_loss]

    assert chosen.cost <= max_loss
    assert chosen.cost == probe(found.at(chosen.bits))
    assert chosen.average <= min(map(found.average, within), default=8.0)
    assert result.measured == probe.count - 1 <= verifying_passes(found, by_loss=True)


def test_a_weight_that_loses_too_much_is_left_out_and_the_next_ones_tried():
    found = widths(given=(4, 8))
    first, *others = (w.tensor for w in found.free)
    costs = {t: {4: 1e-6} for t in (first, *others)}
    true = {**{t: {4: 0.0} for t in others}, first: {4: 1.0}}  # not what the ranking says
    result = search(found, ranking(costs), Additive(found, true), max_loss=0.5)

    assert result.chosen.bits == {**dict.fromkeys(others, 4), first: 8}


def test_what_is_not_a_number_is_not_chosen():
    found = widths(given=(4, 8))
    first, *_ = (w.tensor for w in found.free)
    costs = {w.tensor: {4: 1e-6} for w in found.free}
    costs[first] = {4: np.nan}
    assert first not in {move.tensor for move in order_of(found, costs)}
    result = search(found, ranking(costs), Additive(found, costs), max_loss=0.5)

    assert result.chosen.bits == {**found.uniform(4), first: 8}


def test_the_costs_are_errors_of_the_outputs():
    found = widths(detector, given=(2, 8))
    x = samples(detector(), 16)
    costs = rank_weights(found, Probe(found.model.floats, batches(x), threads=1))
    expected = run_ort(found.model.floats.to_proto(), {"input": x})[0].astype(np.float64)

    def cost(choice):
        outputs = run_ort(found.at(choice).to_proto(), {"input": x})[0]
        return np.mean((outputs - expected) ** 2) / expected.var()

    wide = found.uniform(8)
    assert costs.metric == "error"
    for weight in found.free:
        added = cost({**wide, weight.tensor: 2}) - cost(wide)
        assert costs.costs[weight.tensor] == {2: pytest.approx(added, rel=1e-4)}
        assert added > 0


def test_agreement_ranks_where_no_output_has_values():
    network = convnet()
    network.graph.node.append(onnx.helper.make_node("ArgMax", ["output"], ["class"], axis=1))
    del network.graph.output[:]
    network.graph.output.append(onnx.helper.make_tensor_value_info("class", 7, None))
    found = widths(lambda: network, given=(2, 8))
    probe = Probe(
        found.model.floats, batches(samples(convnet(), 16)), metric="agreement", threads=1
    )

    assert rank_weights(found, probe).metric == "agreement"


def test_widths_are_those_of_the_chip():
    assert widths_of(load_rule("sophgo-bm1688")) == (4, 8)
    with pytest.raises(OptionError, match=r"only weights of 8 bits.*--widths 4,8\."):
        widths_of(load_rule(RULE))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((8,), OptionError, "Give two or more"),
        ((8, 9), OptionError, "--widths 8, 9: not all are possible. Choose from 2, 3, 4"),
        ((8, 16), ModelError, "16 bits need opset 21"),
    ],
)
def test_widths_that_cannot_be_are_refused(given, error, said):
    with pytest.raises(error, match=said):
        widths(given=given)


def test_models_that_cannot_be_searched_are_refused():
    model = widths().model
    with pytest.raises(ModelError, match="is fine-tuned for its present widths"):
        Widths(replace(model, state="finetuned"), load_rule(RULE), (4, 8))
    fewer = widths(overrides=("op:Gemm.quantize=false",)).model
    fewer = replace(fewer, plan=msgspec.structs.replace(fewer.plan, overrides=()))
    with pytest.raises(ModelError, match=f"has other quantized weights than rule '{RULE}' makes"):
        Widths(fewer, load_rule(RULE), (4, 8))
    with pytest.raises(OptionError, match="no weight may change its width"):
        widths(overrides=("op:Conv.bits=8", "op:Gemm.bits=8"))


def test_budgets_that_no_model_keeps_are_refused():
    found = widths()
    costs = random_costs(found)
    with pytest.raises(OptionError, match=r"--bits 1.9: the average is at least 2.00"):
        check_budget(found, max_loss=None, bits=1.9)
    for both in ({"max_loss": 1.0, "bits": 4.0}, {"max_loss": None, "bits": None}):
        with pytest.raises(OptionError, match="give either --max-loss or --bits"):
            check_budget(found, **both)
    with pytest.raises(OptionError, match=r"--max-loss 1: even with 8 bits .* 50.00 points"):
        search(found, ranking(costs), lambda _: 0.5, max_loss=0.01)


def test_overrides_are_those_of_the_choice():
    found = widths(given=(4, 8), overrides=("weight.axis=none",))
    costs = random_costs(found)
    result = search(found, ranking(costs), Additive(found, costs), bits=6)
    _, plan = planned(convnet(), RULE, tuple(map(str, result.overrides)))
    bits = {p.tensor: p.spec.bits for p in plan.points if p.role == "weight"}

    assert result.overrides[0] == parse_override("weight.axis=none")
    assert bits == result.chosen.bits
    assert set(bits.values()) == {4, 8}
