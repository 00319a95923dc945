"""Training: the training form, its gradients, and the fine-tuning loop."""

from onnxqat.train.config import Config
from onnxqat.train.finetune import finetune
from onnxqat.train.loop import DivergedError, Finetuned, Progress

__all__ = ["Config", "DivergedError", "Finetuned", "Progress", "finetune"]
