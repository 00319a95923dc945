"""Prepare and run one graph, then quantize and check it under one rule after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import onnxqat
from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.errors import OnnxQatError, PlanError
from onnxqat.model import Model, from_proto, load_model
from onnxqat.quantized import (
    OPSET_OF_16_BITS,
    QuantizedModel,
    insert_pairs,
    needs_16_bits,
    read_pairs,
)
from onnxqat.runtime import open_session

__all__ = ["LOW_DB", "GraphTrial", "first_line"]

Batch = dict[str, np.ndarray]
Step = tuple[str, str, float, float]

SEED = 0
DYNAMIC_BATCH, DYNAMIC_SIDE = 4, 64  # replace dimensions without a number
MAX_TOKEN = 100  # if no embedding shows the size of the vocabulary
NOTHING = "quantizes nothing"  # for example a rule for convolutions in a graph without any
LOW_DB = 20.0  # a lower SQNR at W8A8 needs an explanation
FINE_DB = 40.0
WORST_STEPS = 3
FLOAT = onnx.TensorProto.FLOAT
FORWARDING = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def random_batches(graph: gs.Graph, samples: int, rng: np.random.Generator) -> list[Batch]:
    """Return enough batches of random inputs to hold ``samples``."""
    found: list[Batch] = []
    while sum(batch_size(batch) for batch in found) < samples:
        found.append({tensor.name: random_input(tensor, rng) for tensor in graph.inputs})
    return found


def batch_size(batch: Batch) -> int:
    value = next(iter(batch.values()))
    return len(value) if value.ndim else 1


def random_input(tensor: gs.Tensor, rng: np.random.Generator) -> np.ndarray:
    """Return normal floats, bytes, token ids below the embedding's rows, or a mask of ones."""
    shape = [
        size if isinstance(size, int) and size > 0 else DYNAMIC_SIDE if i else DYNAMIC_BATCH
        for i, size in enumerate(tensor.shape)
    ]
    dtype = np.dtype(tensor.dtype)
    if dtype.kind == "f":
        values = rng.normal(size=shape)
        if len(shape) == 4:  # averages of random pixels alone would be alike for all images
            values += rng.normal(size=(*shape[:2], 1, 1))
        return values.astype(dtype)
    if dtype.kind == "b" or "mask" in tensor.name:
        return np.ones(shape, dtype)
    limit = 256 if dtype.itemsize == 1 else embedding_rows(tensor)
    return rng.integers(0, limit, shape).astype(dtype)


def embedding_rows(tensor: gs.Tensor) -> int:
    """Return the number of rows of the smallest table that ``tensor`` indexes."""
    rows, waiting = [MAX_TOKEN + 1], list(tensor.outputs)
    while waiting:
        node = waiting.pop()
        table = node.inputs[0]
        if node.op == "Gather" and isinstance(table, gs.Constant) and table is not tensor:
            rows.append(table.shape[node.attrs.get("axis", 0)])
        elif node.op in FORWARDING:
            waiting += node.outputs[0].outputs
    return min(rows)


def outputs_of(
    proto: onnx.ModelProto, batches: list[Batch], names: list[str] | None = None
) -> list[np.ndarray]:
    """Run a model node by node, and return its outputs (all, or some) over all batches."""
    session = open_session(proto, optimization="none")
    runs = [session.run(names, batch) for batch in batches]
    return [np.concatenate([np.atleast_1d(r[i]) for r in runs]) for i in range(len(runs[0]))]


def sqnr(expected: list[np.ndarray], found: list[np.ndarray]) -> float | None:
    """Return the worst 10 log10(sum x^2 / sum (x - y)^2) of the float outputs; None if equal."""
    ratios = []
    for x, y in zip(expected, found, strict=True):
        if x.dtype.kind != "f":
            continue
        if x.shape != y.shape:
            message = f"an output has shape {y.shape} instead of {x.shape}"
            raise ValueError(message)
        x, y = x.astype(np.float64), y.astype(np.float64)
        noise = np.sum((x - y) ** 2)
        if noise != 0:
            ratios.append(10 * np.log10(np.sum(x**2) / noise))
    return float(np.min(ratios)) if ratios else None  # Python's own min can lose a NaN


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or ["no message"]
    return text[0] if isinstance(error, OnnxQatError) else f"{type(error).__name__}: {text[0]}"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    result = work()
    return result, time.monotonic() - started


class GraphTrial:
    """One graph, prepared and run in float once, to be tried with every rule.

    Rules with 16-bit points upgrade it to the opset that has them.
    """

    def __init__(self, path: Path, samples: int, observer: str, opset: int = 13) -> None:
        self.observer = observer
        self.with_16_bits = cache(lambda: GraphTrial(path, samples, observer, OPSET_OF_16_BITS))
        original = load_model(path)
        self.prepared, self.prepare_seconds = timed(lambda: onnxqat.prepare(original, opset=opset))
        self.proto = self.prepared.to_proto()
        self.bytes = self.proto.SerializeToString(deterministic=True)
        rng = np.random.default_rng(SEED)
        self.calibration = random_batches(self.prepared.graph, samples, rng)
        # the same inputs as in calibration, so that only rounding causes errors
        self.evaluation = self.calibration or random_batches(self.prepared.graph, 1, rng)
        self.expected = outputs_of(self.proto, self.evaluation)
        before = outputs_of(original.to_proto(), self.evaluation)
        self.prepared_sqnr = sqnr(before, self.expected)

    def facts(self) -> dict[str, Any]:
        """Return facts for all rules; ``prepared_sqnr_db`` compares with the original file."""
        return {
            "nodes": len(self.prepared.graph.nodes),
            "opset": self.prepared.graph.opset,
            "prepare_seconds": self.prepare_seconds,
            "prepared_sqnr_db": self.prepared_sqnr,
        }

    def cell(self, rule_name: str) -> dict[str, Any]:
        """Quantize the graph by a rule; return facts and the results of its ``checks``."""
        cell: dict[str, Any] = {"rule": rule_name, "checks": {}}
        try:
            rule = onnxqat.load_rule(rule_name)
            plan, seconds = timed(lambda: onnxqat.make_plan(self.prepared.graph, rule))
            if needs_16_bits(plan) and self.prepared.graph.opset < OPSET_OF_16_BITS:
                return self.with_16_bits().cell(rule_name)
            cell |= {"plan_seconds": seconds, "points": len(plan.points)}
            cell |= {"skips": [[s.node, s.op_type, s.reason] for s in plan.skips]}
            cell["checks"]["accounted"] = accounted(self.prepared, plan)
            params = placeholder_params(self.prepared, plan)
            quantized, cell["insert_seconds"] = timed(
                lambda: insert_pairs(self.prepared, plan, params, state="uncalibrated")
            )
        except Exception as error:  # whatever escapes is the finding
            if isinstance(error, PlanError) and NOTHING in str(error):
                return cell | {"refused": first_line(error)}
            cell["checks"]["insert"] = first_line(error)
            return cell
        for name, check in self._checks(quantized, cell):
            try:
                cell["checks"][name] = check()
            except Exception as error:  # whatever escapes is the finding
                cell["checks"][name] = first_line(error)
        return cell

    def _checks(
        self, quantized: QuantizedModel, cell: dict[str, Any]
    ) -> Iterator[tuple[str, Callable[[], str]]]:
        """Yield the checks by name; each returns an error, or "" if it passes."""

        def checker() -> str:
            onnx.checker.check_model(quantized.to_proto(), full_check=True)
            return ""

        def runtime() -> str:
            open_session(quantized.to_proto(), optimization="all")
            outputs_of(quantized.to_proto(), self.evaluation)
            return ""

        def strip() -> str:
            read = read_pairs(from_proto(quantized.to_proto())).floats
            back = read.to_proto().SerializeToString(deterministic=True)
            return "" if back == self.bytes else "not the prepared model's bytes"

        def noise() -> str:
            found, cell["lost_in"] = self._noise(quantized)
            cell["sqnr_db"] = found
            return "" if found is None or np.isfinite(found) else f"SQNR is {found}"

        yield "checker", checker
        yield "runtime", runtime
        yield "strip", strip
        if self.calibration:
            yield "sqnr", noise

    def _noise(self, quantized: QuantizedModel) -> tuple[float | None, list[Step]]:
        """Return the SQNR of the outputs after calibration and, if it is low, where it is lost."""
        calibrated = calibrate(quantized, self.calibration, observer=self.observer)
        found = sqnr(self.expected, outputs_of(calibrated.to_proto(), self.evaluation))
        return found, self._steps(calibrated) if found is not None and found < LOW_DB else []

    def _steps(self, calibrated: QuantizedModel) -> list[Step]:
        """Return the nodes that lose most: (node, op type, dB of its worst input, of its output).

        An exact input counts as `FINE_DB`, the usual SQNR with eight bits.
        """
        nodes = self.prepared.graph.nodes
        names = [t.name for n in nodes for t in n.outputs if is_float(t)]
        known = calibrated.qdq().graph.tensors()
        there = [f"{n}/dequantized" if f"{n}/dequantized" in known else n for n in names]
        batch = self.evaluation[:1]
        pairs = zip(
            names,
            outputs_of(with_outputs(self.proto, names), batch, names),
            outputs_of(with_outputs(calibrated.to_proto(), there), batch, there),
            strict=True,
        )
        ratios = {name: sqnr([x], [y]) for name, x, y in pairs}
        decibels = {n: FINE_DB if db is None else min(db, FINE_DB) for n, db in ratios.items()}
        steps: list[Step] = []
        for node in nodes:
            before, after = (
                min((decibels.get(t.name, FINE_DB) for t in tensors), default=FINE_DB)
                for tensors in (node.inputs, node.outputs)
            )
            steps.append((node.name, node.op, before, after))
        return sorted(steps, key=lambda step: step[3] - step[2])[:WORST_STEPS]


def is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == np.float32


def with_outputs(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Return a model that also has these float tensors as outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    present = {value.name for value in proto.graph.output}
    for name in names:
        if name not in present:
            result.graph.output.append(onnx.helper.make_tensor_value_info(name, FLOAT, None))
    return result


def accounted(prepared: Model, plan: onnxqat.QuantPlan) -> str:
    """Return "" if every node touches a point, is in a chain or is skipped; else name others."""
    tensors = {point.tensor for point in plan.points}
    known = {edge.node for point in plan.points for edge in point.consumers}
    known |= {name for chain in plan.chains for name in chain}
    known |= {skip.node for skip in plan.skips}
    lost = [
        f"{node.name} ({node.op})"
        for node in prepared.graph.nodes
        if node.name not in known and not any(t.name in tensors for t in node.outputs)
    ]
    return f"{len(lost)} float without a reason: {', '.join(lost[:3])}" if lost else ""
