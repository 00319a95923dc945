"""The bundled digits, and a LeNet-5 calibrated on some of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.data import DataSet, InputSpec, Preprocessing, open_data
from onnxqat.model import Model
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule

MODELS = Path(__file__).parents[1] / "models"
INPUT = InputSpec(name="input", shape=("N", 1, 28, 28), dtype="float32")
PIXELS = Preprocessing(mean=(128.0,), scale=(1 / 128,))


def write_digits(path: Path, count: int, split: str = "train") -> Path:
    """Write the first ``count`` digits of a split, with their labels, to an .npz; return it."""
    with np.load(MODELS / f"digits-{split}.npz") as digits:
        np.savez(path, images=digits["images"][:count], label=digits["label"][:count])
    return path


@contextmanager
def training_digits(count: int) -> Iterator[DataSet]:
    """Open the first ``count`` training digits with the preprocessing of LeNet-5."""
    with open_data(MODELS / "digits-train.npz", [INPUT], preprocessing=PIXELS) as opened:
        yield opened.subset(np.arange(count))


def calibrated_lenet(data: DataSet, *overrides: str, rule: str = "sophgo-bm1684x") -> Model:
    """Return a calibrated LeNet-5 with Q/DQ pairs by a rule and overrides."""
    floats = prepare(load_model(MODELS / "lenet5.onnx"))
    plan = make_plan(floats.graph, load_rule(rule), list(map(parse_override, overrides)))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, (b.inputs for b in data.batches(100)), threads=1)
