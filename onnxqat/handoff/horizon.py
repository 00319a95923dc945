"""hb_mapper's configuration for a Horizon chip.

Keys: D-Robotics/rdk_doc "PTQ principles and steps" (``hb_mapper makertbin``), which says that
``mean_value`` and ``scale_value`` mean ``(pixel - mean) * scale``, and that calibration files of
``cal_data_type: float32`` must be normalized already.
"""

from __future__ import annotations

import json

from onnxqat.handoff.facts import NOT_RUN, Facts, document, numbers

__all__ = ["hb_mapper"]

CONFIG = "hb_mapper.yaml"


def hb_mapper(facts: Facts) -> dict[str, str]:
    """Return the configuration of ``hb_mapper makertbin``, and how it is called."""
    lines = [
        "hb_mapper finds its own thresholds from calibration files; it reads no table of another",
        f"tool. {facts.files['table']} lists ours by tensor, for a script of yours that sets",
        "them in the HzCalibration nodes, and to compare with those that hb_mapper prints.",
    ]
    call = f"hb_mapper makertbin --config {CONFIG} --model-type onnx"
    return {
        "compile.txt": document(call, "\n".join(lines)),
        CONFIG: f"# {NOT_RUN}\n" + _yaml(_sections(facts)),
    }


def _sections(facts: Facts) -> dict[str, dict[str, str | int | bool]]:
    shapes = ";".join(one.lengths("x") for one in facts.inputs)
    inputs: dict[str, str | int | bool] = {
        "input_name": ";".join(one.name for one in facts.inputs),
        "input_shape": shapes,
    }
    if facts.images:
        colours = facts.pixels
        inputs |= {
            "input_type_train": colours,
            "input_type_rt": colours,
            "input_layout_train": str(facts.images[0].layout).upper(),
            "input_layout_rt": "NHWC",
            "norm_type": "data_mean_and_scale",
            "mean_value": numbers(facts.mean, " "),
            "scale_value": numbers(facts.scale, " "),
        }
    else:
        inputs |= {"input_type_train": "featuremap", "input_type_rt": "featuremap"}
        inputs["norm_type"] = "no_preprocess"
    return {
        "model_parameters": {
            "onnx_model": facts.model,
            "march": facts.target,
            "output_model_file_prefix": "model",
            "working_dir": "horizon",
        },
        "input_parameters": inputs,
        "calibration_parameters": {
            "cal_data_dir": "CALIBRATION_FILES",
            "cal_data_type": "float32",
            "preprocess_on": False,
            "calibration_type": "max",
        },
        "compiler_parameters": {"compile_mode": "latency", "optimize_level": "O3"},
    }


def _yaml(sections: dict[str, dict[str, str | int | bool]]) -> str:
    """Return sections as YAML; JSON's strings and booleans are YAML's."""
    lines = []
    for name, entries in sections.items():
        lines.append(f"{name}:")
        lines += [
            f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()
        ]
    return "\n".join(lines) + "\n"
