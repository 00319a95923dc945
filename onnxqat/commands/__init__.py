"""The commands of the command line: parse the options, call the verb, print the result.

Heavy modules are imported inside of the functions, so that ``--help`` is fast.
"""

from onnxqat.commands.analyze import analyze
from onnxqat.commands.calibrate import calibrate
from onnxqat.commands.check import check
from onnxqat.commands.dump import compare_dumps, dump
from onnxqat.commands.equalize import equalize
from onnxqat.commands.evaluate import evaluate
from onnxqat.commands.export import export
from onnxqat.commands.finetune import finetune
from onnxqat.commands.import_table import import_table
from onnxqat.commands.init import init
from onnxqat.commands.insert import insert
from onnxqat.commands.report import report
from onnxqat.commands.rules import rules
from onnxqat.commands.run import run
from onnxqat.commands.search import search
from onnxqat.commands.strip import strip

__all__ = ["COMMANDS"]

COMMANDS = (
    *(
        check,
        insert,
        calibrate,
        finetune,
        report,
        evaluate,
        analyze,
        search,
        dump,
        compare_dumps,
        strip,
    ),
    *(equalize, export, import_table, rules, run, init),
)
