"""Training: the training form, its gradients, and the fine-tuning loop."""

from onnxqat.parallel import Workers, join_workers
from onnxqat.train.checkpoint import Checkpoints
from onnxqat.train.config import Config
from onnxqat.train.finetune import finetune
from onnxqat.train.form import untrainable_nodes
from onnxqat.train.form_builder import Untrainable
from onnxqat.train.given import training_device
from onnxqat.train.monitoring.log import TrainingLog
from onnxqat.train.monitoring.tensorboard import check_event_folder
from onnxqat.train.monitoring.writers import read_log
from onnxqat.train.records import DivergedError, Finetuned, Progress, StoppedError

__all__ = [
    "Checkpoints",
    "Config",
    "DivergedError",
    "Finetuned",
    "Progress",
    "StoppedError",
    "TrainingLog",
    "Untrainable",
    "Workers",
    "check_event_folder",
    "finetune",
    "join_workers",
    "read_log",
    "training_device",
    "untrainable_nodes",
]
