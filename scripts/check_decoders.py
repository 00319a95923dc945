"""Compare the box decoders with the post-processing of the detectors' own packages.

    python scripts/check_decoders.py write FILE
    python scripts/check_decoders.py compare FILE [--only NAME,...] --nanodet DIR --yolov7 DIR
        --yolox DIR

The first command runs in an environment with onnxqat: it writes random outputs and the boxes that
onnxqat finds in them. The second runs in an environment with torch, torchvision, yolov5 and
ultralytics; DIR are clones of RangiLyu/nanodet at v0.4.2, of WongKinYiu/yolov7 and of
Megvii-BaseDetection/YOLOX. It exits with 1 if a box, score or class differs. ``--only`` compares
these decoders, and needs only their packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

SIZE = (96, 160)  # height and width of the input
SIZES = {"ssd": (300, 300), "ssdlite": (320, 320)}  # of networks with one size
BOXES = {"ssd": 8732, "ssdlite": 3234}
IMAGES, CLASSES, CELLS = 3, 6, (240, 60, 15)
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # COCO's ids without a category
TOLERANCE = 1e-3  # of boxes, in pixels; that of scores is a thousandth of it


def cases() -> list[tuple[str, str, int]]:
    """Return the cases to compare: name, name of the decoder, and number of classes."""
    from onnxqat.evaluation.decoders import DECODERS

    found = [(name, name, CLASSES) for name in sorted(DECODERS)]
    return [*found, ("yolov7-1", "yolov7", 1), ("ssd-coco", "ssd", 90), ("ssdlite-1", "ssdlite", 1)]


def outputs_of(name: str, rng: np.random.Generator, classes: int) -> list[np.ndarray]:
    """Return random outputs with many overlaps and with values on both sides of every limit."""
    total = sum(CELLS)

    def scores(*shape: int) -> np.ndarray:
        return rng.random(shape, np.float32) ** 4

    if name == "nanodet":
        logits = [2 * rng.normal(size=(IMAGES, n, 32)).astype(np.float32) for n in CELLS]
        return [scores(IMAGES, n, classes) for n in CELLS] + logits
    if name == "yolox":
        boxes = rng.normal(size=(IMAGES, total, 4)).astype(np.float32)
        return [np.concatenate([boxes, scores(IMAGES, total, 1 + classes)], axis=2)]
    if name in BOXES:
        offsets = 2 * rng.normal(size=(IMAGES, BOXES[name], 4)).astype(np.float32)
        offsets[:, ::50, 2:] += 20  # beyond the limit of sizes
        logits = 2 * rng.normal(size=(IMAGES, BOXES[name], 1 + classes)).astype(np.float32)
        if classes == 90:
            logits[:, :, UNUSED] = -40  # onnxqat leaves out what is no category
        return [offsets, logits]
    anchors = name in ("yolov5", "yolov7")
    count = 3 * total if anchors else total
    centres = rng.random((IMAGES, count, 2), np.float32) * np.float32([SIZE[1], SIZE[0]])
    sizes = 4 + 60 * rng.random((IMAGES, count, 2), np.float32)
    rest = scores(IMAGES, count, classes + anchors)
    found = np.concatenate([centres, sizes, rest], axis=2)
    return [found if anchors else np.ascontiguousarray(found.transpose(0, 2, 1))]


def write(path: str) -> None:
    """Write outputs, and the boxes that onnxqat's decoders find in them."""
    from onnxqat.evaluation.decoders import DECODERS
    from onnxqat.evaluation.decoders.suppression import selected

    arrays: dict[str, np.ndarray] = {}
    for seed, (name, called, classes) in enumerate(cases()):
        decoder, size = DECODERS[called], SIZES.get(called, SIZE)
        outputs = outputs_of(called, np.random.default_rng(seed), classes)
        if not decoder.fits(outputs, size):
            raise SystemExit(f"{name}: the outputs do not fit")
        for index, array in enumerate(outputs):
            arrays[f"{name}/output/{index}"] = array
        for image, candidates in enumerate(decoder.candidates(outputs, size)):
            one = selected(candidates, decoder.selection)
            arrays[f"{name}/found/{image}"] = np.column_stack(
                [one.corners, one.scores, one.classes]
            )
    np.savez(path, **arrays)


def theirs(name: str, outputs: list[np.ndarray], given: argparse.Namespace) -> list[np.ndarray]:
    """Return the rows (x1, y1, x2, y2, score, class) of each image that a package finds."""
    import torch

    tensors = [torch.from_numpy(array.copy()) for array in outputs]
    finders: dict[str, Callable[[list[Any]], list[Any]]] = {
        "ssd": partial(_ssd, "ssd300_vgg16"),
        "ssdlite": partial(_ssd, "ssdlite320_mobilenet_v3_large"),
        "yolov5": _yolov5,
        "yolov7": partial(_yolov7, Path(given.yolov7)),
        "yolov8": _ultralytics,
        "yolox": partial(_yolox, Path(given.yolox)),
        "nanodet": partial(_nanodet, Path(given.nanodet)),
    }
    return [
        np.asarray(rows, np.float64).reshape(-1, 6) for rows in finders[name.split("-")[0]](tensors)
    ]


def _yolov5(tensors: list[Any]) -> list[Any]:
    from yolov5.utils.general import non_max_suppression

    return non_max_suppression(tensors[0], 0.001, 0.6, multi_label=True, max_det=300)


def _yolov7(clone: Path, tensors: list[Any]) -> list[Any]:
    sys.path.insert(0, str(clone))
    general = _mocked(lambda: importlib.import_module("utils.general"))
    return general.non_max_suppression(tensors[0], 0.001, 0.65, multi_label=True)


def _ssd(network: str, tensors: list[Any]) -> list[Any]:
    import torch
    from torchvision.models import detection
    from torchvision.models.detection.image_list import ImageList

    count = tensors[1].shape[2]
    make = getattr(detection, network)
    model = make(weights=None, weights_backbone=None, num_classes=count).eval()
    size = model.transform.fixed_size
    images = ImageList(torch.zeros(IMAGES, 3, *size), [size] * IMAGES)
    with torch.no_grad():
        maps = list(model.backbone(images.tensors).values())
        found = model.postprocess_detections(
            dict(zip(("bbox_regression", "cls_logits"), tensors, strict=True)),
            model.anchor_generator(images, maps),
            images.image_sizes,
        )
    kept = np.setdiff1d(np.arange(1, count), UNUSED if count == 91 else ())
    return [
        np.column_stack([one["boxes"], one["scores"], np.searchsorted(kept, one["labels"])])
        for one in found
    ]


def _ultralytics(tensors: list[Any]) -> list[Any]:
    import torchvision  # noqa: F401  (is used where it is imported)
    from ultralytics.utils.nms import non_max_suppression

    return non_max_suppression(tensors[0], 0.001, 0.7, multi_label=True, max_det=300)


def _yolox(clone: Path, tensors: list[Any]) -> list[Any]:
    import torch

    boxes = _file(clone / "yolox/utils/boxes.py")
    demo = _file(clone / "yolox/utils/demo_utils.py")
    decoded = torch.from_numpy(demo.demo_postprocess(tensors[0].numpy(), SIZE)).float()
    rows = boxes.postprocess(decoded, CLASSES, 0.01, 0.65)
    return [torch.cat([r[:, :4], r[:, 4:5] * r[:, 5:6], r[:, 6:7]], 1) for r in rows]


def _nanodet(clone: Path, tensors: list[Any]) -> list[Any]:
    import torch

    sys.path.insert(0, str(clone))
    module = _mocked(lambda: importlib.import_module("nanodet.model.head.gfl_head"))
    GFLHead, Integral = module.GFLHead, module.Integral  # noqa: N806
    head = SimpleNamespace(
        strides=[8, 16, 32], cls_out_channels=CLASSES, distribution_project=Integral(7)
    )
    head.get_single_level_center_point = GFLHead.get_single_level_center_point.__get__(head)
    maps = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in head.strides]
    found = []
    for image in range(IMAGES):
        scores = [
            t[image].T.reshape(-1, *m).logit() for t, m in zip(tensors[:3], maps, strict=True)
        ]
        logits = [t[image].T.reshape(-1, *m) for t, m in zip(tensors[3:], maps, strict=True)]
        boxes, labels = GFLHead.get_bboxes_single(head, scores, logits, SIZE, 1, "cpu")
        found.append(torch.cat([boxes, labels[:, None]], 1))
    return found


def _mocked(importing: Callable[[], Any]) -> Any:
    """Import a module without the packages that only training needs."""
    for _ in range(100):
        try:
            return importing()
        except ModuleNotFoundError as error:
            sys.modules[error.name or ""] = MagicMock()
    raise SystemExit("too many packages are missing")


def _file(path: Path) -> Any:
    """Import one file without its package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differing(ours: np.ndarray, other: np.ndarray) -> float | None:
    """Return the largest difference of boxes in pixels; None if the boxes do not match."""
    if ours.shape != other.shape or not np.array_equal(ours[:, 5], other[:, 5]):
        return None
    if not np.allclose(ours[:, 4], other[:, 4], atol=TOLERANCE / 1000, rtol=0):
        return None
    return float(np.abs(ours[:, :4] - other[:, :4]).max(initial=0))


def compare(given: argparse.Namespace) -> int:
    """Print the comparison of each decoder; return 1 if one differs."""
    wrong = 0
    with np.load(given.file) as stored:
        only = given.only and given.only.split(",")
        for name in sorted({key.split("/")[0] for key in stored.files}):
            if only and name.split("-")[0] not in only:
                continue
            count = sum(key.startswith(f"{name}/output/") for key in stored.files)
            outputs = [stored[f"{name}/output/{index}"] for index in range(count)]
            for image, rows in enumerate(theirs(name, outputs, given)):
                ours = stored[f"{name}/found/{image}"]
                largest = differing(ours, rows)
                same = largest is not None and largest <= TOLERANCE
                wrong += not same
                said = f"largest difference {largest:.2g} pixels" if same else "DIFFERS"
                print(f"{name} image {image}: {len(ours)} boxes, theirs {len(rows)}: {said}")
    return int(wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("write", "compare"):
        one = commands.add_parser(command)
        one.add_argument("file")
        one.add_argument("--nanodet", default="nanodet")
        one.add_argument("--yolov7", default="yolov7")
        one.add_argument("--yolox", default="YOLOX")
        one.add_argument("--only", metavar="NAME,...")
    given = parser.parse_args()
    if given.command == "write":
        write(given.file)
    else:
        sys.exit(compare(given))


if __name__ == "__main__":
    main()
