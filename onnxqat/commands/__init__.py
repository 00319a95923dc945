"""The commands: parse, call, print. No arithmetic.

Heavy modules are imported inside of the commands, so that ``--help`` answers at once.
"""

from onnxqat.commands.making import calibrate, export, import_table, insert
from onnxqat.commands.planning import check, rules
from onnxqat.commands.reading import evaluate, strip
from onnxqat.commands.repairing import equalize
from onnxqat.commands.tuning import finetune
from onnxqat.commands.watching import report

__all__ = ["COMMANDS"]

COMMANDS = (
    *(check, insert, calibrate, finetune, report, evaluate, strip),
    *(equalize, export, import_table, rules),
)
