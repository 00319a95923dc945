"""Feed broken and odd inputs to the command line, and check that each command ends well.

    python scripts/mutate.py [--count N] [--seed S] [--jobs J] [--work DIR] [--only INDEX]

`mutants` makes each mutant from the bundled models and test graphs. ``insert`` runs on it in a
child process, forked from a parent that has imported everything; one mutant in ten also goes to
``finetune``. A mutant ends well if the exit code is 0, 1 or 2, an error has one line and no
traceback, no signal ended a process, and the command took at most 20 s and 4 GB. The others are
listed, and their files are kept in DIR. A mutant depends only on the seed and its index: ``--only``
makes one again and prints the output of its commands.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import mutants
import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests' graphs

from tests.exported import EXPORTED, exported  # noqa: E402

SECONDS, BYTES = 20, 4 * 2**30
GUARD_BYTES = 16 * 2**30  # limit of address space, to protect the machine
SAMPLES = 40
RULES = (
    *("onnxruntime-cpu", "sophgo-bm1684x", "tensorrt", "qnn-htp", "esp32-p4", "horizon-bayes"),
    *("tflite", "cambricon-mlu", "openvino", "ncnn"),
)
KINDS = (
    "model",
    "model",
    "model",
    "bytes",
    "qdq",
    "qdq",
    "metadata",
    "external",
    "data",
    "options",
)


class Outcome(NamedTuple):
    """How one command ended."""

    words: list[str]
    verdict: str  # "" if it ended well
    code: int
    seconds: float
    bytes: int
    stderr: str


BUNDLED = ("lenet5", "mobilenet-digits", "spans")
# A graph with constructs that the others lack: branches, loops, functions, recurrent layers.
RARE = """
<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
rare (float[N, 8] x) => (float[N, 8] y)
<float[8, 8] w, float[8] b, bool cond = {1}, int64 trips = {2},
 float[1, 16, 8] lw, float[1, 16, 4] lr>
{
    h = MatMul(x, w)
    a = ours.twice(h)
    c = If (cond) <then_branch = t () => (float[N, 8] p) { p = Relu(a) },
                   else_branch = e () => (float[N, 8] q) { q = Add(a, b) }>
    d = Loop (trips, cond, c) <
        body = l (int64 i, bool go, float[N, 8] s) => (bool on, float[N, 8] u)
        { on = Identity(go) u = Mul(s, b) }
    >
    axes = Constant <value_ints = [0]> ()
    f = Unsqueeze(d, axes)
    g, g1, g2 = LSTM <hidden_size = 4> (f, lw, lr)
    k = Squeeze(g)
    y = Softmax(d)
}
<domain: "ours", opset_import: ["" : 17]>
twice (x) => (y) { y = Add(x, x) }
"""


def sound_models() -> dict[str, onnx.ModelProto]:
    """Return the valid models to mutate, by name."""
    rare = onnx.parser.parse_model(RARE)
    rng = np.random.default_rng(0)
    for tensor in rare.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = rng.normal(size=tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    bundled = {stem: onnx.load(ROOT / "models" / f"{stem}.onnx") for stem in BUNDLED}
    return bundled | {name: exported(name) for name in EXPORTED} | {"rare": rare}


def write_data(model: onnx.ModelProto, path: Path, seed: int) -> None:
    """Write random samples for the inputs of a model."""
    rng = np.random.default_rng(seed)
    initializers = {t.name for t in model.graph.initializer}
    arrays: dict[str, Any] = {}
    for value in model.graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        sizes = [d.dim_value if d.dim_value > 0 else 16 for d in kind.shape.dim[1:]]
        shape = (SAMPLES, *sizes)
        whole = kind.elem_type in (TensorProto.INT64, TensorProto.INT32)
        drawn = rng.integers(0, 2, shape) if whole else rng.normal(size=shape).astype(np.float32)
        arrays[value.name] = drawn
    np.savez(path, **arrays)


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(number) / f"{number}.png")


class Trial:
    """Makes mutants, and runs the commands on them."""

    def __init__(self, work: Path, seed: int, seconds: float, *, show: bool) -> None:
        self.work, self.seed, self.seconds, self.show = work, seed, seconds, show
        self.parts = work / "parts"
        self.names: list[str] = []

    def prepare(self) -> None:
        """Write the valid inputs for mutants: Q/DQ files of the bundled models, images, data."""
        self.parts.mkdir(parents=True, exist_ok=True)
        write_images(self.parts / "images")
        for name, model in sound_models().items():
            write_data(model, self.parts / f"{name}.npz", 0)
            onnx.save(model, self.parts / f"{name}.onnx")
            onnx.save(model, self.parts / f"{name}.external.onnx", save_as_external_data=True,
                      location=f"{name}.weights", size_threshold=64)  # fmt: skip
            self.names.append(name)
        for name in BUNDLED:
            data = str(self.parts / f"{name}.npz")
            target = str(self.parts / f"{name}.qdq.onnx")
            words = ["insert", str(self.parts / f"{name}.onnx"), "--data", data, "-o", target]
            outcome = self.run(words, self.parts)
            if outcome.code:
                raise SystemExit(f"mutate: {outcome.stderr}")

    def mutant(self, index: int) -> tuple[str, list[Outcome]]:
        """Make mutant ``index`` in a new folder and run it; return its description and outcomes."""
        rng = random.Random(f"{self.seed}/{index}")
        folder = self.work / f"{index:06}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = rng.choice(KINDS)
        what, model, data = getattr(self, f"_{kind}")(folder, rng)
        finetune = index % 10 == 0
        outcomes = []
        for words in self._commands(kind, model, data, rng, finetune=finetune):
            outcomes.append(self.run(words, folder))
            if outcomes[-1].code or outcomes[-1].verdict:
                break
        if not any(outcome.verdict for outcome in outcomes) and not self.show:
            shutil.rmtree(folder, ignore_errors=True)
        return f"{kind}: {what}", outcomes

    def _commands(
        self, kind: str, model: str, data: str, rng: random.Random, *, finetune: bool
    ) -> list[list[str]]:
        tune = ["finetune", "--epochs", "1", "--threads", "1", "-o", "tuned.onnx"]
        if kind in ("qdq", "metadata"):
            others = (
                ["strip", model, "-o", "chip"],
                ["export", model, "--format", "onnxruntime", "-o", "e.onnx"],
                ["evaluate", model, data, "--label", "none"],
                ["calibrate", model, data, "-o", "c.onnx"],
                ["insert", model, "-o", "q.onnx"],
            )
            return [[*tune, model, data]] if finetune else [rng.choice(others)]
        insert = ["insert", model, "--rules", rng.choice(RULES), "-o", "q.onnx", "--threads", "1"]
        calibrates = finetune or kind in ("data", "options") or rng.random() < 0.5
        if calibrates:
            insert += ["--data", data, "--observer", "minmax"]
        if kind == "options":
            insert += mutants.random_options(rng, training=False)
            tune += mutants.random_options(rng, training=True)
        return [insert, [*tune, "q.onnx", data]] if finetune else [insert]

    def _model(self, folder: Path, rng: random.Random) -> tuple[str, str, str]:
        name = rng.choice(self.names)
        model = onnx.load(self.parts / f"{name}.onnx")
        what = mutants.change_model(model, rng)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        return f"{name}: {what}", "m.onnx", str(self.parts / f"{name}.npz")

    def _bytes(self, folder: Path, rng: random.Random) -> tuple[str, str, str]:
        name = rng.choice(self.names)
        data, what = mutants.change_bytes((self.parts / f"{name}.onnx").read_bytes(), rng)
        (folder / "m.onnx").write_bytes(data)
        return f"{name}: {what}", "m.onnx", str(self.parts / f"{name}.npz")

    def _qdq(self, folder: Path, rng: random.Random, *, text: bool = False) -> tuple[str, str, str]:
        stem = rng.choice(BUNDLED)
        model = onnx.load(self.parts / f"{stem}.qdq.onnx")
        change = mutants.change_metadata if text else mutants.change_model
        what = change(model, rng)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        return f"{stem}: {what}", "m.onnx", str(self.parts / f"{stem}.npz")

    def _metadata(self, folder: Path, rng: random.Random) -> tuple[str, str, str]:
        return self._qdq(folder, rng, text=True)

    def _external(self, folder: Path, rng: random.Random) -> tuple[str, str, str]:
        stem = rng.choice(BUNDLED)
        model = onnx.load(self.parts / f"{stem}.external.onnx", load_external_data=False)
        shutil.copy(self.parts / f"{stem}.weights", folder)
        (folder / "link").symlink_to("/etc/passwd")
        what = mutants.change_external(model, rng)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        return f"{stem}: {what}", "m.onnx", str(self.parts / f"{stem}.npz")

    def _data(self, folder: Path, rng: random.Random) -> tuple[str, str, str]:
        if rng.random() < 0.5:
            shutil.copytree(self.parts / "images", folder / "images")
            what = mutants.change_images(folder / "images", rng)
            return what, str(self.parts / "lenet5.onnx"), "images"
        name = rng.choice(self.names)
        shutil.copy(self.parts / f"{name}.npz", folder / "data.npz")
        what = mutants.change_arrays(folder / "data.npz", rng)
        return what, str(self.parts / f"{name}.onnx"), "data.npz"

    def _options(self, folder: Path, rng: random.Random) -> tuple[str, str, str]:
        del folder
        stem = rng.choice(BUNDLED)
        model = str(self.parts / f"{stem}.onnx")
        return stem, model, str(self.parts / f"{stem}.npz")

    def run(self, words: list[str], folder: Path) -> Outcome:
        """Run one command in a child process; return its outcome."""
        started = time.monotonic()
        log = folder / "stderr"
        child = os.fork()
        if not child:
            _become_command(words, folder, log)
        hung = not _ended(child, self.seconds)
        if hung:
            os.killpg(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - started
        _kill_left_over(child)
        stderr = log.read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * 1024
        verdict = "hang" if hung else _verdict(code, peak, stderr)
        if self.show:
            print(" ".join(words), stderr, f"exit code {code}, {seconds:.1f} s {verdict}", sep="\n")
        return Outcome(words, verdict, code, seconds, peak, stderr)


def _become_command(words: list[str], folder: Path, log: Path) -> None:
    """Run the command line in the child process; never return."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (GUARD_BYTES, GUARD_BYTES))
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.argv = ["onnxqat", *words]
        from onnxqat.cli import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _ended(child: int, seconds: float) -> bool:
    """Wait at most this long for a child; return whether it ended."""
    descriptor = os.pidfd_open(child)
    try:
        import select

        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _kill_left_over(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _verdict(code: int, peak: int, stderr: str) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    if "Traceback (most recent call last)" in stderr:
        return "traceback"
    if peak > BYTES:
        return "memory"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if code and not stderr.strip():
        return "no message"
    return ""


def warm() -> None:
    """Import everything that the commands need, so that a child need not."""
    import onnxqat.calibration
    import onnxqat.cli
    import onnxqat.data
    import onnxqat.deploy
    import onnxqat.evaluation
    import onnxqat.foreign
    import onnxqat.overrides
    import onnxqat.preparation
    import onnxqat.progress
    import onnxqat.rules
    import onnxqat.train  # noqa: F401


def drive(trial: Trial, indices: range, results: Path) -> None:
    """Run some mutants; write one line of JSON for each."""
    with results.open("w") as file:
        for index in indices:
            try:
                what, outcomes = trial.mutant(index)
            except (ValueError, TypeError, OSError, EncodeError, DecodeError) as error:
                what, outcomes = f"cannot be made ({error})", []
            rows = [outcome._asdict() for outcome in outcomes]
            file.write(json.dumps({"index": index, "what": what, "outcomes": rows}) + "\n")
            file.flush()


def report(work: Path, seconds: float) -> int:
    """Print the results; return the number of mutants that ended badly."""
    rows = [json.loads(line) for p in sorted(work.glob("results-*")) for line in p.open()]
    ends: collections.Counter[str] = collections.Counter()
    bad = []
    for row in rows:
        for outcome in row["outcomes"]:
            ends[outcome["words"][0], outcome["verdict"] or f"exit {outcome['code']}"] += 1
        if any(outcome["verdict"] for outcome in row["outcomes"]):
            bad.append(row)
    for row in sorted(bad, key=lambda row: row["index"]):
        last = row["outcomes"][-1]
        message = (last["stderr"].strip().splitlines() or [""])[-1]
        print(
            f"{row['index']:>6}  {last['verdict']:<12} {last['words'][0]:<10} {row['what'][:100]}"
        )
        print(f"        {message[:200]}")
    for (command, end), count in sorted(ends.items()):
        print(f"{count:>6}  {command:<10} {end}")
    outcomes = [outcome for row in rows for outcome in row["outcomes"]]
    slowest = max((o["seconds"] for o in outcomes), default=0)
    largest = max((o["bytes"] for o in outcomes), default=0)
    ended = f"{len(rows)} mutants in {seconds:.0f} s, {len(bad)} ended badly"
    print(f"{ended}; slowest command {slowest:.1f} s, largest {largest / 2**30:.2f} GB")
    return len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000, help="mutants (default 3000)")
    parser.add_argument("--start", type=int, default=0, help="first index (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"limit of a command (default {SECONDS})"
    )
    parser.add_argument("--work", type=Path, help="folder for mutants (default: a temporary one)")
    parser.add_argument("--only", type=int, help="make only this mutant, and keep it")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="mutants-"))
    work = work.resolve()
    warm()
    trial = Trial(work, given.seed, given.seconds, show=given.only is not None)
    shutil.rmtree(work / "parts", ignore_errors=True)
    trial.prepare()
    if given.only is not None:
        print(trial.mutant(given.only)[0])
        return 0
    for old in work.glob("results-*"):
        old.unlink()
    started = time.monotonic()
    last = given.start + given.count
    drivers = []
    for job in range(given.jobs):
        driver = os.fork()
        if not driver:
            drive(trial, range(given.start + job, last, given.jobs), work / f"results-{job}")
            os._exit(0)
        drivers.append(driver)
    for driver in drivers:
        os.waitpid(driver, 0)
    bad = report(work, time.monotonic() - started)
    print(f"kept in {work}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
