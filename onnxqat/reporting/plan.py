"""Show the plan: the quantized tensors and the float nodes, with reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from onnxqat.plan import QuantPlan, QuantPoint, Skip, describe_spec
from onnxqat.reporting.elements import Child, details, element, section, table

__all__ = ["shown_plan"]

MOST = 1000  # the most rows of a table
NAMED = 5  # the most nodes that are named for a reason


def shown_plan(plan: QuantPlan) -> Element:
    """Return the section on the plan."""
    kinds = Counter((point.role, describe_spec(point.spec)) for point in plan.points)
    counted: list[list[Child]] = [
        [role, element("code", spec), str(number)] for (role, spec), number in sorted(kinds.items())
    ]
    parts: list[Child] = [
        element("p", f"Rule {plan.rule}."),
        table("Quantized tensors", ["role", "integers", "tensors"], counted, numbers=(2,)),
    ]
    if plan.overrides:
        changes = [element("li", element("code", one)) for one in plan.overrides]
        parts += [element("p", "Overrides:"), element("ul", *changes)]
    parts += [_skips(plan.skips)] if plan.skips else [element("p", "No node stays float.")]
    parts.append(details(f"Every quantized tensor ({len(plan.points)})", _points(plan.points)))
    return section("Plan", *parts)


def _skips(skips: Sequence[Skip]) -> Element:
    reasons: dict[tuple[bool, str], list[Skip]] = {}
    for skip in skips:
        reasons.setdefault((not skip.unsupported, skip.reason), []).append(skip)
    rows: list[list[Child]] = []
    for (supported, reason), nodes in sorted(reasons.items())[:MOST]:
        names = ", ".join(f"{s.node} ({s.op_type})" for s in nodes[:NAMED])
        more = f", and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        kind = "float" if supported else "unsupported"
        rows.append([element("span", reason, class_="text"), kind, str(len(nodes)),
                     element("span", names + more, class_="name")])  # fmt: skip
    heads = ["why", "how", "nodes", "which"]
    return table("Nodes that stay float", heads, rows, numbers=(2,))


def _points(points: Sequence[QuantPoint]) -> Element:
    rows: list[list[Child]] = [
        [
            element("span", p.tensor, element("small", p.role), class_="name"),
            element("code", describe_spec(p.spec)),
            element("span", p.group or "", class_="name"),
            element("span", p.reason, class_="text"),
        ]
        for p in points[:MOST]
    ]
    more = f", the first {MOST} of {len(points)}" if len(points) > MOST else ""
    title = f"Each with its reason{more}"
    return table(title, ["tensor", "integers", "shares with", "why"], rows)
