"""hb_mapper's configuration for a Horizon chip.

The keys are documented in D-Robotics/rdk_doc "PTQ principles and steps" (``hb_mapper makertbin``):
``mean_value`` and ``scale_value`` normalize by ``(pixel - mean) * scale``, and calibration files
with ``cal_data_type: float32`` must already be normalized. A model with a camera's nodes in front
(`onnxqat.camera`) takes YUV pixels itself: hb_mapper then adds neither conversion nor
normalization. ``input_space_and_range: regular`` is inferred to leave the values as the camera
gives them, so the nodes also convert the video range.
"""

from __future__ import annotations

import json

from onnxqat.handoff.facts import NOT_RUN, Facts, document, numbers

__all__ = ["hb_mapper"]

CONFIG = "hb_mapper.yaml"


def hb_mapper(facts: Facts) -> dict[str, str]:
    """Return the configuration and the call of ``hb_mapper makertbin``."""
    lines = [
        "hb_mapper calibrates thresholds itself, and cannot read a table of another tool.",
        f"{facts.files['table']} lists onnxqat's thresholds by tensor. A script of yours can set",
        "them in the HzCalibration nodes, or compare them with those that hb_mapper prints.",
    ]
    if facts.camera is not None:
        lines += [
            "",
            f"The model takes YUV pixels of 0 to 255 ({facts.camera.yuv_range} range) and converts",
            "and normalizes them itself. Calibration files must hold such pixels.",
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
    if facts.camera is not None:
        inputs |= {
            "input_type_train": "yuv444",
            "input_type_rt": facts.camera.kind,
            "input_layout_train": str(facts.images[0].layout).upper(),
            "norm_type": "no_preprocess",
        }
        if facts.camera.kind == "nv12":
            inputs["input_space_and_range"] = "regular"
        else:
            inputs["input_layout_rt"] = "NHWC"
    elif facts.images:
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
    """Return sections as YAML; values are written as JSON, which is valid YAML."""
    lines = []
    for name, entries in sections.items():
        lines.append(f"{name}:")
        lines += [
            f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()
        ]
    return "\n".join(lines) + "\n"
