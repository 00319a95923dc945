"""Planning: which tensors are quantized, and why. It reads the graph only, not data."""

from onnxqat.plan.make import EmptyPlanError, make_plan
from onnxqat.plan.requantization import is_requantization, remove_requantizations
from onnxqat.plan.types import Edge, QuantPlan, QuantPoint, Skip, describe_spec

__all__ = [
    "Edge",
    "EmptyPlanError",
    "QuantPlan",
    "QuantPoint",
    "Skip",
    "describe_spec",
    "is_requantization",
    "make_plan",
    "remove_requantizations",
]
