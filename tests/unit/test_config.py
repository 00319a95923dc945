from __future__ import annotations

import pytest

from onnxqat.errors import TrainingError
from onnxqat.train import Config
from onnxqat.train.presets import preset, preset_names


def test_the_defaults_are_right():
    Config()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "linear"}, r"Config: schedule 'linear' is unknown\. There are: 'cosine'"),
        (
            {"optimizer": "lion"},
            r"Config: optimizer 'lion' is unknown\. There are: 'adamw', 'adam', 'sgd'",
        ),
        ({"method": "qil"}, r"Config: method 'qil' is unknown\. There are: 'lsq'"),
        ({"method": "lsq +"}, r"Config: method 'lsq \+' is unknown\. The nearest: 'lsq\+'"),
        ({"averaging_constant": 1.5}, r"`float` <= 1.0 - at `\$.averaging_constant`"),
        ({"quant_delay": -1}, r"`int` >= 0 - at `\$.quant_delay`"),
        ({"accumulate": 0}, r"`int` >= 1 - at `\$.accumulate`"),
        ({"epochs": 1.5}, r"Expected `int .*, got `float` - at `\$.epochs`"),
        ({"lr": -1e-3}, r"`float` >= 0.0 - at `\$.lr`"),
        ({"ema": 1.0}, r"`float` < 1.0 - at `\$.ema`"),
        ({"clip_norm": 0.0}, r"`float` > 0.0 - at `\$.clip_norm`"),
        ({"warmup": 2.0}, r"`float` <= 1.0 - at `\$.warmup`"),
        ({"groups": "weight.lr=1"}, r"Expected `array`, got `str` - at `\$.groups`"),
        ({"loss": object()}, r"object"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(TrainingError, match=message):
        Config(**wrong)


def test_presets_are_right():
    assert preset_names() == ["horizon"]
    for name in preset_names():
        Config(**preset(name))
    with pytest.raises(TrainingError, match=r"No preset 'sony'\. Use one of horizon"):
        preset("sony")
