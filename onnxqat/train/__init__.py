"""Training: the training form, its gradients, and the fine-tuning loop."""

from onnxqat.parallel import Workers, join_workers
from onnxqat.train.checkpoint import Checkpoints
from onnxqat.train.config import Config
from onnxqat.train.finetune import finetune
from onnxqat.train.form import Untrainable, untrainable_nodes
from onnxqat.train.log import TrainingLog
from onnxqat.train.records import DivergedError, Finetuned, Progress, StoppedError
from onnxqat.train.report import check_plotting, write_report
from onnxqat.train.tensorboard import check_event_folder
from onnxqat.train.writers import read_log

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
    "check_plotting",
    "finetune",
    "join_workers",
    "read_log",
    "untrainable_nodes",
    "write_report",
]
