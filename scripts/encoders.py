"""Transformer encoders for `bench_step.py`, in code that both FX and ONNX exporters can trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WORDS", "bert_mini", "vit_tiny"]

PATCH, WORDS = 16, 30522


class Attention(nn.Module):
    """Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.shape = (heads, width // heads)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, self.shape).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(2, 3)) * self.shape[1] ** -0.5
        mixed = torch.matmul(torch.softmax(scores, -1), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer, with normalization before each part as in ViT, or after it as in BERT."""

    def __init__(self, width: int, heads: int, *, before: bool) -> None:
        super().__init__()
        self.before = before
        self.attention = Attention(width, heads)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attention(self.first(x))
            return x + self.narrow(self.gelu(self.wide(self.second(x))))
        x = self.first(x + self.attention(x))
        return self.second(x + self.narrow(self.gelu(self.wide(x))))


class ImageEncoder(nn.Module):
    """Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929."""

    def __init__(self, size: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        # the first position holds the class token with its own position
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // PATCH) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, before=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = functional.pad(x, (0, 0, 1, 0)) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class TokenEncoder(nn.Module):
    """Devlin et al. 2018, https://arxiv.org/abs/1810.04805, with a head on the first token."""

    def __init__(
        self, length: int, width: int, depth: int, heads: int, words: int, classes: int
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.blocks = nn.Sequential(*(Block(width, heads, before=False) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.words(x) + self.positions)
        return self.head(self.blocks(x)[:, 0])


def vit_tiny(size: int) -> nn.Module:
    """Return DeiT-Ti (Touvron et al. 2020, https://arxiv.org/abs/2012.12877, table 1)."""
    return ImageEncoder(size, width=192, depth=12, heads=3, classes=1000)


def bert_mini(length: int) -> nn.Module:
    """Return BERT-Mini (Turc et al. 2019, https://arxiv.org/abs/1908.08962, table 1)."""
    return TokenEncoder(length, width=256, depth=4, heads=4, words=WORDS, classes=1000)
