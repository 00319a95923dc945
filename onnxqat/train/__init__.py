"""Training: the training form, its gradients, and the fine-tuning loop."""

from onnxqat.train.finetune import Config, Diverged, Finetuned, Progress, finetune

__all__ = ["Config", "Diverged", "Finetuned", "Progress", "finetune"]
