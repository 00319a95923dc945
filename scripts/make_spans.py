"""Make the bundled question-answering data and train the bundled model for it.

Needs packages that onnxqat does not depend on, so run it in a separate environment::

    pip install torch==2.13.0 onnx onnxruntime numpy
    python scripts/make_spans.py --out models

Everything is seeded: the same versions on the same kind of CPU give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

LENGTH, WORDS, MARKERS = 24, 32, 4  # tokens per text; kinds of tokens; how many are markers
LOST = 0.15  # fraction of the markers that noise replaces by another word
WIDTH, HEADS, HIDDEN = 32, 4, 64
STEPS, BATCH = 1000, 64
LOUD_FROM, LOUD_EVERY, LOUD = 5, 16, 2.0**6  # channels that `unbalance` scales, and the factor

Integers = NDArray[np.int64]


class Split(NamedTuple):
    """Texts of shape (N, LENGTH), and the first and last positions of their answers, inclusive."""

    tokens: Integers
    starts: Integers
    ends: Integers


def texts(count: int, seed: int) -> Split:
    """Draw random texts with questions and answers.

    The first token is the question, a marker. The answer is the text between the two later
    occurrences of this marker. Another marker also occurs twice. Noise may replace any marker, so
    some answers can only be guessed.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(MARKERS, WORDS, (count, LENGTH))
    ends = np.empty((count, 2), np.int64)
    for text, span in zip(tokens, ends, strict=True):
        asked, other = rng.choice(MARKERS, 2, replace=False)
        places = np.zeros(4, np.int64)
        while abs(places[0] - places[1]) < 2:  # at least one token must be between them
            places = rng.permutation(np.arange(1, LENGTH))[:4]
        text[0] = asked
        text[places] = asked, asked, other, other
        span[:] = min(places[:2]) + 1, max(places[:2]) - 1
        lost = places[rng.random(4) < LOST]
        text[lost] = rng.integers(MARKERS, WORDS, len(lost))
    return Split(tokens, ends[:, 0], ends[:, 1])


# --- network ----------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block with normalisation before attention and before the two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        h = self.norm1(x)
        parts = (layer(h) for layer in (self.query, self.key, self.value))
        shape = (-1, LENGTH, HEADS, WIDTH // HEADS)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(2, 3) * (WIDTH // HEADS) ** -0.5
        mixed = (torch.softmax(scores, -1) @ value).transpose(1, 2).reshape(-1, LENGTH, WIDTH)
        x = x + self.out(mixed)
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return result


class Reader(nn.Module):
    """Two blocks, and for each token the logits of an answer's start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.2 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.words.weight, std=0.2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of start and end, N x LENGTH each."""
        x = self.words(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        start, end = self.head(self.norm(x)).split(1, -1)
        return start.squeeze(-1), end.squeeze(-1)


def train(net: Reader) -> None:
    """Train on new random texts in each step, with AdamW and one cycle of the learning rate."""
    data = [torch.from_numpy(part) for part in texts(STEPS * BATCH, seed=1)]
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=STEPS)
    for tokens, *ends in zip(*(part.split(BATCH) for part in data), strict=True):
        loss = sum(map(functional.cross_entropy, net(tokens), ends))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def unbalance(net: Reader) -> None:
    """Multiply two channels before the matrices of each block, and divide the matrices' columns.

    The factor is a power of two, so the network's function stays the same to the last bit. Trained
    transformers have such channels after their normalisation (Xiao et al. 2022,
    https://arxiv.org/abs/2211.10438, section 3), and one scale is too coarse for the other
    channels. A minute of training on small data does not produce them, so this function does.
    """
    factor = torch.ones(WIDTH)
    factor[LOUD_FROM::LOUD_EVERY] = LOUD
    for block in net.blocks:
        for norm, layers in (
            (block.norm1, (block.query, block.key, block.value)),
            (block.norm2, (block.up,)),
        ):
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            for layer in layers:
                layer.weight.div_(factor)


@torch.no_grad()
def right(net: Reader, data: Split) -> float:
    """Return the fraction of texts whose start and end are both right."""
    start, end = (logits.argmax(1).numpy() for logits in net(torch.from_numpy(data.tokens)))
    return float(((start == data.starts) & (end == data.ends)).mean())


def export(net: Reader, path: Path, data: Split) -> None:
    """Write the ONNX file, and compare its outputs in onnxruntime with the network's."""
    tokens = torch.from_numpy(data.tokens)
    names = ["tokens", "start", "end"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns that it is old
        torch.onnx.export(
            net,
            (tokens[:1],),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "N"} for name in names},
        )
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        outputs = session.run(None, {"tokens": data.tokens})
        for found, wanted in zip(outputs, net(tokens), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=0.0, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models"), help="directory to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the number of threads changes the last digits of sums
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)

    train_data, test_data = texts(2048, seed=2), texts(2048, seed=3)
    np.savez_compressed(out / "spans-train.npz", **train_data._asdict())
    np.savez_compressed(out / "spans-test.npz", **test_data._asdict())
    net = Reader()
    train(net)
    with torch.no_grad():
        before = net(torch.from_numpy(test_data.tokens))
        unbalance(net)
        after = net(torch.from_numpy(test_data.tokens))
    if not all(map(torch.equal, before, after)):
        raise RuntimeError("rescaling the channels changed the network's function")
    export(net, out / "spans.onnx", test_data)
    print(f"spans: both ends right {right(net, test_data):.2%}")
    for path in sorted(out.glob("spans*")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.name}")


if __name__ == "__main__":
    main()
