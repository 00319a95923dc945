"""The networks, cases and commands of scripts/repair.py, and how long each step takes."""

from __future__ import annotations

from typing import NamedTuple

from accuracy import CIFAR, CIFAR_NORM, IMAGENET, IMAGENET_NORM, W4A4

CALIBRATION = 512  # samples
OBSERVER = "mse"


class Network(NamedTuple):
    """A development model, its data, and the options of commands that read them.

    The minutes, on two quiet cores of an AMD EPYC, estimate how long a measurement will take:
    inserting and calibrating; evaluating all test data; an epoch of training. Blocks read the share
    ``of_blocks`` of the data in each of their ten epochs.
    """

    data: tuple[str, str]  # for training and test
    preprocessing: list[str]
    metric: list[str]
    figure: str
    inserting: float
    testing: float
    epoch: float
    of_blocks: float = 1.0


COCO = ("coco128/train", "coco128/val")
COCO_NORM = [
    *("--keep-aspect-ratio", "--pixel-format", "bgr"),
    *("--mean", "103.53,116.28,123.675", "--scale", "0.0174292,0.017507,0.0171248"),
]
MOBILENET, NANODET = "mobilenetv1-025-imagenet", "nanodet-m-416"
SHUFFLENET, RESNET8 = "shufflenetv2-x05-cifar10", "resnet8-cifar10"
TOP1: tuple[list[str], str] = ([], "top1")
MAP = (["--metric", "map", "--decode", "nanodet", "--boxes", "{data}/coco128/val-boxes.npy"], "map")
NETWORKS = {
    RESNET8: Network(CIFAR, [], *TOP1, 0.2, 0.3, 0.6, 0.06),
    "resnet20-cifar10": Network(CIFAR, CIFAR_NORM, *TOP1, 0.3, 0.8, 1.7, 0.06),
    SHUFFLENET: Network(CIFAR, CIFAR_NORM, *TOP1, 0.4, 0.8, 1.5, 0.06),
    "vit-cifar10": Network(CIFAR, IMAGENET_NORM, *TOP1, 0.8, 2.0, 5.0, 0.06),
    MOBILENET: Network(IMAGENET, IMAGENET_NORM, *TOP1, 0.8, 0.3, 0.5),
    NANODET: Network(COCO, COCO_NORM, *MAP, 0.6, 0.5, 1.7),
}
PLAIN, EQUALIZED, CORRECTED = "post-training", "+ equalization", "+ bias correction"
ANALYTIC = "analytic instead"
# How each column without training is inserted.
REPAIRS: dict[str, list[str]] = {
    PLAIN: [],
    EQUALIZED: ["--equalize"],
    CORRECTED: ["--equalize", "--bias-correction"],
    ANALYTIC: ["--equalize", "--analytic-bias-correction"],
}
STARTS = (PLAIN, EQUALIZED, CORRECTED)
UNREPAIRED, NETWORK = "end to end, not repaired", "end to end"
BLOCKS, BOTH = "blocks", "blocks, end to end"
# How each trained column is trained.
SCOPES = {UNREPAIRED: "network", NETWORK: "network", BLOCKS: "blocks", BOTH: "network"}


class Case(NamedTuple):
    """A quantization of a network: a row of the tables."""

    model: str
    label: str
    overrides: tuple[str, ...]
    rule: str = "onnxruntime-cpu"
    training: tuple[str, ...] = ()
    length: tuple[str, ...] = ()  # of training from end to end
    epochs: int = 10  # the number that the options and defaults give

    @property
    def name(self) -> str:
        """Name of the case in --only and in the results."""
        return f"{self.model}/{self.rule}/{self.label}"

    @property
    def sets(self) -> list[str]:
        """Options of ``insert``."""
        return [word for one in self.overrides for word in ("--set", one)]


WIDTHS = {"W8A8": (), "W4A8": ("weight.bits=4",)}
AXES = {"per-tensor": ("weight.axis=none",), "per-axis": ("weight.axis=channel",)}
KL = ("--loss", "kl")  # the labels number 150 classes, the outputs 1,000
THREE = ("--epochs", "3")
OPTIONS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...], int]] = {
    (MOBILENET, "W8A8 per-tensor"): (KL, (), 10),
    (MOBILENET, "W8A8 per-axis"): (KL, (), 10),
    (NANODET, "W8A8 per-tensor"): (("--accumulate", "1"), THREE, 3),
    (NANODET, "W4A8 per-axis"): (("--accumulate", "4"), THREE, 3),
}


def _repaired() -> list[Case]:
    """Return the cases of the table of all networks."""
    found = []
    for model in NETWORKS:
        for width, of_width in WIDTHS.items():
            for axis, of_axis in AXES.items():
                label = f"{width} {axis}"
                training, length, epochs = OPTIONS.get((model, label), ((), (), 0))
                found.append(Case(model, label, (*of_width, *of_axis), training=training,
                                  length=length, epochs=epochs))  # fmt: skip
    return found


REPAIRED = _repaired()
# In the order of measurement.
TRAINED = [
    *(case for case in REPAIRED if case.model == MOBILENET and case.epochs),
    Case(MOBILENET, "W8A8", (), rule="esp32-p4", training=KL),
    Case(SHUFFLENET, "W4A4 per-tensor", (*AXES["per-tensor"], *W4A4), epochs=2),
    *(case for case in REPAIRED if case.model == NANODET and case.epochs),
]


class Budget(NamedTuple):
    """A search of widths with an average number of bits, next to these bits for all weights."""

    case: Case
    start: str  # the column whose file is searched
    bits: int
    options: tuple[str, ...]
    minutes: float

    @property
    def name(self) -> str:
        """Name in --only and in the results."""
        return f"search/{self.case.name}/{self.start}/{self.bits} bits"


def _case(model: str, label: str) -> Case:
    return next(case for case in REPAIRED if (case.model, case.label) == (model, label))


MANY = ("--widths", "2,3,4,5,6,8")
# MobileNet: the labels of its training images do not cover its classes.
FEW = ("--widths", "4,6,8", "--metric", "agreement", "--samples", "32", "--val-samples", "256")
BUDGETS = [
    Budget(_case(RESNET8, "W8A8 per-tensor"), PLAIN, 4, MANY, 3.0),
    Budget(_case(RESNET8, "W8A8 per-axis"), PLAIN, 4, MANY, 3.0),
    Budget(_case(MOBILENET, "W8A8 per-tensor"), PLAIN, 6, FEW, 8.0),
    Budget(_case(MOBILENET, "W8A8 per-tensor"), EQUALIZED, 6, FEW, 9.0),
]
# Cases whose layers are quantized one by one, the number of test images, and the minutes.
BRUTE_FORCE = [
    (_case(RESNET8, "W4A8 per-tensor"), 1000, 2.0),
    (_case(MOBILENET, "W8A8 per-tensor"), 1000, 8.0),
]
