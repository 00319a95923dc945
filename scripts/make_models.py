"""Make the bundled data and train the bundled models.

Needs packages that onnxqat does not depend on, so run it in a separate environment::

    pip install torch==2.13.0 onnx onnxruntime scikit-learn numpy
    python scripts/make_models.py --out models

Everything is seeded: the same versions on the same kind of CPU give the same files.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SIZE = 28  # pixels per side
MEAN, SCALE = 128.0, 0.0078125  # x = (pixel - MEAN) * SCALE, about [-1, 1]
TEST_ORIGINALS = 600  # of the 1797 digits; their variants are the test split
TRAIN_COPIES, TEST_COPIES = 5, 2  # variants drawn from each original
BATCH = 64
WEAK_EVERY, WEAK = 16, 2.0**-7  # `unbalance` scales every 16th channel by this factor
CALIBRATION = 512  # training images for the ranges of the naive check


class Split(NamedTuple):
    """Images, uint8 N x H x W x 1, and their labels."""

    images: NDArray[np.uint8]
    label: NDArray[np.int64]


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Return images as input for the networks: float32 N x 1 x H x W."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) * SCALE


# --- data -----------------------------------------------------------------------------------


def variants(digits: Tensor, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one distorted SIZE x SIZE picture of each 8x8 digit (values 0..16).

    Distorting and enlarging in one resampling keeps the strokes as sharp as 8x8 allows.
    """
    n = len(digits)
    angle, shear = rng.uniform(-0.4, 0.4, n), rng.uniform(-0.25, 0.25, n)
    zoom = rng.uniform([1.1, 1.1], [1.7, 1.7], (n, 2))  # above 1 the digit is smaller
    shift = rng.uniform(-0.25, 0.25, (n, 2)) * zoom
    cos, sin = np.cos(angle), np.sin(angle)
    theta = np.empty((n, 2, 3))
    theta[:, 0] = np.stack([cos * zoom[:, 0], (shear - sin) * zoom[:, 0], shift[:, 0]], axis=1)
    theta[:, 1] = np.stack([sin * zoom[:, 1], cos * zoom[:, 1], shift[:, 1]], axis=1)

    noisy = digits.numpy() + rng.normal(0.0, 1.5, (n, 1, 8, 8))
    contrast = rng.uniform(0.6, 1.0, (n, 1, 1, 1))
    source = torch.from_numpy(noisy * contrast / 16.0).float()
    grid = functional.affine_grid(torch.from_numpy(theta).float(), [n, 1, SIZE, SIZE], False)
    picture = functional.grid_sample(source, grid, mode="bicubic", align_corners=False)
    # 32 grey levels are as readable, and compress to half the size.
    levels = (picture.clamp(0.0, 1.0) * 31.0).round() * (255.0 / 31.0)
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def make_data(out: Path) -> tuple[Split, Split]:
    """Write both splits; no original digit has variants in both."""
    rng = np.random.default_rng(20240607)
    bunch = load_digits()
    digits = torch.from_numpy(bunch.images).float().unsqueeze(1)
    order = rng.permutation(len(digits))
    splits = []
    for name, chosen, copies in [
        ("train", order[TEST_ORIGINALS:], TRAIN_COPIES),
        ("test", order[:TEST_ORIGINALS], TEST_COPIES),
    ]:
        images = np.concatenate([variants(digits[chosen], rng) for _ in range(copies)])
        label = np.tile(bunch.target[chosen].astype(np.int64), copies)
        np.savez_compressed(out / f"digits-{name}.npz", images=images, label=label)
        splits.append(Split(images, label))
    return splits[0], splits[1]


# --- networks -------------------------------------------------------------------------------


class LeNet5(nn.Sequential):
    """LeNet-5 with Relu and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(400, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, 10)


class ConvBn(nn.Sequential):
    """A convolution without bias, its batch normalisation, and an activation if one is given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        if act is not None:
            self.act = act


class Block(nn.Module):
    """Inverted residual: widen, depthwise, narrow; Add where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = 4 * inputs
        self.expand = ConvBn(inputs, width, 1, act=nn.ReLU())
        self.depthwise = ConvBn(width, width, 3, stride=stride, groups=width, act=nn.ReLU())
        self.project = ConvBn(width, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Sequential):
    """A MobileNetV2 of about 40 thousand parameters and 5 MFLOP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(1, 16, 3, stride=2, act=nn.ReLU6())
        shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 1), (40, 40, 1)]
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.head = ConvBn(40, 128, 1, act=nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, 10)


# --- training -------------------------------------------------------------------------------


def batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches."""
    x, label = normalise(split.images), torch.from_numpy(split.label)
    for chosen in torch.randperm(len(x)).split(BATCH):
        yield x[chosen], label[chosen]


def train(net: nn.Module, data: Split, epochs: int) -> None:
    """Train with AdamW and one cycle of the learning rate."""
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    steps = epochs * -(-len(data.label) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for x, label in batches(data):
            optimiser.zero_grad()
            functional.cross_entropy(net(x), label, label_smoothing=0.05).backward()
            optimiser.step()
            schedule.step()
    net.eval()


@torch.no_grad()
def top1(net: nn.Module, data: Split) -> float:
    """Return the top-1 accuracy as a fraction."""
    right = net(normalise(data.images)).argmax(1).numpy() == data.label
    return float(right.mean())


@torch.no_grad()
def unbalance(net: MobileNet) -> None:
    """Make a few channels of the last block weak, and their depthwise filters strong.

    Relu passes a positive factor through. So the batch normalisation before it can be divided by a
    power of two, and the depthwise filter after it multiplied, and the network's function stays the
    same to the last bit. Real MobileNets have such filters after their batch normalisation is
    folded, and one scale for all filters is too coarse for most of them. A minute of training on
    small data does not produce them, so this function does.
    """
    block: Any = net.blocks[-1]  # torch declares no types for the modules of a Sequential
    factor = torch.ones(block.expand.bn.num_features)
    factor[::WEAK_EVERY] = WEAK
    block.expand.bn.weight.mul_(factor)
    block.expand.bn.bias.mul_(factor)
    block.depthwise.conv.weight.div_(factor.reshape(-1, 1, 1, 1))


# --- naive post-training quantization, to see how much accuracy it loses ----------------------


class Scheme(NamedTuple):
    """Bits of weights and activations; whether weights have a scale per output channel."""

    name: str
    weight_bits: int
    activation_bits: int
    per_channel: bool


SCHEMES = [
    Scheme("W8A8 per-tensor", 8, 8, False),
    Scheme("W8A8 per-channel", 8, 8, True),
    Scheme("W4A4 per-tensor", 4, 4, False),
    Scheme("W4A4 per-channel", 4, 4, True),
]


def round_weight(weight: Tensor, bits: int, *, per_channel: bool) -> Tensor:
    """Round to the symmetric grid whose end is the largest magnitude."""
    limit = 2 ** (bits - 1) - 1
    dims = tuple(range(int(per_channel), weight.dim()))
    scale = (weight.abs().amax(dims, keepdim=True) / limit).clamp_min(1e-12)
    return (weight / scale).round() * scale


class RangeHook:
    """Forward hook that records the range of a tensor, or rounds the tensor to a grid over it."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.low = self.high = 0.0
        self.watching = True

    def __call__(self, _module: nn.Module, _inputs: object, x: Tensor) -> Tensor:
        """Return the replacement for the module's output."""
        if self.watching:
            self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
            return x
        top = 2**self.bits - 1 if self.low >= 0 else 2 ** (self.bits - 1) - 1
        bottom = 0 if self.low >= 0 else -top - 1
        scale = max(self.high, -self.low, 1e-12) / top
        return (x / scale).round().clamp(bottom, top) * scale


def folded(net: nn.Module) -> nn.Sequential:
    """Return a copy with folded batch normalisation and an Identity for the input in front."""
    net = copy.deepcopy(net)
    for part in net.modules():
        if isinstance(part, ConvBn):
            part.conv = nn.utils.fuse_conv_bn_eval(part.conv, part.bn)
            part.add_module("bn", nn.Identity())
    return nn.Sequential(nn.Identity(), net)


def activation_points(net: nn.Sequential) -> list[nn.Module]:
    """Return the modules whose outputs are quantized, the Identity for the input first.

    These are the input, every activation, every linear convolution, Add and the pooling.
    """
    return [
        part
        for part in net.modules()
        if isinstance(part, nn.ReLU | nn.ReLU6 | Block | nn.AdaptiveAvgPool2d)
        or (isinstance(part, ConvBn) and not hasattr(part, "act"))
        or part is net[0]
    ]


@torch.no_grad()
def naive_top1(net: nn.Module, data: Split, test: Split, scheme: Scheme) -> float:
    """Return the accuracy after naive quantization; the first and the last layer have 8 bits."""
    rounded = folded(net)
    layers = [part for part in rounded.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    for layer in layers:
        bits = 8 if layer in (layers[0], layers[-1]) else scheme.weight_bits
        layer.weight.copy_(round_weight(layer.weight, bits, per_channel=scheme.per_channel))
    points = activation_points(rounded)
    hooks = []
    for point in points:  # the first is the input, the last what the classifier reads
        edge = point in (points[0], points[-1])
        hooks.append(RangeHook(8 if edge else scheme.activation_bits))
        point.register_forward_hook(hooks[-1])
    rounded(normalise(data.images[:CALIBRATION]))
    for hook in hooks:
        hook.watching = False
    return top1(rounded, test)


def report(title: str, net: nn.Module, data: Split, test: Split) -> None:
    """Print the accuracy, float and rounded."""
    print(f"{title}: float {top1(net, test):.2%}")
    for scheme in SCHEMES:
        print(f"{title}: {scheme.name} {naive_top1(net, data, test, scheme):.2%}")


# --- files ----------------------------------------------------------------------------------


def export(net: nn.Module, path: Path) -> None:
    """Write the ONNX file without folding batch normalisation, and check it."""
    with warnings.catch_warnings():
        # The old exporter needs no further package, but warns that it is old. PRESERVE keeps batch
        # normalisation unfolded, and makes the exporter warn about constant folding.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.zeros(1, 1, SIZE, SIZE),),
            str(path),
            dynamo=False,
            opset_version=17,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
        )
    onnx.checker.check_model(str(path), full_check=True)


def check(path: Path, net: nn.Module, data: Split) -> None:
    """Compare the file's outputs in onnxruntime with the network's, and print its accuracy."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = normalise(data.images)
    outputs = session.run(["output"], {"input": x.numpy()})[0]
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(outputs, expected, rtol=0.0, atol=1e-4)
    accuracy = float((outputs.argmax(1) == data.label).mean())
    if accuracy != top1(net, data):
        raise RuntimeError(f"{path}: onnxruntime and torch disagree about the accuracy")
    print(f"{path.name}: float {accuracy:.2%} in onnxruntime")


def make_lenet(data: Split, test: Split) -> nn.Module:
    torch.manual_seed(1)
    net = LeNet5()
    train(net, data, epochs=15)
    report("lenet5", net, data, test)
    return net


def make_mobilenet(data: Split, test: Split) -> nn.Module:
    torch.manual_seed(1)
    net = MobileNet()
    train(net, data, epochs=15)
    report("mobilenet-digits, balanced", net, data, test)
    x = normalise(data.images[:CALIBRATION])
    with torch.no_grad():
        before = net(x)
        unbalance(net)
        if not torch.equal(net(x), before):
            raise RuntimeError("rescaling the channels changed the network's function")
    report("mobilenet-digits", net, data, test)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models"), help="directory to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the number of threads changes the last digits of sums
    torch.use_deterministic_algorithms(True)

    data, test = make_data(out)
    for name, make in [("lenet5", make_lenet), ("mobilenet-digits", make_mobilenet)]:
        net = make(data, test)
        path = out / f"{name}.onnx"
        export(net, path)
        check(path, net, test)
    for path in sorted([*out.glob("*.npz"), *out.glob("*.onnx")]):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.name}")


if __name__ == "__main__":
    main()
