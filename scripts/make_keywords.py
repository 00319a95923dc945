"""Make the bundled keywords, generated audio, and train the bundled LSTM that spots them.

    python scripts/make_keywords.py --out models

Needs no more than the package. Everything is seeded: the same versions on the same kind of CPU
give the same files. A keyword is a figure of tones, as bird calls and ring tones are: up, down, a
rise behind a fall, three short beeps, and so on. Pitch, tempo, start and loudness differ from
sample to sample, and noise lies over all. A network sees the loudness of frequency bands over
time, the features of real keyword spotters.
"""

from __future__ import annotations

import argparse
import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxqat.model import from_proto
from onnxqat.plan import QuantPlan
from onnxqat.preparation import prepare
from onnxqat.quantized import QuantizedModel, insert_pairs
from onnxqat.train.engine import StepSession, forward_session
from onnxqat.train.form import TrainingForm, training_form
from onnxqat.train.losses import LABELS, read_loss

RATE, FRAME, FRAMES, BANDS = 4000, 128, 20, 10  # samples a second; samples a frame; features
LEVELS = 16  # of a feature
# By keyword, how its pitch moves: octaves over the reference at points of time from 0 to 1; nan is
# silence from there on.
FIGURES: dict[str, list[tuple[float, float]]] = {
    "up": [(0, 0), (1, 1)],
    "down": [(0, 1), (1, 0)],
    "hill": [(0, 0), (0.5, 1), (1, 0)],
    "valley": [(0, 1), (0.5, 0), (1, 1)],
    "low-high": [(0, 0), (0.5, 0), (0.5, 1), (1, 1)],
    "high-low": [(0, 1), (0.5, 1), (0.5, 0), (1, 0)],
    "beeps": [(0, 0.5), (0.2, 0.5), (0.2, np.nan), (0.4, np.nan), (0.4, 0.5), (0.6, 0.5),
              (0.6, np.nan), (0.8, np.nan), (0.8, 0.5), (1, 0.5)],
    "tone": [(0, 0.5), (1, 0.5)],
}  # fmt: skip
TRAIN, TEST = 1024, 1024  # samples of the bundled files
UNITS, EPOCHS, BATCH, RATE_OF_STEPS = 32, 30, 32, 4e-3

Floats = NDArray[np.float32]


def sound(figure: list[tuple[float, float]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return one keyword as samples, shape (FRAMES * FRAME,)."""
    count = FRAMES * FRAME
    length = int(count * rng.uniform(0.5, 0.8))
    start = int(rng.integers(0, count - length))
    times, octaves = np.array(figure, np.float64).T
    at = np.linspace(0, 1, length)
    quiet = np.isnan(octaves)
    pitch = np.interp(at, times, np.where(quiet, 0, octaves))
    audible = np.interp(at, times, np.where(quiet, 0.0, 1.0)) > 0.5
    frequency = rng.uniform(300, 600) * 2**pitch
    wave = np.sin(2 * np.pi * np.cumsum(frequency) / RATE) * audible
    samples = rng.normal(scale=rng.uniform(0.2, 0.7), size=count)
    samples[start : start + length] += rng.uniform(0.5, 1.0) * wave
    return samples


def features(samples: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the loudness of each band over time, shape (FRAMES, BANDS), from 0 to LEVELS - 1."""
    frames = samples.reshape(FRAMES, FRAME) * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(200, 1900, BANDS + 1) / (RATE / FRAME)
    bands = [power[:, int(a) : max(int(b), int(a) + 1)].mean(1) for a, b in pairwise(edges)]
    loudness = np.log2(np.stack(bands, axis=1) + 1e-3)
    return np.clip(np.rint(loudness + 2), 0, LEVELS - 1).astype(np.uint8)


def keywords(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return features of shape (count, FRAMES, BANDS), and labels of shape (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(FIGURES))
    figures = list(FIGURES.values())
    return np.stack([features(sound(figures[label], rng)) for label in labels]), labels


def network(seed: int) -> onnx.ModelProto:
    """Return the untrained network: an LSTM, and a layer on its last state."""
    rng = np.random.default_rng(seed)
    bound = UNITS**-0.5

    def weight(name: str, *shape: int, size: float = bound) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.uniform(-size, size, shape).astype(np.float32), name)

    weights = [
        weight("lstm.W", 1, 4 * UNITS, BANDS, size=bound / 4),  # features are up to 15
        weight("lstm.R", 1, 4 * UNITS, UNITS),
        weight("lstm.B", 1, 8 * UNITS),
        weight("classes.weight", len(FIGURES), UNITS),
        weight("classes.bias", len(FIGURES)),
        numpy_helper.from_array(np.array([0], np.int64), "axis"),
    ]
    nodes = [
        helper.make_node("Transpose", ["features"], ["frames"], "turn", perm=[1, 0, 2]),
        helper.make_node(
            "LSTM", ["frames", "lstm.W", "lstm.R", "lstm.B"], ["", "last"], "lstm",
            hidden_size=UNITS,
        ),
        helper.make_node("Squeeze", ["last", "axis"], ["state"], "state"),
        helper.make_node(
            "Gemm", ["state", "classes.weight", "classes.bias"], ["scores"], "classes", transB=1
        ),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "keywords",
        [value("features", TensorProto.FLOAT, ["N", FRAMES, BANDS])],
        [value("scores", TensorProto.FLOAT, ["N", len(FIGURES)])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def float_form(model: onnx.ModelProto) -> TrainingForm:
    """Return the training form of a network that nothing of is quantized."""
    nothing = QuantPlan(rule="none", points=(), skips=())
    floats: QuantizedModel = insert_pairs(
        prepare(from_proto(model)), nothing, {}, state="calibrated"
    )
    return training_form(floats)


def train(form: TrainingForm, inputs: Floats, labels: NDArray[np.int64], seed: int) -> None:
    """Train with Adam (Kingma and Ba 2015) and a rate that falls by half a cosine, in place."""
    session = StepSession(form, read_loss("cross-entropy"), batch_size=BATCH, threads=1)
    values, gradients = session.values.buffer, session.gradients.buffer
    first, second = np.zeros_like(gradients), np.zeros_like(gradients)
    rng = np.random.default_rng(seed)
    each, step = len(inputs) // BATCH, 0
    for _ in range(EPOCHS):
        for rows in rng.permutation(len(inputs))[: each * BATCH].reshape(each, BATCH):
            session.run({"features": inputs[rows], LABELS: labels[rows]})
            step += 1
            first += 0.1 * (gradients - first)
            second += 0.001 * (gradients**2 - second)
            direction = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            rate = RATE_OF_STEPS * (1 + np.cos(np.pi * step / (EPOCHS * each))) / 2
            values -= np.float32(rate) * direction
    for name, array in session.values.views.items():
        form.weights[name][...] = array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models"), help="directory to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for title, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        made, labels = keywords(count, seed)
        np.savez_compressed(out / f"keywords-{title}.npz", features=made, label=labels)
    model = network(seed=0)
    form = float_form(model)
    inputs, labels = keywords(8 * TRAIN, seed=3)
    train(form, inputs.astype(np.float32), labels, seed=0)
    for tensor in model.graph.initializer:
        if tensor.name in form.weights:
            tensor.CopyFrom(numpy_helper.from_array(form.weights[tensor.name], tensor.name))
    onnx.save(model, out / "keywords.onnx")
    inputs, labels = keywords(TEST, seed=2)
    feeds = {"features": inputs.astype(np.float32), **form.parameters}
    (scores,) = forward_session(form, threads=1).run(None, feeds)
    print(f"keywords: top-1 {(scores.argmax(1) == labels).mean():.2%}")
    for path in sorted(out.glob("keywords*")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.name}")


if __name__ == "__main__":
    main()
