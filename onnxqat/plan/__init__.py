"""Planning: what is quantized and why. Reads only; no data, no runtime."""

from onnxqat.plan.make import make_plan
from onnxqat.plan.types import Edge, QuantPlan, QuantPoint, Skip

__all__ = ["Edge", "QuantPlan", "QuantPoint", "Skip", "make_plan"]
