"""Which values lead to others in a graph."""

from __future__ import annotations

import pytest

from onnxqat.gradients.reaching import leading_to

# reads, writes
NODES = [
    (["x", "w"], ["a"]),
    (["ids"], ["b"]),
    (["a", "", "b"], ["c"]),
    (["x"], ["d", ""]),
    (["c"], ["y"]),
]


@pytest.mark.parametrize(
    ("ends", "kept", "names"),
    [
        (["y"], "", {"y", "c", "a", "b", "x", "w", "ids"}),
        (["c", ""], "", {"c", "a", "b", "x", "w", "ids"}),
        (["y"], "b", {"y", "c", "a", "x", "w"}),  # nothing goes over b, or to what is before it
        (["d"], "", {"d", "x"}),
        (["x"], "", {"x"}),
    ],
)
def test_values_that_lead_to_the_ends(ends, kept, names):
    assert leading_to(ends, NODES, lambda name: name != kept) == names


def test_what_is_left_out_links_nothing():
    nodes = [(["u"], ["v", ""]), (["p", ""], ["q"])]

    assert leading_to(["q"], nodes, lambda _: True) == {"q", "p"}
