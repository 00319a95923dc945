"""Planning: what is quantized and why. Reads only; no data, no runtime."""

from onnxqat.plan.make import make_plan
from onnxqat.plan.operators import WEIGHTED_OPS, channel_axis
from onnxqat.plan.types import Edge, QuantPlan, QuantPoint, Skip

__all__ = ["WEIGHTED_OPS", "Edge", "QuantPlan", "QuantPoint", "Skip", "channel_axis", "make_plan"]
