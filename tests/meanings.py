"""Readers of each format, written from its documentation only, as oracles.

They do not know plans. A table becomes grids on tensors or on inputs of nodes, and the grids become
Q/DQ nodes in a float model.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
Edge = tuple[str, int]  # node and input index; "" and output index


@dataclass(frozen=True)
class Grid:
    """Integers from low to high, of which ``zero`` stands for 0.0."""

    scale: Any
    zero: Any = 0
    low: int = -128
    high: int = 127
    axis: int | None = None


class Reading:
    """A float model, and the grids found for it so far."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = {n.name: n for n in model.graph.node}
        self.arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.edges: dict[Edge, Grid] = {}

    def on_tensor(self, name: str, grid: Grid) -> None:
        for node in self.model.graph.node:
            self.edges |= {(node.name, i): grid for i, t in enumerate(node.input) if t == name}
        outputs = enumerate(self.model.graph.output)
        self.edges |= {("", i): grid for i, t in outputs if t.name == name}

    def weights(self) -> Iterable[tuple[onnx.NodeProto, str, int]]:
        """Yield weighted nodes, their constant, and the axis of its output channels."""
        for node in self.model.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in self.arrays:
                transposed = any(a.name == "transB" and a.i for a in node.attribute)
                rank = self.arrays[node.input[1]].ndim
                axis = 0 if node.op_type == "Conv" or transposed else rank - 1
                yield node, node.input[1], axis

    def weights_by_absmax(self, *, low: int = -128) -> None:
        """Quantize weights like compilers: per output channel, absmax / 127, in float32."""
        for node, name, axis in self.weights():
            if (node.name, 0) not in self.edges:
                continue  # runs in float
            values = np.abs(self.arrays[name])
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = values.max(axis=others).astype(np.float32) / np.float32(127)
            self.edges[node.name, 1] = Grid(scale, low=low, axis=axis)

    def on_weight(self, node: str, scales: Any, **grid: Any) -> None:
        axes = {n.name: axis for n, _, axis in self.weights()}
        scales = np.asarray(scales, np.float64)
        axis = axes[node] if scales.size > 1 else None
        self.edges[node, 1] = Grid(scales if scales.size > 1 else scales[0], axis=axis, **grid)

    def fake_quantized(self) -> onnx.ModelProto:
        """Return the model with Q, Clip, DQ on each edge that has a grid."""
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        graph, made = result.graph, []
        for number, ((reader, index), grid) in enumerate(self.edges.items()):
            node = next((n for n in graph.node if n.name == reader), None)
            source = node.input[index] if node else graph.output[index].name
            if node is None:
                source = _renamed(graph, source)
            target = f"g{number}/y" if node else graph.output[index].name
            made.append((source, _pair(graph, number, grid, source, target)))
            if node:
                node.input[index] = target
        _place(graph, made)
        return result


def _renamed(graph: onnx.GraphProto, name: str) -> str:
    for node in graph.node:
        node.output[:] = [f"{t}/float" if t == name else t for t in node.output]
        node.input[:] = [f"{t}/float" if t == name else t for t in node.input]
    return f"{name}/float"


def _pair(
    graph: onnx.GraphProto, number: int, grid: Grid, source: str, target: str
) -> list[onnx.NodeProto]:
    dtype = np.dtype(f"{'u' if grid.low >= 0 else ''}int{16 if grid.high > 255 else 8}")
    scale = np.asarray(grid.scale, np.float64).astype(np.float32)
    zero = np.broadcast_to(np.asarray(grid.zero, dtype), scale.shape)
    ends = (np.asarray(end, dtype) for end in (grid.low, grid.high))
    for key, array in zip("szlh", (scale, np.array(zero), *ends), strict=True):
        graph.initializer.append(numpy_helper.from_array(array, f"g{number}/{key}"))
    name, axis = f"g{number}", {} if grid.axis is None else {"axis": grid.axis}
    pair = [f"{name}/s", f"{name}/z"]
    info, clipped = np.iinfo(dtype), f"{name}/q"
    nodes = [helper.make_node("QuantizeLinear", [source, *pair], [clipped], **axis)]
    if (grid.low, grid.high) != (info.min, info.max):
        clipped = f"{name}/c"
        ends = [f"{name}/q", f"{name}/l", f"{name}/h"]
        nodes.append(helper.make_node("Clip", ends, [clipped]))
    return [*nodes, helper.make_node("DequantizeLinear", [clipped, *pair], [target], **axis)]


def _place(graph: onnx.GraphProto, made: list[tuple[str, list[onnx.NodeProto]]]) -> None:
    nodes = list(graph.node)
    produced = {t for n in nodes for t in n.output}
    ordered = [n for source, pair in made if source not in produced for n in pair]
    for node in nodes:
        ordered.append(node)
        ordered += [n for source, pair in made if source in node.output for n in pair]
    del graph.node[:]
    graph.node.extend(ordered)


# --- the formats ------------------------------------------------------------------------------


def neutral(data: bytes, found: Reading) -> None:
    for p in json.loads(data)["points"]:
        scale = np.asarray(p["scale"]) if p["axis"] is not None else p["scale"][0]
        zero = np.asarray(p["zero_point"]) if p["axis"] is not None else p["zero_point"][0]
        for edge in p["consumers"]:
            grid = Grid(scale, zero, p["qmin"], p["qmax"], p["axis"])
            found.edges[edge["node"], edge["index"]] = grid


def tensorrt_cache(data: bytes, found: Reading) -> None:
    for line in data.decode().splitlines()[1:]:
        name, digits = line.split(": ")  # as in TensorRT-Model-Optimizer
        found.on_tensor(name, Grid(struct.unpack("!f", bytes.fromhex(digits))[0]))
    found.weights_by_absmax()


def dynamic_ranges(data: bytes, found: Reading) -> None:
    for name, end in json.loads(data)["tensorrt"]["blob_range"].items():
        found.on_tensor(name, Grid(end / 127))
    found.weights_by_absmax()


def calibration_json(data: bytes, found: Reading) -> None:
    for name, (low, high) in json.loads(data).items():
        found.on_tensor(name, Grid(max(abs(low), abs(high)) / 127))
    found.weights_by_absmax()


def calibration_cache(data: bytes, found: Reading) -> None:
    for line in data.decode().splitlines():
        name, absmax = line.split()
        found.on_tensor(name, Grid(float(absmax) / 127))
    found.weights_by_absmax()


def encodings(data: bytes, found: Reading) -> None:
    document = json.loads(data)
    for section in ("activation_encodings", "param_encodings"):
        for name, channels in document[section].items():
            bits = channels[0]["bitwidth"]
            assert all(c["min"] == c["scale"] * c["offset"] for c in channels)
            assert all(c["max"] == c["scale"] * (c["offset"] + 2**bits - 1) for c in channels)
            assert all(c["is_symmetric"] in ("True", "False") for c in channels)
            scales, offsets = ([c[k] for c in channels] for k in ("scale", "offset"))
            _encoding(found, name, bits, scales, offsets)


def encodings_1(data: bytes, found: Reading) -> None:
    document = json.loads(data)
    for entry in document["activation_encodings"] + document["param_encodings"]:
        assert entry["enc_type"] == ("PER_TENSOR" if len(entry["scale"]) == 1 else "PER_CHANNEL")
        _encoding(found, entry["name"], entry["bw"], entry["scale"], entry["offset"])


def _encoding(found: Reading, name: str, bits: int, scales: Any, offsets: Any) -> None:
    axes = {w: axis for _, w, axis in found.weights()}
    per_axis = len(scales) > 1
    scale, zero = (np.asarray(v) if per_axis else v[0] for v in (scales, [-o for o in offsets]))
    found.on_tensor(name, Grid(scale, zero, 0, 2**bits - 1, axes[name] if per_axis else None))


def amct(data: bytes, found: Reading) -> None:
    for key, body in re.findall(r'key: "([^"]+)"\s+value \{([^}]*)\}', data.decode()):
        fields: dict[str, list[str]] = {}
        for name, value in re.findall(r"(\w+): (\S+)", body):
            fields.setdefault(name, []).append(value)
        scale, offset = float(fields["scale_d"][0]), int(fields["offset_d"][0])
        weights = [float(s) for s in fields.get("scale_w", [])]
        assert fields.get("offset_w", []) == ["0"] * len(weights)
        inputs = [i for i, t in enumerate(found.nodes[key].input) if t not in found.arrays]
        found.edges |= {(key, i): Grid(scale, offset) for i in inputs}
        if weights:
            found.on_weight(key, weights)


def catch_scales(data: bytes, found: Reading) -> None:
    state = json.loads(data)
    for key, (x, weight) in ((k, v) for k, v in state.items() if k.endswith(".scale")):
        module = key.removesuffix(".scale")
        limit = {1: 127, 2: 32767}[state[f"{module}.quantized_mode"][0]]
        weights = state.get(f"{module}.scale_weight_per_channel", [weight])
        found.edges[module, 0] = Grid(1 / x, low=-limit - (limit > 127), high=limit)
        scales = 1 / np.asarray(weights)
        found.on_weight(module, scales, low=-limit - (limit > 127), high=limit)


def magicmind_ranges(data: bytes, found: Reading) -> None:
    readers = {node.input[0]: node.name for node, _, _ in found.weights()}  # the others are float
    for name, ends in json.loads(data)["custom_ranges"].items():
        assert ends["min"] == [-ends["max"][0]]
        found.edges[readers[name], 0] = Grid(ends["max"][0] / 127, low=-127)
    found.weights_by_absmax(low=-127)


def horizon(data: bytes, found: Reading) -> None:
    for node in json.loads(data)["calibration_nodes"]:
        limit = {"int8": 127, "int16": 32767}[node["qtype"]]
        scales = np.asarray(node["thresholds"]) / limit
        scale = scales if node["axis"] is not None else scales[0]
        grid = Grid(scale, 0, -limit - 1, limit, node["axis"])
        found.on_tensor(node["tensor"], grid)


def ncnn(data: bytes, found: Reading) -> None:
    for line in data.decode().splitlines():
        name, *values = line.split(" ")
        scales = 1 / np.asarray(values, np.float64)
        if name.endswith("_param_0"):
            found.on_weight(name.removesuffix("_param_0"), scales, low=-127)
        else:
            found.edges[name, 0] = Grid(scales[0], low=-127)


def tengine(data: bytes, found: Reading) -> None:
    inner = {n.input[0] for n in found.model.graph.node if n.op_type in ("Relu", "Clip")}
    for line in data.decode().splitlines():
        name, scale, zero = line.split()
        if name not in inner:  # fused away
            found.on_tensor(name, Grid(float(scale), int(zero), 0, 255))
    found.weights_by_absmax(low=-127)


def mindspore(data: bytes, found: Reading) -> None:
    def grid(entry: dict[str, Any], place: str, bits: int, *, signed: bool) -> Grid:
        narrow = entry[f"{'weight' if place == 'filter' else place}_narrow_range"]
        low = -(2 ** (bits - 1)) + narrow if signed else 0
        high = low + 2**bits - 1 - narrow
        minq, maxq = (np.asarray(entry[f"{place}_{e}q"], np.float64) for e in ("min", "max"))
        scale = (maxq - minq) / (high - low)
        return Grid(scale, np.rint(low - minq / scale).astype(int), low, high)

    for name, entry in json.loads(data)["nodes"].items():
        node = found.nodes[name]
        if "input_maxq" in entry:
            found.edges[name, 0] = grid(entry, "input", entry["act_num_bits"], signed=False)
        if "filter_maxq" in entry:
            weight = grid(entry, "filter", entry["weight_num_bits"], signed=True)
            found.on_weight(name, weight.scale, low=weight.low, high=weight.high)
        if "output_maxq" in entry:
            output = node.output[0]
            readers = [n for n in found.model.graph.node if output in n.input]
            if (
                node.op_type in ("Conv", "Gemm")
                and readers[:1]
                and readers[0].op_type in ("Relu", "Clip")
            ):
                output = readers[0].output[0]
            found.on_tensor(output, grid(entry, "output", entry["act_num_bits"], signed=False))


def mnn(data: bytes, found: Reading) -> None:
    """Read MNN's JSON; its converter finds a layer by its output, after fusing Relu and Clip."""
    document = json.loads(data)
    assert isinstance(document["version"], str)  # without it the converter ignores the file
    (algorithm,) = document["algo"]
    layers = {layer["output"][0]["name"]: layer for layer in algorithm["quantParams"]["layer"]}
    for node, weight, axis in found.weights():
        output = node.output[0]
        readers = [n for n in found.model.graph.node if output in n.input]
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            output = readers[0].output[0]
        if output not in layers:
            continue
        layer = layers[output]
        assert len(layer["weight"][0]["scales"]) == found.arrays[weight].shape[axis]
        found.edges[node.name, 0] = _mnn_grid(layer["input"][0])
        found.on_tensor(output, _mnn_grid(layer["output"][0]))
        grid = layer["weight"][0]
        limits = {"low": grid["clampMin"], "high": grid["clampMax"]}
        found.on_weight(node.name, grid["scales"], **limits)


def _mnn_grid(entry: dict[str, Any]) -> Grid:
    (scale,) = entry["scales"]
    return Grid(scale, entry["zeroPoint"], entry["clampMin"], entry["clampMax"])


def sophgo_asymmetric(data: bytes, found: Reading) -> None:
    """A table read by ``--asymmetric``: int8 with a zero point, or uint8 if the minimum is 0."""
    sophgo(data, found, span=True)


def sophgo(data: bytes, found: Reading, *, span: bool = False) -> None:
    lines = [line.split() for line in data.decode().splitlines() if line[:1] != "#"]
    names = {f"{t}_{n.op_type}": t for n in found.model.graph.node for t in n.output}
    names |= {t.name: t.name for t in found.model.graph.input}
    fused = {"Relu": ("Conv", "Add", "Gemm"), "Clip": ("Conv",)}
    inner = {
        n.input[0]: n.output[0]
        for n in found.model.graph.node
        if any(
            n.input[0] in m.output and m.op_type in fused.get(n.op_type, ())
            for m in found.model.graph.node
        )
    }
    for name, *numbers in lines:
        if len(numbers) == 3 and name in names and names[name] not in inner:
            threshold, low, high = map(float, numbers)
            signed = low < 0
            limits = (-128, 127) if signed else (0, 255)
            scale = (high - low) / 255 if span else threshold / limits[1]
            zero_point = round(limits[0] - low / scale) if span else 0
            found.on_tensor(names[name], Grid(scale, zero_point, *limits))
    weights = {f"{inner.get(n.output[0], n.output[0])}": n for n, _, _ in found.weights()}
    for name, count, *numbers in lines:
        tensor = re.sub(r"_[A-Za-z]+_weight$", "", name)
        if name.endswith("_weight") and tensor in weights:
            found.on_weight(weights[tensor].name, [float(s) for s in numbers[: int(count)]])


Meaning = Callable[[bytes, Reading], None]
