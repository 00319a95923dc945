"""The command ``calibrate``: measure scales."""

from __future__ import annotations

from typing import Any

import click

from onnxqat.arguments import take_calibration, take_settings, take_source
from onnxqat.commands.common import (
    join,
    listener_of,
    print_result,
    renamed,
)
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command
from onnxqat.options import (
    bias_correction_option,
    calibration_options,
    data_options,
    device_options,
    force_option,
    json_option,
    output_option,
    run_options,
    seed_option,
)

__all__ = ["calibrate"]


@command(example="onnxqat calibrate model.qdq.onnx images/ --observer percentile --samples 256")
@click.argument("model")
@click.argument("data")
@calibration_options
@bias_correction_option
@data_options
@run_options(32)
@device_options("auto")
@seed_option
@output_option("Write the model here (default: MODEL with .calibrated before its suffix).")
@force_option
@json_option
def calibrate(model: str, data: str, output: str | None, force: bool, as_json: bool,
              **options: Any) -> None:  # fmt: skip
    """Measure the scales of a Q/DQ MODEL on DATA."""
    from onnxqat import verbs
    from onnxqat.files import check_writable

    target = output or renamed(model, "calibrated")
    workers = join()
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target if workers.rank == 0 else None)
    workers.any(False)  # wait until all processes have checked the files
    result = verbs.calibrate(
        model,
        take_source(data, options),
        settings=take_settings(options),
        calibration=take_calibration(options),
        listener=listener_of(workers),
        workers=workers,
    )
    if workers.rank == 0:
        result.save(target, force=force)
        done = result.history[-1]
        samples = int(done.figures["samples"] or 0)
        document = {"observer": done.settings["observer"], "samples": samples, "output": target}
        print_result({"schema": "onnxqat.calibrate/1", **document}, as_json, list(document.items()))
    workers.leave()
