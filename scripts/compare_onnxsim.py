"""Fine-tune a bundled model by onnxqat and by onnxsim's training loop, on the same images.

    python scripts/compare_onnxsim.py --peer PYTHON [--model lenet5] [--steps 1000]

PYTHON is the interpreter of an environment with onnxsim 0.8.1 and onnxruntime. Both tools quantize
weights per channel and activations per tensor to 8 bits, calibrate by minimum and maximum on the
first 512 training images, and train blocks on them against the float model, without labels. Each
tool uses its own placement of Q/DQ pairs and its own default rates. The script prints top-1, and
the SQNR of the outputs against the float model's, on the 1,200 test images in plain onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
IMAGES, BATCH = 512, 32


def images(split: str, count: int | None = None) -> tuple[Any, Any]:
    """Return normalized images (N, 1, 28, 28) and their labels."""
    with np.load(ROOT / f"models/digits-{split}.npz") as arrays:
        pixels = arrays["images"][:count].transpose(0, 3, 1, 2)
        return ((pixels.astype(np.float32) - 128) * 0.0078125), arrays["label"][:count]


def run_peer(model: Path, out: Path, steps: int) -> None:
    """Quantize and train with onnxsim; write both models, and print how many weights changed."""
    import onnx
    import onnxsim

    floats = onnx.load(model)
    for value in (*floats.graph.input, *floats.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = BATCH  # it infers shapes for this only
    floats, _ = onnxsim.simplify(floats)  # otherwise only the first layer is quantized
    x, _ = images("train", IMAGES)
    data = [{"input": x[i : i + BATCH]} for i in range(0, IMAGES, BATCH)]
    start = time.perf_counter()
    quantized = onnxsim.quantize_static(floats, calibration_data=data, method="minmax")
    tuned, found = onnxsim.apply_qat_all_blocks(
        floats,
        quantized,
        calibration_data=data,
        num_iterations=steps,
        batch_size=BATCH,
        learn_activation_scales=True,
    )
    seconds = time.perf_counter() - start
    onnx.save(quantized, out / "start.onnx")
    onnx.save(tuned, out / "tuned.onnx")
    skipped = [str(one.skipped_reason) for one in found if not one.trained]
    trained = sum(one.trained for one in found)
    print(json.dumps({"blocks": trained, "skipped": skipped, "seconds": round(seconds, 1)}))


def run_ours(model: Path, out: Path, steps: int) -> dict[str, Any]:
    """Do the same with onnxqat."""
    import onnxqat as oq

    x, _ = images("train", IMAGES)
    start = time.perf_counter()
    calibration = oq.Calibration(observer="minmax", samples=IMAGES)
    quantized = oq.insert(model, data={"input": x}, calibration=calibration)
    epochs = max(1, steps * BATCH // IMAGES)
    config = oq.Config(
        scope=("blocks",),
        block_epochs=epochs,
        block_samples=IMAGES,
        block_layers=2,
        batch_size=BATCH,
    )
    tuned = oq.finetune(quantized, {"input": x}, config=config)
    seconds = time.perf_counter() - start
    quantized.save(out / "start.onnx")
    tuned.model.save(out / "tuned.onnx")
    return {"blocks": len(tuned.blocks), "skipped": [], "seconds": round(seconds, 1)}


def figures(path: Path, floats: Any, batch: int) -> tuple[float, float]:
    """Return top-1 and the SQNR of the output in dB; run the file node by node, without fusion."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x, labels = images("test")
    count = len(x) // batch * batch
    parts = [session.run(None, {"input": x[i : i + batch]})[0] for i in range(0, count, batch)]
    y = np.concatenate(parts)
    floats = y if floats is None else floats[:count]
    noise = np.sum((y - floats) ** 2) / np.sum(floats**2)
    return float(np.mean(y.argmax(1) == labels[:count])), float(-10 * np.log10(max(noise, 1e-12)))


def trained_weights(out: Path) -> str:
    """Return how many weights (tensors of rank 2 or more) training has changed, as text."""
    import onnx
    from onnx import numpy_helper

    before, after = (
        {one.name: numpy_helper.to_array(one) for one in onnx.load(out / name).graph.initializer}
        for name in ("start.onnx", "tuned.onnx")
    )
    weights = [name for name, value in before.items() if value.ndim > 1]
    changed = [name for name in weights if not np.array_equal(before[name], after.get(name))]
    return f"{len(changed)} of {len(weights)} weights trained"


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", help="interpreter that has onnxsim")
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--steps", type=int, default=1000, help="steps for each block")
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = ROOT / f"models/{options.model}.onnx"
    if options.as_peer:
        run_peer(model, options.as_peer, options.steps)
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    floats = session.run(None, {"input": images("test")[0]})[0]
    top1, _ = figures(model, None, BATCH)
    print(f"{options.model}: float top-1 {100 * top1:.2f} %, {options.steps} steps for each block")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("onnxsim", "onnxqat"):
            out = Path(folder) / name
            out.mkdir()
            if name == "onnxqat":
                said = run_ours(model, out, options.steps)
            else:
                words = [options.peer, __file__, "--model", options.model, "--as-peer", str(out)]
                words += ["--steps", str(options.steps)]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"onnxsim: {done.stderr.strip().splitlines()[-1]}")
                said = json.loads(done.stdout.strip().splitlines()[-1])
            for when in ("start", "tuned"):
                top1, sqnr = figures(out / f"{when}.onnx", floats, BATCH)
                print(f"{name:<8} {when:<6} top-1 {100 * top1:.2f} %, outputs {sqnr:.1f} dB")
            print(f"{name:<8} {said}, {trained_weights(out)}")


if __name__ == "__main__":
    main()
