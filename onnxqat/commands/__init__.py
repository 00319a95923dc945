"""The commands: parse, call, print. No arithmetic.

Heavy modules are imported inside of the commands, so that ``--help`` answers at once.
"""

from onnxqat.commands.making import calibrate, export, import_table, insert
from onnxqat.commands.reading import evaluate, rules, strip
from onnxqat.commands.tuning import finetune

__all__ = ["COMMANDS"]

COMMANDS = (insert, calibrate, finetune, evaluate, strip, export, import_table, rules)
