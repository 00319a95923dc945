"""How fast image files become batches, and how long training waits for them.

    python scripts/data_speed.py [MODEL --size HEIGHT WIDTH --batch-size N]

Writes 2,000 JPEG files into a temporary folder, reads them in batches, resized as Pillow and as
OpenCV do, and fine-tunes MODEL on them for one epoch, without labels. The last lines say which
share of the time the steps waited for data, and how much memory the process took.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import onnxqat as oq
from onnxqat.data import DataSet, Preprocessing, open_data
from onnxqat.data.resize import RESIZES
from onnxqat.settings import input_specs

COUNT, DIFFERENT = 2000, 200
MODELS = Path(__file__).parents[1] / "models"


def write_photos(folder: Path, height: int, width: int) -> None:
    """Write smooth noise, whose files have about the size of photos; each one several times."""
    rng = np.random.default_rng(0)
    for number in range(DIFFERENT):
        small = rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(scale=8, size=(height, width, 3))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        for copy in range(number, COUNT, DIFFERENT):
            (folder / f"{copy:04}.jpg").write_bytes(file.getvalue())


def images_per_second(data: DataSet, batch_size: int) -> float:
    started = time.perf_counter()
    count = sum(len(batch.indices) for batch in data.batches(batch_size))
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(MODELS / "mobilenet-digits.onnx"))
    parser.add_argument("--size", nargs=2, type=int, default=(375, 500))
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    model = oq.load_model(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, *args.size)
        size = sum(path.stat().st_size for path in folder.iterdir()) / COUNT / 1024
        print(f"{COUNT} JPEG files of {args.size[0]} x {args.size[1]} pixels, {size:.0f} KiB each")
        for resize in RESIZES:
            given = Preprocessing(resize_by=resize)
            with open_data(folder, input_specs(model), preprocessing=given) as data:
                rate = images_per_second(data, args.batch_size)
            print(f"read and resized as {resize}: {rate:.0f} images per second")
        calibrated = oq.insert(
            model, data=folder, calibration=oq.Calibration(samples=64), settings=oq.Settings()
        )
        config = oq.Config(epochs=1, batch_size=args.batch_size)
        result = oq.finetune(calibrated, folder, config=config)
    waiting = 100 * (result.waiting or 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"fine-tuned in {result.seconds:.0f} s, waiting for data {waiting:.1f} % of the steps")
    print(f"largest memory of the process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
