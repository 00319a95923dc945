"""Export graphs with real exporters, to test preparation and planning on them.

Needs packages that onnxqat does not depend on, so run it in a separate environment::

    pip install torch==2.13.0 torchvision==0.28.0 onnx onnxscript transformers
    python scripts/export_graphs.py OUT_DIR [--small] [--only NAME ...]

Every network of `architectures.py` is exported by PyTorch's TorchScript exporter and by its dynamo
exporter, with random weights and a dynamic batch dimension. `tensorflow_graphs.py` builds graphs in
TensorFlow's style. The ``light`` models, which compute their weights, come from the onnx package.
If an export fails, the script reports it, continues with the others, and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import torch
from architectures import FAMILIES, settle
from tensorflow_graphs import TENSORFLOW_GRAPHS

SEED = 0
TRACED_BATCH = 2  # exporters would take 1 for a constant
TORCHSCRIPT_OPSET, DYNAMO_OPSET = 17, 18  # dynamo does not write lower opsets than 18


def export_torch(family_name: str, exporter: str, path: Path, *, small: bool) -> None:
    """Export one network with one of PyTorch's exporters."""
    family = FAMILIES[family_name]
    torch.manual_seed(SEED)
    model = family.small() if small else family.full()
    settle(model, lambda batch: family.inputs(batch, small))
    inputs = family.inputs(TRACED_BATCH, small)
    options: dict = {"input_names": list(inputs), "output_names": list(family.outputs)}
    if exporter == "dynamo":
        batch = torch.export.Dim("batch")
        options |= {"dynamo": True, "external_data": False, "opset_version": DYNAMO_OPSET}
        options |= {"dynamic_shapes": tuple({0: batch} for _ in inputs)}
    else:
        axes = {name: {0: "batch"} for name in (*inputs, *family.outputs)}
        options |= {"dynamo": False, "opset_version": TORCHSCRIPT_OPSET, "dynamic_axes": axes}
    torch.onnx.export(model, tuple(inputs.values()), str(path), **options)


def export_tensorflow(name: str, path: Path, *, small: bool) -> None:
    """Write one graph in the style of TensorFlow's converter."""
    onnx.save(TENSORFLOW_GRAPHS[name](small=small), path)


def copy_light(source: Path, path: Path) -> None:
    """Copy a model from the onnx package."""
    shutil.copyfile(source, path)


def jobs(*, small: bool) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Return the exporter's name and a function that writes the file, for every graph by name."""
    found: dict[str, tuple[str, Callable[[Path], None]]] = {}
    for name in FAMILIES:
        for exporter in ("torchscript", "dynamo"):
            write = partial(export_torch, name, exporter, small=small)
            found[f"{name}-{exporter}"] = (exporter, write)
    for name in TENSORFLOW_GRAPHS:
        found[name] = ("onnx.helper", partial(export_tensorflow, name, small=small))
    light = Path(onnx.__file__).parent / "backend/test/data/light"
    for source in () if small else sorted(light.glob("*.onnx")):
        found[source.stem] = ("onnx package", partial(copy_light, source))
    return found


def run(name: str, exporter: str, write: Callable[[Path], None], path: Path) -> bool:
    """Write one graph, print its line, and return whether it succeeded."""
    temporary = path.with_suffix(".part")
    output = io.StringIO()  # exporters print progress to stdout and stderr
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            write(temporary)
        model = onnx.load(temporary, format="protobuf")
        onnx.checker.check_model(str(temporary))
        temporary.replace(path)
    except Exception as error:  # an exporter may raise anything
        temporary.unlink(missing_ok=True)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{name:<28} {exporter:<12} FAILED: {type(error).__name__}: {first}", flush=True)
        return False
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    nodes, size = len(model.graph.node), path.stat().st_size / 1000
    print(f"{name:<28} {exporter:<12} {nodes:>6} {opset:>6} {size:>12.1f}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for NAME.onnx")
    parser.add_argument("--small", action="store_true", help="tiny versions, for fast tests")
    parser.add_argument("--only", nargs="+", default=["*"], help="names (* matches any text)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = jobs(small=arguments.small)
    for pattern in arguments.only:
        if not fnmatch.filter(found, pattern):
            parser.error(f"no graph has the name '{pattern}'; choose from {', '.join(found)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{'name':<28} {'exporter':<12} {'nodes':>6} {'opset':>6} {'kB':>12}")
    results = [
        run(name, exporter, write, arguments.out / f"{name}.onnx")
        for name, (exporter, write) in found.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only)
    ]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
