"""The form that all check scripts share: compare a model in a vendor's tool with ours.

    ONNXQAT_<TOOL>=PYTHON python scripts/check_<tool>.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with the tool, QDQ a calibrated or fine-tuned model, and
SAMPLES the number of samples (500). Without the variable, a script says in one line that it is
skipped, and why, and exits with 0.

A script prints one JSON document. ``predictions`` is the share of samples whose prediction agrees.
``layers`` holds, for each layer that ran alone on identical inputs, the share of its values that
differ and the largest difference in levels, that is in steps of the output's scale. ``failed`` says
which limits were exceeded; the script exits with 1 if there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import onnx
from onnx.utils import Extractor
from vendor_environment import TIME_LIMIT, Array, Environment, Feeds, Tool

from onnxqat.data import open_data
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.steps import Values
from onnxqat.pairs import dequantized_name
from onnxqat.quantized import AnyModel, QuantizedModel, load_model, require_quantized
from onnxqat.rules import HardwareRule
from onnxqat.runtime import open_session
from onnxqat.settings import input_specs, stored_settings

__all__ = [
    "KERNELS",
    "LAYER_SAMPLES",
    "SAMPLES",
    "Array",
    "Environment",
    "FakeQuantized",
    "Feeds",
    "Findings",
    "Integers",
    "Layer",
    "Reference",
    "Tolerance",
    "Tool",
    "agreement",
    "compare",
    "feeds_of",
    "inputs_of",
    "layers_of",
    "levels_between",
    "main",
    "put_layers",
]

KERNELS = ("Conv", "Gemm")
SAMPLES = 500
LAYER_SAMPLES = 64
BATCH = 50


class Tolerance(NamedTuple):
    """What a layer alone, and the predictions of the whole model, may differ by.

    Attributes
    ----------
    differing : float
        Largest share of a layer's values that may differ.
    levels : float
        Largest difference of a value, in levels.
    predictions : float
        Smallest share of predictions that agree.
    """

    differing: float
    levels: float
    predictions: float


class Layer(NamedTuple):
    """A node, or a chain of fused nodes, between quantized tensors.

    Attributes
    ----------
    inputs : tuple of str
        Names of the activations that it reads.
    output : str
        Name of its output in the float model.
    dequantized : str
        Name of its output behind the Q/DQ pair.
    scale : float
        Scale of the output.
    """

    inputs: tuple[str, ...]
    output: str
    dequantized: str
    scale: float


@dataclass
class Findings:
    """Results of a comparison.

    Attributes
    ----------
    predictions : float
        Share of samples whose prediction agrees.
    layers : dict of str to (float, float)
        By output: share of the values that differ, and the largest difference in levels.
    more : dict
        Further entries of the document.
    faults : list of str
        Further reasons to fail.
    """

    predictions: float
    layers: dict[str, tuple[float, float]]
    more: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class Reference(Protocol):
    """What a tool is compared with: real values of the whole model, and of a layer alone."""

    def whole(self, feeds: Feeds) -> Array:
        """Return the first output."""

    def layer(self, layer: Layer, feeds: Feeds) -> Array:
        """Return the output of a layer for the values of its inputs."""


class FakeQuantized:
    """The Q/DQ model in the installed onnxruntime, without optimizations."""

    def __init__(self, model: QuantizedModel) -> None:
        self._proto = model.to_proto()
        self._extractor = Extractor(self._proto)

    def whole(self, feeds: Feeds) -> Array:
        """Return the first output."""
        return _run(self._proto, feeds)

    def layer(self, layer: Layer, feeds: Feeds) -> Array:
        """Return the output of a layer for the values of its inputs."""
        return _run(self._extractor.extract_model(list(layer.inputs), [layer.dequantized]), feeds)


class Integers:
    """The integer evaluation of a rule (default: the rule of the model's plan)."""

    def __init__(self, model: QuantizedModel, rule: HardwareRule | None = None) -> None:
        self.program = IntegerProgram(model, rule)

    def whole(self, feeds: Feeds) -> Array:
        """Return the first output."""
        count = len(next(iter(feeds.values())))
        parts = (
            {name: x[i : i + BATCH] for name, x in feeds.items()} for i in range(0, count, BATCH)
        )
        return np.concatenate([self.program.run(None, part)[0] for part in parts])

    def layer(self, layer: Layer, feeds: Feeds) -> Array:
        """Return the output of a layer for the values of its inputs."""
        grids = self.program.grids
        given = {k: grids[k].quantize(x, "half-even") for k, x in feeds.items()}
        values = Values(levels=dict(given))
        for step in self.program.steps:
            with contextlib.suppress(KeyError):  # the step reads tensors of other layers
                found = step.run(values)
                values.floats |= found.floats
                values.levels |= found.levels | given  # one input may be computed from another
                if layer.output in found.levels:
                    return grids[layer.output].dequantize(found.levels[layer.output])
        raise ValueError(f"No step writes '{layer.output}'.")


def _run(model: onnx.ModelProto, feeds: Feeds) -> Array:
    return np.asarray(open_session(model, optimization="none").run(None, feeds)[0])


def feeds_of(model: AnyModel, source: str, samples: int | None = None) -> Feeds:
    """Return the first samples of DATA (default: all) as one batch."""
    settings = stored_settings(model)
    data = open_data(
        source,
        input_specs(model),
        preprocessing=settings.preprocessing(),
        label=settings.label,
        input_map=settings.input_map,
    )
    with data:
        batch = next(iter(data.batches(min(samples or len(data), len(data)))))
    return {name: np.asarray(x) for name, x in batch.inputs.items()}


def layers_of(model: QuantizedModel, ops: Collection[str] = KERNELS) -> list[Layer]:
    """Return the layers that begin with one of ``ops`` and end with a quantized tensor."""
    plan, params, graph = model.plan, model.params, model.floats.graph
    points = {p.tensor: p for p in plan.grid_points() if p.role == "activation"}
    read: dict[str, list[str]] = {}
    for name, point in points.items():
        for edge in point.consumers:
            read.setdefault(edge.node, []).append(name)
    nodes, outputs = {n.name: n for n in graph.nodes}, {t.name for t in graph.outputs}
    ends = {chain[0]: chain[-1] for chain in plan.chains}
    layers = []
    for node in graph.nodes:
        output = nodes[ends.get(node.name, node.name)].outputs[0].name.removesuffix("/float")
        if node.op in ops and node.name in read and output in points:
            behind = output if output in outputs else dequantized_name(output)
            scale = float(params[points[output].parameters].scale)
            layers.append(Layer(tuple(dict.fromkeys(read[node.name])), output, behind, scale))
    return layers


def inputs_of(model: QuantizedModel, layers: Iterable[Layer], feeds: Feeds) -> Feeds:
    """Return the dequantized values of all inputs of layers, by name in the float model."""
    names = sorted({name for layer in layers for name in layer.inputs})
    probe = model.to_proto()
    del probe.graph.output[:]
    for name in names:
        value = onnx.helper.make_tensor_value_info(dequantized_name(name), 1, None)
        probe.graph.output.append(value)
    found = open_session(probe, optimization="none").run(None, feeds) if names else []
    return dict(zip(names, map(np.asarray, found), strict=True))


def put_layers(
    environment: Environment, model: onnx.ModelProto, layers: Sequence[Layer], values: Feeds
) -> None:
    """Write each layer of a float or an exported model as a model of its own: 0000, 0001, ..."""
    extractor = Extractor(model)
    written = {name for node in model.graph.node for name in node.output}
    for i, layer in enumerate(layers):
        output = layer.dequantized if layer.dequantized in written else layer.output
        part = extractor.extract_model(list(layer.inputs), [output])
        environment.put(f"{i:04}", part, {name: values[name] for name in layer.inputs})


def compare(
    environment: Environment,
    model: QuantizedModel,
    subject: onnx.ModelProto,
    feeds: Feeds,
    code: str,
    *words: str | Path,
    layers: Sequence[Layer] | None = None,
    reference: Reference | None = None,
    limit: float = TIME_LIMIT,
) -> Findings:
    """Run a model, whole and layer by layer, in a tool, and compare it with a reference.

    Parameters
    ----------
    model : QuantizedModel
        The Q/DQ model.
    subject : ModelProto
        What the tool is given: the stripped model, or an export.
    code : str
        Python code that defines ``load``, as of `Environment.run_parts`; ``words`` are its
        arguments, and ``limit`` its time in seconds.
    layers : sequence of Layer, optional
        Default: those of `layers_of`.
    reference : Reference, optional
        Default: the Q/DQ model.
    """
    layers = layers_of(model) if layers is None else layers
    reference = reference or FakeQuantized(model)
    values = inputs_of(model, layers, {k: v[:LAYER_SAMPLES] for k, v in feeds.items()})
    environment.put("whole", subject, feeds)
    put_layers(environment, subject, layers, values)
    environment.run_parts(code, *words, limit=limit)
    found, ours = environment.result("whole"), reference.whole(feeds)
    alone = {
        layer.output: levels_between(
            environment.result(f"{i:04}"),
            reference.layer(layer, {name: values[name] for name in layer.inputs}),
            layer.scale,
        )
        for i, layer in enumerate(layers)
    }
    return Findings(
        agreement(found, ours),
        alone,
        more={"largest_difference": float(np.abs(found.reshape(ours.shape) - ours).max())},
    )


def levels_between(one: Array, other: Array, scale: float = 1.0) -> tuple[float, float]:
    """Return the share of values that differ, and the largest difference in levels."""
    if one.size != other.size:
        raise ValueError(f"Shapes {one.shape} and {other.shape} differ.")
    off = np.abs(one.reshape(other.shape).astype(np.float64) - other) / scale
    return float((off > 0.5).mean()), float(off.max(initial=0.0))


def agreement(one: Array, other: Array) -> float:
    """Return the share of samples whose highest score is in the same place."""
    return float((one.reshape(other.shape).argmax(-1) == other.argmax(-1)).mean())


def failures(findings: Findings, tolerance: Tolerance) -> list[str]:
    """Return the reasons for which a comparison fails."""
    found = list(findings.faults)
    for name, (differing, levels) in findings.layers.items():
        if not (differing <= tolerance.differing and levels <= tolerance.levels + 1e-3):
            found.append(
                f"{name}: {differing:.4%} of the values differ, by up to {levels:.4g} levels; "
                f"allowed are {tolerance.differing:.4%} and {tolerance.levels:g}"
            )
    if not findings.predictions >= tolerance.predictions:
        found.append(
            f"{findings.predictions:.2%} of the predictions agree; {tolerance.predictions:.2%} "
            "are wanted"
        )
    return found


Check = Callable[[QuantizedModel, Feeds, Environment], Findings]


def main(tool: Tool, tolerance: Tolerance, check: Check) -> NoReturn:
    """Run a check script: read its arguments, print its document and exit."""
    given = os.environ.get(tool.variable)
    if not given:
        print(f"skipped: {tool.variable} does not name the Python of an environment with "
              f"{tool.name}")  # fmt: skip
        sys.exit(0)
    script, *words = sys.argv
    if len(words) not in (2, 3):
        print(f"usage: {tool.variable}=PYTHON python {script} QDQ DATA [SAMPLES]", file=sys.stderr)
        sys.exit(2)
    python = shutil.which(given)
    if python is None:
        sys.exit(f"{tool.variable}: there is no program '{given}'. Name the Python of an "
                 f"environment with {tool.name}.")  # fmt: skip
    model = require_quantized(load_model(words[0]))
    feeds = feeds_of(model, words[1], int(words[2]) if len(words) == 3 else SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(tool, str(Path.cwd() / python), Path(folder))
        version = environment.version()
        findings = check(model, feeds, environment)
    failed = failures(findings, tolerance)
    document = {
        "tool": tool.name,
        "version": version,
        "rule": model.plan.rule,
        "samples": len(next(iter(feeds.values()))),
        "predictions": findings.predictions,
        **findings.more,
        "layers": {
            name: {"differing": differing, "max_levels": levels}
            for name, (differing, levels) in findings.layers.items()
        },
        "failed": failed,
    }
    print(json.dumps(document, indent=2))
    sys.exit(1 if failed else 0)
