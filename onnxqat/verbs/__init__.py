"""The commands as functions, which take a model and data and return a new object.

Each function accepts a path or an object and does not change its arguments. Only `strip` and `dump`
write files. The command of the same name parses its options, calls the function, and writes or
prints the result.
"""

from onnxqat.verbs.analyze import analyze
from onnxqat.verbs.calibrate import calibrate
from onnxqat.verbs.check import Check, check
from onnxqat.verbs.compare_dumps import compare_dumps
from onnxqat.verbs.dump import dump
from onnxqat.verbs.equalize import equalize
from onnxqat.verbs.evaluate import evaluate
from onnxqat.verbs.export import export
from onnxqat.verbs.finetune import TrainingLogs, finetune
from onnxqat.verbs.import_table import import_table
from onnxqat.verbs.insert import insert
from onnxqat.verbs.listener import Listener, TrainingListener
from onnxqat.verbs.models import AnySource
from onnxqat.verbs.opening import DataSource
from onnxqat.verbs.plan import plan
from onnxqat.verbs.report import report
from onnxqat.verbs.search import Searched, search
from onnxqat.verbs.strip import strip

__all__ = [
    "AnySource",
    "Check",
    "DataSource",
    "Listener",
    "Searched",
    "TrainingListener",
    "TrainingLogs",
    "analyze",
    "calibrate",
    "check",
    "compare_dumps",
    "dump",
    "equalize",
    "evaluate",
    "export",
    "finetune",
    "import_table",
    "insert",
    "plan",
    "report",
    "search",
    "strip",
]
