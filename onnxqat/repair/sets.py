"""Sets of channels that must have the same scale, by union-find."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChannelSets", "Ids"]

Ids = NDArray[np.int64]


class ChannelSets:
    """Sets of channels that share one scale. The scale of a fixed set is 1."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}  # why a set is fixed, by its root

    @property
    def count(self) -> int:
        """The number of channels."""
        return len(self._parents)

    def new(self, count: int) -> Ids:
        """Return the numbers of ``count`` new channels, each in its own set."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def roots(self, ids: Ids) -> Ids:
        """Return the root channel of each channel's set, in the same shape."""
        found = [self._root(i) for i in ids.reshape(-1).tolist()]
        return np.array(found, np.int64).reshape(ids.shape)

    def join(self, one: Ids, other: Ids) -> None:
        """Join the sets of two arrays of channels of the same shape."""
        for a, b in zip(one.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True):
            kept, merged = self._root(a), self._root(b)
            if kept != merged:
                self._parents[merged] = kept
                if merged in self._reasons:
                    self._reasons.setdefault(kept, self._reasons.pop(merged))

    def fix(self, ids: Ids, reason: str) -> None:
        """Fix the scale of channels at 1; the first reason given for a set is kept."""
        for root in np.unique(self.roots(np.unique(ids))).tolist():
            self._reasons.setdefault(root, reason)

    def fixed_because(self, channel: int) -> str | None:
        """Return why the scale of a channel is fixed, or None if it is not."""
        return self._reasons.get(self._root(channel))

    def _root(self, channel: int) -> int:
        parents = self._parents
        while parents[channel] != channel:
            parents[channel] = parents[parents[channel]]
            channel = parents[channel]
        return channel
