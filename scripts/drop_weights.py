"""Write exported graphs without their weights, small enough for `tests/graphs`.

    python scripts/export_graphs.py OUT_DIR --small
    python scripts/drop_weights.py tests/graphs OUT_DIR/swin_t-dynamo.onnx ...

Initializers of more than 64 elements keep only their type and shape; `tests/exported.py` fills them
with random values from a seed. Documentation and the exporter's notes are removed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import onnx

from onnxqat.preserve import all_nodes

KEPT_ELEMENTS = 64


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > KEPT_ELEMENTS and tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    for node in all_nodes(model.graph.node, *(f.node for f in model.functions)):
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for values in (model.graph.value_info, model.metadata_props):
        del values[:]
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.models:
        model = without_weights(onnx.load(path))
        target = arguments.out / path.name
        target.write_bytes(model.SerializeToString(deterministic=True))
        print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
