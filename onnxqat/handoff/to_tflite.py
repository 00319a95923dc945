"""Convert a float model and its table to an int8 model for LiteRT (TensorFlow Lite).

    python to_tflite.py MODEL.onnx TABLE.json OUT.tflite

`strip` copies this file beside the model. It needs Python 3.12 with onnx2tf and litert-converter
(tested with 2.6.9 and 0.5.0), and nothing of onnxqat. onnx2tf writes the float model as a .tflite
file, this script puts the quantizers of the table into it, and LiteRT's converter converts it to
integers. Inputs and outputs of the result are int8, a free batch size becomes 1, and tensors of
three axes and more have their channels last.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]
Point = dict[str, Any]
CONSTANTS = ("arith.constant", "tfl.pseudo_const")


def with_batch_of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every free batch size set to 1.

    With a free batch size, onnx2tf pads a convolution by operations that stay in float.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    names: set[str] = set()
    for value in fixed.graph.input:
        first = value.type.tensor_type.shape.dim[:1]
        names |= {length.dim_param for length in first}
        for length in first:
            length.dim_value = length.dim_value or 1
    for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info):
        for length in value.type.tensor_type.shape.dim:
            if length.dim_param and length.dim_param in names:
                length.dim_value = 1
    return fixed


def float_tflite(model: onnx.ModelProto, folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the model as a float .tflite file, and what became of each tensor, by onnx2tf."""
    path = folder / "model.onnx"  # onnx2tf writes a simplified model over the file that it reads
    onnx.save(with_batch_of_one(model), str(path))
    words = ["-i", str(path), "-o", str(folder), "-tb", "flatbuffer_direct", "-n"]
    words = [sys.executable, "-m", "onnx2tf", *words]
    done = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    made = folder / "model_float32.tflite"
    if done.returncode or not made.exists():
        sys.exit(f"onnx2tf did not convert the model:\n{done.stdout[-3000:]}")
    report = json.loads((folder / "model_tensor_correspondence_report.json").read_text())
    return made.read_bytes(), report["records"]


def counterparts(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the names that the tensor of each node's output may have in the .tflite file."""
    found = {}
    for record in records:
        names = [record["resolved_tflite_tensor_name"], *record["rewrite_name_chain"][::-1]]
        found[record["onnx_output_name"]] = [*names, f"{record['onnx_op_name']}_output_nhwc"]
    return found


def sanitized(name: str) -> str:
    """Return a tensor's name as onnx2tf writes it."""
    return f"wa{name}" if name.startswith("/") else name


def activations(
    points: Sequence[Point], records: Sequence[Mapping[str, Any]], names: set[str]
) -> dict[str, Point]:
    """Return the quantizer of each activation, by its name in the .tflite file.

    Parameters
    ----------
    points : list of dict
        Entries of the table.
    records : list of dict
        What became of each tensor.
    names : set of str
        Names of all activations of the .tflite file.
    """
    known = counterparts(records)
    found: dict[str, Point] = {}
    for point in points:
        tensor = sanitized(point["tensor"])
        name = next((n for n in (*known.get(tensor, ()), tensor) if n in names), None)
        if name is None:
            sys.exit(f"'{point['tensor']}' is quantized, but onnx2tf removed it. Keep it float "
                     "with --set, or report the model to onnxqat.")  # fmt: skip
        if name in found and quantizer(found[name]) != quantizer(point):
            sys.exit(f"'{point['tensor']}' and '{found[name]['tensor']}' are one tensor for "
                     "LiteRT, but have different scales. Give them the same.")  # fmt: skip
        found[name] = point
    return found


def quantizer(point: Point) -> tuple[Any, ...]:
    """Return the values by which two quantizers are compared."""
    return point["scale"], point["zero_point"], point["qmin"], point["qmax"]


def key(values: Array) -> tuple[int, bytes]:
    """Return what a constant keeps when its axes are permuted."""
    return values.size, np.sort(values, axis=None).tobytes()


def by_values(
    points: Sequence[Point], arrays: Mapping[str, Array]
) -> dict[tuple[int, bytes], list[Point]]:
    """Return the quantizers of constants by `key`: onnx2tf gives constants names of its own."""
    found: defaultdict[tuple[int, bytes], list[Point]] = defaultdict(list)
    for point in points:
        same = found[key(arrays[point["tensor"]])]
        if same and quantizer(same[0]) != quantizer(point):
            sys.exit(f"'{point['tensor']}' and '{same[0]['tensor']}' have the same values, but "
                     "different scales. Give them the same.")  # fmt: skip
        same.append(point)
    return found


def channel_axis(values: Array, weight: Array, axis: int) -> int | None:
    """Return the axis of ``values`` that is ``axis`` of ``weight``, whose axes were permuted."""

    def by_channel(array: Array, at: int) -> Array:
        return np.sort(np.moveaxis(array, at, 0).reshape(array.shape[at], -1), axis=1)

    wanted = by_channel(weight, axis)
    for at in range(values.ndim):
        if np.array_equal(by_channel(values, at), wanted):
            return at
    return None


def quantized_type(point: Point, shape: Sequence[int | None], axis: int | None = None) -> str:
    """Return the type of a quantized tensor in MLIR's words; None is a free length."""
    limits = (point["qmin"], point["qmax"])
    integers = "i8" if limits == (-128, 127) else f"i8<{limits[0]}:{limits[1]}>"
    if axis is None:
        grid = f"{integers}:f32, {point['scale'][0]!r}:{point['zero_point'][0]}"
    else:
        grid = f"{integers}:f32:{axis}, {{{','.join(map(repr, point['scale']))}}}"
    lengths = "".join(f"{'?' if n is None else n}x" for n in shape)
    return f"tensor<{lengths}!quant.uniform<{grid}>>"


class Editor:
    """The float model in MLIR, into which quantizers are put."""

    def __init__(self, content: bytes) -> None:
        from litert_converter.mlir import ir
        from litert_converter.mlir._mlir_libs import model_utils_ext
        from litert_converter.tools.model_utils import transform
        from litert_converter.tools.model_utils.dialect import mlir

        self.ir, self.mlir, self.transform = ir, mlir, transform
        self.context = transform.get_ir_context()
        self.module = model_utils_ext.flatbuffer_to_mlir(content, self.context)
        with self.context:
            function = self.module.body.operations[0]
            self.block = function.regions[0].blocks[0]
            names = str(function.attributes["tf.entry_function"])
            inputs = re.findall(r'inputs = "([^"]*)"', names)[0].split(",")
            self.values = dict(zip(inputs, self.block.arguments, strict=True))
            self.constants: list[tuple[Any, Array]] = []
            for operation in self.block.operations:
                self._sort(operation)

    def _sort(self, operation: Any) -> None:
        """Note the float results of an operation: constants, and activations by name."""
        for result in operation.results:
            if not self._is_float(result):
                continue
            if operation.name in CONSTANTS:
                values = self.mlir.DenseElementsAttr(operation.attributes["value"]).numpy()
                self.constants.append((result, values))
            else:
                names = re.findall(r'"((?:[^"\\]|\\.)*)"', str(operation.location))
                self.values |= dict.fromkeys(names, result)

    def _is_float(self, value: Any) -> bool:
        try:
            kind = self.ir.RankedTensorType(value.type).element_type
        except ValueError:  # no tensor
            return False
        return isinstance(kind, self.ir.F32Type)

    def quantize_activation(self, name: str, point: Point) -> None:
        """Put a quantizer behind an activation."""
        value = self.values[name]
        kind = self.ir.RankedTensorType(value.type)
        shape = [None if kind.is_dynamic_dim(i) else kind.get_dim_size(i) for i in range(kind.rank)]
        self._quantize(value, quantized_type(point, shape))

    def quantize_constants(self, weights: Mapping[tuple[int, bytes], list[Point]],
                           arrays: Mapping[str, Array]) -> set[str]:  # fmt: skip
        """Put quantizers behind the constants that the table has; return their tensors."""
        done: set[str] = set()
        for value, values in self.constants:
            for point in weights.get(key(values), ()):
                axis = point["axis"]
                if axis is not None:
                    axis = channel_axis(values, arrays[point["tensor"]], axis)
                    if axis is None:
                        continue
                self._quantize(value, quantized_type(point, values.shape, axis))
                done |= {p["tensor"] for p in weights[key(values)]}
                break
        return done

    def _quantize(self, value: Any, text: str) -> None:
        kind, owner = self.ir.Type.parse(text), value.owner
        at_start = not hasattr(owner, "results")  # an input of the model belongs to the block
        place = self.ir.InsertionPoint(self.block.operations[0]) if at_start else \
            self.ir.InsertionPoint.at_block_terminator(self.block)  # fmt: skip
        with place, self.ir.Location.unknown() if at_start else owner.location:
            create, attribute = self.ir.Operation.create, self.ir.TypeAttr.get(kind)
            quantize = create("tfl.quantize", [kind], [value], {"qtype": attribute})
            dequantize = create("tfl.dequantize", [value.type], [quantize.results[0]])
        value.replace_all_uses_except(dequantize.results[0], quantize)
        if not at_start:
            quantize.move_after(owner)
        dequantize.move_after(quantize)

    def converted(self) -> tuple[bytes, Counter[str]]:
        """Return the integer model, and the number of each kind of operation left in float."""
        from litert_converter.mlir import passmanager
        from litert_converter.mlir._mlir_libs import converter_api_ext

        with self.context:
            config = converter_api_ext.ConvertToTFLConfig()
            config.qdq_conversion_mode = "STATIC"
            manager = passmanager.PassManager()
            converter_api_ext.run_convert_to_tfl_passes(self.module, manager, config)
            block = self.module.body.operations[0].regions[0].blocks[0]
            kinds = (o.name for o in block.operations if any(map(self._is_float, o.results)))
            left = Counter(kind.removeprefix("tfl.") for kind in kinds if kind not in CONSTANTS)
            content = self.transform.write_flatbuffer(self.module, ir_context=self.context)
        return content, left


def points_of(table: Path) -> list[Point]:
    """Return the quantizers of a table; they must be int8."""
    points: list[Point] = json.loads(table.read_text(encoding="utf-8"))["points"]
    for point in points:
        if point["dtype"] != "int8":
            sys.exit(f"'{point['tensor']}' is {point['dtype']}; this script makes int8 models. "
                     "Insert again under the rule tflite.")  # fmt: skip
    return points


def main(model: str, table: str, target: str) -> None:
    """Convert a model."""
    points = points_of(Path(table))
    floats = onnx.load(model)
    arrays = {t.name: numpy_helper.to_array(t) for t in floats.graph.initializer}
    with tempfile.TemporaryDirectory() as folder:
        content, records = float_tflite(floats, Path(folder))
    editor = Editor(content)
    weights = by_values([p for p in points if p["role"] == "weight"], arrays)
    others = [point for point in points if point["role"] != "weight"]
    with editor.context:
        found = activations(others, records, set(editor.values))
        done = editor.quantize_constants(weights, arrays)
        missing = {p["tensor"] for p in points if p["role"] == "weight"} - done
        if missing:
            sys.exit(f"onnx2tf changed the values of {', '.join(sorted(missing))}. Keep these "
                     "float with --set, or report the model to onnxqat.")  # fmt: skip
        for name, point in found.items():
            editor.quantize_activation(name, point)
    content, left = editor.converted()
    Path(target).write_bytes(content)
    sys.stdout.write(f"{target}: {len(content)} bytes, {len(points)} quantizers\n")
    if left:
        kinds = ", ".join(f"{kind} {count}" for kind, count in left.most_common())
        sys.stdout.write(f"in float: {kinds}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
