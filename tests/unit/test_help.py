"""What ``--help`` says: examples that parse, and defaults that are the real ones."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from onnxqat.calibration import Calibration
from onnxqat.cli import main
from onnxqat.data.preprocess import Preprocessing
from onnxqat.evaluation.decoders.found import ALIASES, DECODERS
from onnxqat.evaluation.metrics import BUILT_IN as METRICS
from onnxqat.formats import EXPORTS
from onnxqat.option_values import AUGMENTATIONS
from onnxqat.train import Config
from onnxqat.train.config import CHOICES
from onnxqat.train.losses.terms import KINDS
from onnxqat.train.optimization.parameter_groups import FINE_RATE, RATE
from onnxqat.train.optimization.schedules import CYCLE_WARMUP, WARMUP
from onnxqat.train.presets import preset_names

COMMANDS = {
    **{name: command for name, command in main.commands.items() if name != "rules"},
    **{f"rules {name}": command for name, command in main.commands["rules"].commands.items()},
}
OPTIONS = [
    pytest.param(option, id=f"{name} {option.opts[-1]}")
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]
FINETUNE = {option.name: option for option in COMMANDS["finetune"].params}


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("rules")])
def test_every_example_parses(name):
    command = COMMANDS[name]
    program, called, *words = shlex.split(command.epilog)

    assert (program, called) == ("onnxqat", name)
    command.make_context(name, words)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_what_it_does(option):
    assert re.match(r"[A-Z].*\.$", option.help or "")
    assert not option.help.startswith("Of ")


def said_default(option):
    """Return the number behind "default", or None where there is no number."""
    found = re.search(r"\(default ([-\d.]+)", option.help)
    return None if found is None else float(found[1].rstrip("."))


@pytest.mark.parametrize(
    ("name", "real"),
    [
        ("momentum", Config().momentum),
        ("averaging_constant", Config().averaging_constant),
        ("scale_lr", Config().scale_lr),
        ("weight_decay", Config().weight_decay),
        ("quant_delay", Config().quant_delay),
        ("accumulate", Config().batches),
        ("label_smoothing", Config().label_smoothing or 0),
        ("lr", FINE_RATE),
        ("warmup", WARMUP),
        ("pad_value", Preprocessing().pad_value),
        ("threads", Config().threads),
    ],
)
def test_a_default_in_the_text_is_the_real_one(name, real):
    assert said_default(FINETUNE[name]) == real


def test_both_rates_and_both_warm_ups_are_the_real_ones():
    assert f"or {RATE} if" in FINETUNE["lr"].help
    assert f"one-cycle {CYCLE_WARMUP})" in FINETUNE["warmup"].help


@pytest.mark.parametrize("name", ["method", "optimizer", "schedule"])
def test_choices_and_default_of_finetune_are_those_of_config(name):
    assert tuple(FINETUNE[name].type.choices) == CHOICES[name]
    assert FINETUNE[name].default == getattr(Config(), name)


def test_choices_and_defaults_of_calibration_are_the_real_ones():
    from onnxqat.calibration.observers import OBSERVERS

    assert set(FINETUNE["observer"].type.choices) == set(OBSERVERS)
    assert FINETUNE["observer"].default == Calibration().observer
    assert FINETUNE["samples"].default == Calibration().samples


def test_names_in_a_text_are_those_that_exist():
    assert set(METRICS) <= names_in("evaluate", "metrics")
    assert {*DECODERS, *ALIASES} <= names_in("evaluate", "decode")
    assert set(KINDS) <= names_in("finetune", "loss")
    assert set(preset_names()) <= names_in("finetune", "preset")
    assert set(AUGMENTATIONS) <= names_in("finetune", "augment")


def names_in(command, name):
    """Return the words of an option's help, such as ``mean-iou``."""
    (option,) = (p for p in COMMANDS[command].params if p.name == name)
    return set(re.findall(r"[\w-]+", option.help))


def test_choices_of_export_are_the_formats_that_exist():
    (option,) = (p for p in COMMANDS["export"].params if p.name == "format_name")

    assert set(option.type.choices) == set(EXPORTS)


def test_options_stand_under_titles_and_the_output_comes_last():
    command = COMMANDS["insert"]
    text = command.get_help(click.Context(command, info_name="insert"))
    titles = re.findall(r"^([A-Z][\w ]+):$", text, flags=re.MULTILINE)

    assert titles[-2:] == ["Output", "Example"]
    assert {"Hardware rule", "Calibration", "Preprocessing"} <= set(titles)
    assert "MODEL\n" not in text.split("Output:")[1]
