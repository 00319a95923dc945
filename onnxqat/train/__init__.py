"""Training: the training form, its gradients, and the fine-tuning loop."""

from onnxqat.train.config import Config
from onnxqat.train.finetune import DivergedError, Finetuned, Progress, finetune

__all__ = ["Config", "DivergedError", "Finetuned", "Progress", "finetune"]
