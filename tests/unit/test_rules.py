from __future__ import annotations

import tomllib
from importlib import resources

import jsonschema
import pytest

from onnxqat.errors import RuleError
from onnxqat.rules import bundled_rules, describe_rule, json_schema, load_rule, validate_rule

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
        (('inputs = "a"', "bits = 4"), "`bits`. That key belongs to another table."),
        (('inputs = "a"', 'inputs = "b"'), r"\[ops.Conv\]: inputs names spec 'b'"),
        (('name = "small"', ""), "missing required field `name`"),
        (('"from_range"', '"sometimes"'), "sometimes"),
        (('signedness = "from_range"', "bits = 40"), "Widths are 2 to 8, and 16"),
        (('signedness = "from_range"', "min_range = 0.0"), "Give a number above 0"),
        (('signedness = "from_range"', "min_range = inf"), "Give a number above 0"),
        (('signedness = "from_range"', "scale_ratio = 0.5"), "Give a number of 1 or more"),
        (
            ('signedness = "from_range"', "scale_ratio = 2, power_of_two = true"),
            "scale_ratio needs power_of_two = false",
        ),
        (('signedness = "from_range"', 'observer = "median"'), "Invalid enum value 'median'"),
        (
            ('signedness = "from_range"', "range_factor = nan"),
            "range_factor = nan. Give a number above 0",
        ),
        (('signedness = "from_range"', "fixed_range = [-inf, 1.0]"), "Give a finite range"),
        (('signedness = "from_range"', "fixed_range = [0.5, 1.0]"), "Give a finite range"),
        (("[specs]", f"x = {'[' * 5000}{']' * 5000}"), "is nested too deeply"),
        (("from_range", 'from_range", symmetric = false, axis = "none'), "asymmetric"),
        (("[specs]", "[specs"), "not valid TOML"),
        (('name = "small"', 'extends = "small.toml"\nname = "small"'), "back to itself"),
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
    with pytest.raises(RuleError, match="no such file"):
        load_rule(str(tmp_path / "none.toml"))


WRONG = """name = "wrong"
vendor = "nobody"
summary = "for tests"
sources = ["none"]
weight_bits = [9]
activation_bits = [8]
fuse = [["Conv", "Reluu"]]
[specs]
a = { bitz = 4 }
b = { symmetric = false, signedness = "from_range" }

[specs.c]
bits = 40
[ops]
Conv = { inputs = "a", outputs = "d" }
Cnov = { inputs = "a" }
[[exceptions]]
op = ["Conv"]
float = "because"
[[exceptions]]
op = ["Conv"]
kernel = 3
"""


def test_validation_names_every_mistake_with_its_line(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(WRONG)

    assert validate_rule(str(path)) == [
        f"{path}:9 [specs.a]: Object contains unknown field `bitz`. Did you mean 'bits'?",
        f"{path}:20 [exceptions.1]: Expected `array | null`, got `int` - at `kernel`.",
    ]
    advice = "Set signedness to 'signed' or 'unsigned'."
    path.write_text(WRONG.replace("bitz", "bits").replace("kernel = 3", 'unsupported = ""'))

    assert validate_rule(str(path)) == [
        f"{path}:10 [specs.b]: an asymmetric spec needs a fixed signedness. {advice}",
        f"{path}:12 [specs.c]: bits = 40. Widths are 2 to 8, and 16.",
        f"{path}:15 [ops.Conv]: outputs names spec 'd', which is not defined. Defined: a, b, c.",
        f"{path}:16 [ops.Cnov]: 'Cnov' is not an op type of ONNX. Did you mean 'Conv'?",
        f"{path}:7 [fuse]: 'Reluu' is not an op type of ONNX. Did you mean 'Relu'?",
        f"{path}:5 [weight_bits]: [9]. Widths are 2 to 8, and 16.",
    ]


@pytest.mark.parametrize("name", bundled_rules())
def test_bundled_rule_is_valid_and_described(name):
    assert validate_rule(name) == []

    text = describe_rule(load_rule(name))
    assert text.startswith(f"{name}: ")
    assert "source: " in text


@pytest.mark.parametrize("name", bundled_rules())
def test_schema_accepts_the_bundled_rules(name):
    text = (resources.files("onnxqat.rules") / f"{name}.toml").read_text(encoding="utf-8")

    jsonschema.validate(tomllib.loads(text), json_schema())


@pytest.mark.parametrize(
    "table",
    [
        {"name": "incomplete"},
        {"extends": "tflite", "opz": {}},
        {"extends": "tflite", "specs": {"weight": {"bitz": 4}}},
        {"extends": "tflite", "specs": {"weight": {"observer": "median"}}},
        {"extends": "tflite", "ops": {"Conv": {"parameters": "shared"}}},
        {"extends": "tflite", "exceptions": [{"unsupported": "no op is named"}]},
    ],
)
def test_schema_refuses_what_the_loader_does(table):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(table, json_schema())


def test_schema_knows_the_keys_of_rule_files():
    schema = json_schema()
    rule = schema["$defs"]["HardwareRule"]["properties"]

    assert {"extends", "specs", "ops", "float", "unsupported", "exceptions"} <= rule.keys()
    assert "float" in schema["$defs"]["RuleException"]["properties"]
    assert schema["$defs"]["RuleSpec"]["additionalProperties"] is False
