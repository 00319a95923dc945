from __future__ import annotations

import pytest

from onnxqat.errors import RuleError
from onnxqat.rules import bundled_rules, load_rule

SMALL = """
name = "small"
vendor = "nobody"
summary = "for tests"
sources = ["none"]
weight_bits = [8]
activation_bits = [8]
[specs]
a = { signedness = "from_range" }
[ops]
Conv = { inputs = "a", outputs = "a", weight = "a" }
"""


@pytest.mark.parametrize("name", bundled_rules())
def test_bundled_rule_loads_cites_and_says_its_name(name):
    rule = load_rule(name)

    assert rule.name == name
    assert rule.sources
    assert rule.summary
    assert {"Conv", "Gemm"} <= rule.ops.keys()


def test_the_three_targets_are_bundled():
    assert {"onnxruntime-cpu", "sophgo-bm1684x", "sophgo-bm1690"} <= set(bundled_rules())


def test_own_rule_and_extension(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    child = 'extends = "small.toml"\nname = "child"\n[specs]\na = { bits = 4 }\n'
    (tmp_path / "child.toml").write_text(child)
    rule = load_rule(str(tmp_path / "child.toml"))

    assert rule.name == "child"
    assert rule.specs["a"].bits == 4
    assert rule.specs["a"].signedness == "from_range"
    assert rule.vendor == "nobody"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('signedness = "from_range"', "symetric = true"), "Did you mean 'symmetric'"),
        (('inputs = "a"', 'inputs = "b"'), r"\[ops.Conv\]: inputs names spec 'b'"),
        (('name = "small"', ""), "missing required field `name`"),
        (('"from_range"', '"sometimes"'), "sometimes"),
        (('signedness = "from_range"', "bits = 40"), "Widths are 2 to 16"),
        (('signedness = "from_range"', "min_range = 0.0"), "Give > 0"),
        (("from_range", 'from_range", symmetric = false, axis = "none'), "asymmetric"),
        (("[specs]", "[specs"), "not valid TOML"),
        (('name = "small"', 'extends = "small.toml"\nname = "small"'), "circle"),
    ],
)
def test_wrong_rule_says_where_and_what(change, message, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace(*change))
    with pytest.raises(RuleError, match=message):
        load_rule(str(path))


def test_unknown_name_suggests_and_missing_file_says_so(tmp_path):
    with pytest.raises(RuleError, match="Did you mean sophgo-bm1684x"):
        load_rule("sophgo-bm1684")
    with pytest.raises(RuleError, match="cannot be read"):
        load_rule(str(tmp_path / "none.toml"))
