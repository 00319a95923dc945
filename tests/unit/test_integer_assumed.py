"""What a rule assumes of its chip: all combinations are computed, and none decides."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from onnxqat.errors import RuleError
from onnxqat.evaluation import evaluate
from onnxqat.rules import Arithmetic, assumptions, bundled_rules, load_rule, variants
from tests.networks import convnet, quantized, samples
from tests.unit.test_evaluate import batches

ASSUMING = [n for n in bundled_rules() if (a := load_rule(n).arithmetic) and assumptions(a)]


def test_combinations_start_with_what_the_rule_states():
    rule = Arithmetic(
        requantize="float",
        float_rounding="half-up",
        assumed={
            "float_rounding": ("half-even", "half-up"),
            "float_type": ("float32", "float16"),
        },
    )
    found = variants(rule)

    assert found[0][1] == rule
    assert [(a.float_rounding, a.float_type) for _, a in found] == [
        ("half-up", "float32"), ("half-even", "float32"),
        ("half-even", "float16"), ("half-up", "float16"),
    ]  # fmt: skip
    assert all(getattr(a, key) == value for values, a in found for key, value in values.items())
    assert variants(Arithmetic(requantize="float")) == (({}, Arithmetic(requantize="float")),)


@pytest.mark.parametrize("name", ASSUMING)
def test_bundled_assumptions_differ_from_each_other(name):
    found = [arithmetic for _, arithmetic in variants(load_rule(name).arithmetic)]

    assert len({msgspec.json.encode(a) for a in found}) == len(found) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('rounding = ["half-even"]', "List each value once, and also the rule's own, 'half-up'"),
        ('rounding = ["half-up", "half-up"]', "List each value once"),
        ('rounding = ["half-up", "upward"]', "Invalid enum value 'upward'"),
        (
            'operand_bits = ["8", "32"]',
            "assumed.operand_bits: must be a key whose values are words",
        ),
        ('roundings = ["half-up", "half-even"]', "assumed.roundings: must be a key"),
        (
            """rounding = ["half-up", "half-even", "half-away"]
bias_rounding = ["half-up", "half-even", "half-away"]""",
            "gives 9 combinations. Leave at most 8",
        ),
    ],
)
def test_wrong_assumptions_of_a_rule_file_are_named(text, message, tmp_path):
    path = tmp_path / "assuming.toml"
    path.write_text(
        'extends = "sophgo-bm1684x"\nname = "assuming"\n[arithmetic]\nbias_rounding = "half-up"\n'
        f"[arithmetic.assumed]\n{text}\n"
    )
    with pytest.raises(RuleError, match=message):
        load_rule(str(path))


def test_a_rule_of_ones_own_settles_what_is_assumed(tmp_path):
    path = tmp_path / "settled.toml"
    path.write_text(
        'extends = "ascend"\nname = "settled"\n[arithmetic]\nfactor_type = "float16"\n'
        '[arithmetic.assumed]\nfactor_type = ["float16"]\n'
    )
    rule = load_rule(str(path)).arithmetic

    assert [values for values, _ in variants(rule)] == [
        {"bias_rounding": "half-even"},
        {"bias_rounding": "half-away"},
    ]
    assert {one.factor_type for _, one in variants(rule)} == {"float16"}


@pytest.fixture(scope="module")
def ascend():
    network = convnet()
    return network, quantized(network, "ascend")[1]


def test_evaluation_gives_the_figures_of_each_combination(ascend):
    network, qdq = ascend
    x = samples(network, 40)
    labels = np.arange(40) % 5
    rule = load_rule("ascend")
    found = evaluate(qdq, batches(x, labels), mode="integer", threads=1)
    combinations = variants(rule.arithmetic)

    assert [one.values for one in found.assumed] == [values for values, _ in combinations]
    assert found.assumed[0].metrics == found.metrics
    assert found.assumed[0].agreement == found.agreement
    for one, (_, arithmetic) in zip(found.assumed, combinations, strict=True):
        known = msgspec.structs.replace(arithmetic, assumed={})
        alone = evaluate(
            qdq,
            batches(x, labels),
            mode="integer",
            rule=msgspec.structs.replace(rule, arithmetic=known),
            threads=1,
        )

        assert (one.metrics, one.agreement) == (alone.metrics, alone.agreement)
        assert alone.assumed == ()
    shares = [one.agreement for one in found.assumed]
    text = f"agreement {100 * min(shares):.2f} % to {100 * max(shares):.2f} %"

    assert found.assumption.startswith("not documented: factor_type, bias_rounding; 6 assumed")
    assert text in found.assumption
    assert evaluate(qdq, batches(x, labels), threads=1).assumption == ""


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_assumed_figures_are_written_and_decide_nothing(ascend, tmp_path):
    network, qdq = ascend
    qdq.save(tmp_path / "m.onnx")
    x = samples(network, 16)
    np.savez(tmp_path / "d.npz", input=x, label=np.arange(16) % 5)
    words = ("evaluate", tmp_path / "m.onnx", tmp_path / "d.npz", "--mode", "integer",
             "--threads", 1)  # fmt: skip
    document = json.loads(run(*words, "--json").stdout)
    refused = run(*words, "--against", tmp_path / "m.onnx", "--max-drop", "0.5")
    chosen = run(
        "finetune", tmp_path / "m.onnx", tmp_path / "d.npz", "--select", "integer:top1",
        "--epochs", 1, "--force-labels", "--batch-size", 4, "-o", tmp_path / "t.onnx",
    )  # fmt: skip

    assert len(document["assumed"]) == 6
    assert document["assumed"][1]["values"] == {
        "factor_type": "float32",
        "bias_rounding": "half-away",
    }
    assert refused.exit_code == chosen.exit_code == 1
    message = "cannot use integer figures of rule ascend: no source documents factor_type"
    assert f"--max-drop {message}" in refused.output
    assert f"--select integer:top1 {message}" in chosen.output
    assert not (tmp_path / "t.onnx").exists()
