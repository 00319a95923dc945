"""Take one training step of exported models, and compare gradients with finite differences.

    python scripts/check_gradients.py FILE_OR_FOLDER... [--batch 2] [--rule NAME] [--markdown OUT]

For each model, on the CPU and with random inputs:

1. Prepare the model, calibrate it (8 bits, min-max) and build the training form. The gradients of
   all weights and scales must be finite.
2. Build the training form of the float model, without fake-quantization. For some weights, compare
   the derivative of the loss along a random direction near the gradient with central differences of
   float32 forward passes. Several step sizes are tried, and the best one counts.

Some models are published without weights, with ConstantOfShape in their place. They get random
weights (He et al. 2015), and a Softmax at the end, which random weights saturate, is removed. The
loss is the mean squared difference from random targets. Exits with 1 if a model is refused, a
gradient is not finite, or a derivative is off by more than 2 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import OnnxQatError
from onnxqat.model import constant
from onnxqat.plan import QuantPlan, make_plan
from onnxqat.preparation import prepare
from onnxqat.preparation.editing import constant_values, remove_nodes, replace_input
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from onnxqat.train.engine import StepSession, forward_session
from onnxqat.train.form import training_form
from onnxqat.train.losses import read_loss, teacher_input

TOLERANCE = 0.02
FEW = 64  # elements; a model with a larger constant was published with its weights
PARAMETERS = 5
# Relative to the loss. Large steps cross kinks; small ones are lost in float32 rounding.
CHANGES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Row(NamedTuple):
    """One line of the table."""

    model: str
    nodes: int
    parameters: int
    zero: int
    seconds: float
    worst: float
    result: str


def random_inputs(graph, batch, rng):
    """Return values for every input: small integers, booleans, or normal floats."""
    feeds = {}
    for tensor in graph.inputs:
        shape = [size if isinstance(size, int) else 1 for size in tensor.shape]
        if shape and not isinstance(tensor.shape[0], int):
            shape[0] = batch
        if np.issubdtype(tensor.dtype, np.floating):
            feeds[tensor.name] = rng.normal(size=shape).astype(tensor.dtype)
        else:
            feeds[tensor.name] = rng.integers(0, 2, shape).astype(tensor.dtype)
    return feeds


def fill_in_weights(graph, rng):
    """Give a model without weights random ones; vectors are positive, as they may be variances."""
    stored = (constant_values(tensor) for tensor in graph.tensors().values())
    empty = [n for n in graph.nodes if n.op == "ConstantOfShape"]
    if not empty or max(values.size for values in stored if values is not None) > FEW:
        return
    for node in empty:
        shape, target = constant_values(node.inputs[0]).tolist(), node.outputs[0]
        size = np.sqrt(2 * shape[0] / np.prod(shape)) if len(shape) > 1 else 0
        values = rng.normal(scale=size, size=shape) if size else rng.uniform(0.5, 1.5, shape)
        replace_input(target, constant(target.name, values.astype(np.float32)))
    remove_nodes(graph, empty)
    graph.ir_version = max(graph.ir_version, 4)  # below 4, weights must also be inputs
    last = graph.outputs[0].inputs[0]
    if last.op == "Softmax":
        logits = last.inputs[0]
        logits.dtype, logits.shape = graph.outputs[0].dtype, graph.outputs[0].shape
        graph.outputs = [logits]


def step(form, feeds, batch):
    """Return gradients by name, the targets, the forward session, and the seconds of a step."""
    session = forward_session(form)
    outputs = session.run(None, feeds | form.parameters)
    names = [o.name for o in session.get_outputs()]
    rng = np.random.default_rng(1)
    targets = {
        name: y + (np.std(y) + 1e-3) * rng.normal(size=y.shape).astype(np.float32)
        for name, y in zip(names, outputs, strict=True)
    }
    training = StepSession(form, read_loss("mse"), batch_size=batch)
    teacher = {teacher_input(name): y for name, y in targets.items()}
    training.run(feeds | teacher)
    start = time.perf_counter()
    training.run(feeds | teacher)
    return training.gradients.views, targets, session, time.perf_counter() - start


def worst_derivative(form, feeds, batch, rng):
    """Return the largest relative error of the derivatives of some weights."""
    gradients, targets, session, _ = step(form, feeds, batch)
    values = feeds | {name: value.copy() for name, value in form.parameters.items()}

    def loss():
        outputs = session.run(None, values)
        pairs = zip(outputs, targets.values(), strict=True)
        return sum(float(np.mean(np.square(y.astype(np.float64) - t))) for y, t in pairs)

    moved = [n for n, g in gradients.items() if np.linalg.norm(g) > 0]
    start, worst = loss(), 0.0 if moved else np.inf
    for name in rng.choice(moved, size=min(PARAMETERS, len(moved)), replace=False):
        gradient, value = gradients[name].astype(np.float64), values[name].copy()
        line = gradient * rng.uniform(0.5, 1.5, gradient.shape)
        slope = float((gradient * line).sum())
        errors = []
        for change in CHANGES:
            distance = change * start / slope
            ends = []
            for sign in (1, -1):
                values[name] = (value + sign * distance * line).astype(np.float32)
                ends.append(loss())
            values[name] = value
            errors.append(abs((ends[0] - ends[1]) / (2 * distance) / slope - 1))
        worst = max(worst, min(errors))
    return worst


def check(path, rule, batch):
    rng = np.random.default_rng(0)
    loaded = load_model(path)
    fill_in_weights(loaded.graph, rng)  # before these constants are folded
    floats = prepare(loaded)
    plan = make_plan(floats.graph, load_rule(rule))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    feeds = random_inputs(floats.graph, batch, rng)
    sizes = {a.shape[0] for a in feeds.values() if a.ndim}
    batch = max(sizes, default=batch)
    form = training_form(calibrate(empty, [feeds], observer="minmax"))
    gradients, _, _, seconds = step(form, feeds, batch)
    finite = all(np.isfinite(g).all() for g in gradients.values())
    zero = len(form.parameters) - sum(bool(np.any(g)) for g in gradients.values())
    nothing = QuantPlan(rule=rule, points=(), skips=())
    float_form = training_form(insert_pairs(floats, nothing, {}, state="calibrated"))
    worst = worst_derivative(float_form, feeds, batch, rng)
    result = "ok" if finite and worst <= TOLERANCE else "WRONG" if finite else "NOT FINITE"
    return Row(
        path.stem, len(floats.graph.nodes), len(form.parameters), zero, seconds, worst, result
    )


def table(rows):
    lines = [
        "| model | nodes | parameters | with gradient 0 | step, s | finite differences | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.nodes} | {r.parameters} | {r.zero} | {r.seconds:.2f} | {r.worst:.1e} "
        f"| {r.result} |"
        for r in rows
    ]
    return "\n".join(lines)


def distribution():
    """Return the installed distribution of onnxruntime, and its version."""
    name = metadata.packages_distributions()["onnxruntime"][0]
    return f"{name} {metadata.version(name)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rule", default="onnxruntime-cpu")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    files = [f for p in arguments.paths for f in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]
    rows = []
    for path in files:
        try:
            row = check(path, arguments.rule, arguments.batch)
        except OnnxQatError as error:
            row = Row(path.stem, 0, 0, 0, 0.0, float("nan"), str(error))
        rows.append(row)
        print(*table([row]).splitlines()[2:], flush=True)
    if arguments.markdown:
        text = f"{distribution()}:\n\n{table(rows)}\n"
        arguments.markdown.write_text(text, encoding="utf-8")
    sys.exit(any(row.result != "ok" for row in rows))


if __name__ == "__main__":
    main()
