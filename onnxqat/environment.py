"""Check that the required packages are installed correctly, and say how to repair them.

Several distributions contain a module ``onnxruntime``. If several are installed, or one of them is
removed afterwards, their files are mixed and fail in unexpected places.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import platform
import sys
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

from onnxqat.errors import OnnxQatError

__all__ = [
    "changing_to_cuda",
    "check_environment",
    "check_packages",
    "mending",
    "package_versions",
    "runtime_distribution",
]

# As in pyproject.toml: the training build, where it has wheels.
HAS_TRAINING_BUILD = sys.version_info < (3, 13) and (
    sys.platform == "darwin" or platform.machine() in ("x86_64", "AMD64")
)
ENGINE = "onnxruntime-training-cpu" if HAS_TRAINING_BUILD else "onnxruntime"
# With the libraries of CUDA and cuDNN that they are built for; its files overwrite those of ENGINE.
CUDA_ENGINE = "onnxruntime-gpu[cuda,cudnn]>=1.30"
CUDA_12_ENGINE = "onnxruntime-gpu[cuda,cudnn]<1.25"
IMPORTED = ("numpy", "google.protobuf", "onnx", "onnx_graphsurgeon", "onnxruntime")
LIBRARIES = {"google.protobuf": ("protobuf", "onnx"), "onnx": ("onnx", "protobuf")}
USED = ("InferenceSession", "SessionOptions", "GraphOptimizationLevel")


def check_packages() -> None:
    """Refuse an environment with several distributions of onnxruntime; it is not imported.

    Raises
    ------
    OnnxQatError
        Several distributions, or parts of one, are installed; the message has the repair command.
    """
    spec = importlib.util.find_spec("onnxruntime")
    found = _distributions()
    if len(found) > 1:
        raise OnnxQatError(f"{' and '.join(found)} overwrite each other's files. {mending()}")
    if spec is None:
        raise OnnxQatError(f"onnxruntime is not installed. {mending()}")
    if spec.origin is None:  # a folder without __init__.py
        raise OnnxQatError(f"onnxruntime lacks files. {mending()}")


def check_environment() -> None:
    """Refuse an environment in which a required package cannot be imported.

    Raises
    ------
    OnnxQatError
        See `check_packages`; or an import fails, for example because of an old protobuf, or because
        a package was built for another numpy. The message has the repair command.
    """
    check_packages()
    said = io.StringIO()
    for name in IMPORTED:
        try:
            with redirect_stderr(said):  # numpy prints a long text
                module = importlib.import_module(name)
        except Exception as error:  # mixed versions can raise anything
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise OnnxQatError(f"{name} cannot be imported ({reason}). {_mending(name)}") from error
    missing = [attribute for attribute in USED if not hasattr(module, attribute)]
    if missing:
        raise OnnxQatError(f"onnxruntime lacks {', '.join(missing)}. {mending()}")
    sys.stderr.write(said.getvalue())


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect computed values."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("onnxqat", "numpy", "onnx")}
    return found | {name: version for name, _, version in map(_parted, _distributions())}


def mending() -> str:
    """Return the commands that install exactly one distribution of onnxruntime, the right one."""
    installed = [entry.partition(" ")[0] for entry in _distributions()]
    remove = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    return f"Run: {remove}pip install {_requirement(ENGINE)}"


def changing_to_cuda() -> str:
    """Return the commands that put the onnxruntime for CUDA in the place of the one installed."""
    installed = [entry.partition(" ")[0] for entry in _distributions()]
    remove = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    return f"Run: {remove}pip install '{CUDA_ENGINE}' (for CUDA 13), or '{CUDA_12_ENGINE}'."


def runtime_distribution() -> str:
    """Return the distribution of onnxruntime that is installed, with its version."""
    return " and ".join(_distributions()) or "onnxruntime"


def _mending(name: str) -> str:
    if name == "onnxruntime":
        return mending()
    libraries = LIBRARIES.get(name, (name.replace("_", "-"),))
    wanted = " ".join(map(_requirement, libraries))
    return f"Run: pip install --upgrade --force-reinstall {wanted}"


def _requirement(name: str) -> str:
    """Return one of onnxqat's requirements, quoted for pip in a shell."""
    from importlib import metadata

    try:
        wanted = [r for r in metadata.requires("onnxqat") or () if r.startswith(name)]
        wanted = [r.partition(";")[0].strip() for r in wanted]
    except metadata.PackageNotFoundError:
        wanted = []
    exact = [r for r in wanted if not r[len(name)].isalnum() and r[len(name)] != "-"]
    text = exact[0] if exact else name
    return f"'{text}'" if "<" in text or ">" in text else text


def _distributions() -> list[str]:
    """Return the distributions, with versions, that install files into onnxruntime's folder."""
    spec = importlib.util.find_spec("onnxruntime")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = set()
    for folder in (Path(place).parent for place in places[:1]):
        for pattern in ("onnxruntime*.dist-info", "ort_*.dist-info", "onnxruntime*.egg-info"):
            found |= {_title(info) for info in folder.glob(pattern) if _holds_onnxruntime(info)}
    return sorted(found)


def _parted(title: str) -> tuple[str, str, str]:
    return title.partition(" ")


def _title(info: Path) -> str:
    name, _, version = info.stem.partition("-")
    return f"{name.replace('_', '-')} {version}".strip()


def _holds_onnxruntime(info: Path) -> bool:
    """Return whether a distribution contains the module (onnxruntime-extensions does not)."""
    try:
        record = info / "RECORD"
        if record.is_file():
            return "\nonnxruntime/__init__.py," in f"\n{record.read_text(encoding='utf-8')}"
        return (info / "top_level.txt").read_text(encoding="utf-8").strip() == "onnxruntime"
    except (OSError, ValueError):
        return False
