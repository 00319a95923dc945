"""Kill commands at random times and at exact system calls; check that nothing is lost or mixed.

    python scripts/kill_trial.py [--random 30] [--exact 40] [--seed 0]

Each trial prepares a folder with the outputs A of an earlier run, starts a command with --force
that replaces them by B, and kills it (SIGKILL). Then these conditions must hold, at any moment:

- Each output is that of A or that of B, byte for byte, and readable; a table may be missing.
- A table or external data belong to the model beside them.
- The same command (with --resume if there is a checkpoint) ends with B, byte for byte.
- After that no temporary file is left, neither beside the outputs nor in TMPDIR.

Exact kills: strace kills the command at the start of one chosen system call. Candidates are the
calls that change a folder or the end of a file (rename, unlink, mkdir, rmdir, fsync, ftruncate); a
first run without a kill counts them.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODELS = Path(__file__).parents[1] / "models"
CALLS = "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,ftruncate"
# Lower the size limits, so that models have external data, which are then tested too.
LARGE = "import onnxqat.model as m; m.MAX_PROTOBUF_BYTES = 2**24; m.MAX_INLINE_ELEMENTS = 64\n"
START = "from onnxqat.cli import main; main()"
NORM = ("--mean", "128", "--scale", "0.0078125")


@dataclass(frozen=True)
class Job:
    """One command that writes into ``out/``; A and B are its outputs for two inputs."""

    name: str
    words: tuple[str, ...]  # {0} is the letter of the input
    code: str = START

    def command(self, letter: str, *more: str) -> list[str]:
        words = [word.format(letter) for word in self.words]
        return [sys.executable, "-c", self.code, *words, "--force", *more]


JOBS = (
    Job(
        "finetune",
        (
            *("finetune", "{0}.onnx", "train.npz", "--epochs", "2", "--threads", "1"),
            *("--checkpoint-every", "5steps", "--log", "out/log.jsonl", "-o", "out/m.onnx"),
        ),
    ),
    Job("strip", ("strip", "{0}.onnx", "-o", "out")),
    Job("strip with data", ("strip", "{0}.onnx", "-o", "out"), LARGE + START),
    Job(
        "export",
        ("export", "{0}.onnx", "--format", "onnxruntime", "-o", "out/m.onnx"),
        LARGE + START,
    ),
)


class Trial:
    """A folder with the inputs and outputs of the jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.temporary = folder, folder / "out", folder / "tmp"
        self.temporary.mkdir()
        self.environment = os.environ | {"TMPDIR": str(self.temporary)}
        with np.load(MODELS / "digits-train.npz") as digits:
            images, labels = digits["images"][:120], digits["label"][:120]
        np.savez_compressed(folder / "train.npz", images=images, label=labels)
        for letter, bits in (("A", 8), ("B", 6)):  # so that weights and tables differ
            model = str(MODELS / "mobilenet-digits.onnx")
            words = ("--rules", "sophgo-bm1684x", "--data", "train.npz", *NORM)
            more = ("--set", f"weight.bits={bits}", "-o", f"{letter}.onnx")
            self.run([sys.executable, "-c", START, "insert", model, *words, *more])
        self.expected = {
            (job.name, letter): self.made(job, letter) for job in JOBS for letter in "AB"
        }

    def run(self, command: list[str]) -> None:
        subprocess.run(
            command, cwd=self.folder, env=self.environment, check=True, capture_output=True
        )

    def made(self, job: Job, letter: str) -> dict[str, bytes]:
        self.fresh(None, job)
        self.run(job.command(letter))
        return self.outputs()

    def outputs(self) -> dict[str, bytes]:
        """Return the files in the folder of outputs, except the log, which contains times."""
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in sorted(self.out.rglob("*"))
            if path.is_file() and path.name != "log.jsonl"
        }

    def fresh(self, letter: str | None, job: Job) -> None:
        """Put A's or B's outputs in the folder."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        for name, content in self.expected[job.name, letter].items() if letter else ():
            (self.out / name).write_bytes(content)

    def check(self, job: Job) -> str:
        """Return what the kill left: A, B, or one without its table; raise if they are mixed."""
        left = {n: b for n, b in self.outputs().items() if not n.startswith(".onnxqat-")}
        left.pop("m.onnx.checkpoint", None)
        a, b = self.expected[job.name, "A"], self.expected[job.name, "B"]
        model = next(name for name in a if name.endswith(".onnx"))
        assert model in left, f"lost: the model; left is {sorted(left)}"
        letter = "A" if left[model] == a[model] else "B"
        whole = a if letter == "A" else b
        others = b if letter == "A" else a
        for name, content in left.items():
            if name.endswith(".data") and name not in whole:  # no model refers to it
                assert content == others[name] or letter == "A"
                continue
            assert content == whole[name], f"mixed: {name} does not belong to model {letter}"
        for name in whole:
            if name.endswith(".data"):
                assert name in left, f"lost: external data of model {letter}"
        missing = sorted(name for name in whole if name not in left)
        return letter + "".join(f" without {name}" for name in missing)

    def finish(self, job: Job) -> None:
        """Run the command again; check that it ends with B and leaves nothing else."""
        resume = ("--resume",) if (self.out / "m.onnx.checkpoint").exists() else ()
        self.run(job.command("B", *resume))
        found, wanted = self.outputs(), self.expected[job.name, "B"]
        assert found.keys() == wanted.keys(), f"left: {sorted(found.keys() ^ wanted.keys())}"
        assert found == wanted, "the repeated command wrote other bytes"
        assert not list(self.out.glob(".onnxqat-*"))
        assert not list(self.temporary.glob("onnxqat-*")), "left in TMPDIR"

    def calls(self, job: Job) -> list[str]:
        """Return the names of the relevant calls of the command's main thread, in order."""
        self.fresh("A", job)
        trace = self.folder / "trace"
        self.run(["strace", "-qq", "-o", str(trace), "-e", f"trace={CALLS}", *job.command("B")])
        return [line.partition("(")[0] for line in trace.read_text().splitlines()]

    def killed_at_call(self, job: Job, calls: list[str], index: int) -> bool:
        """Kill the command at the start of a call; strace counts calls by name."""
        self.fresh("A", job)
        name, number = calls[index], calls[: index + 1].count(calls[index])
        inject = f"inject={name}:signal=KILL:when={number}"
        command = ["strace", "-qq", "-o", os.devnull, "-e", inject, *job.command("B")]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, check=False
        )
        return done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)

    def seconds(self, job: Job) -> float:
        started = time.monotonic()
        self.made(job, "B")
        return time.monotonic() - started

    def killed_after(self, job: Job, seconds: float) -> bool:
        self.fresh("A", job)
        with subprocess.Popen(
            job.command("B"), cwd=self.folder, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as running:  # fmt: skip
            time.sleep(seconds)
            running.kill()
        return running.returncode == -signal.SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=30)
    parser.add_argument("--exact", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        calls = {job.name: trial.calls(job) for job in JOBS}
        seconds = {job.name: trial.seconds(job) for job in JOBS}
        for kind, count in (("exact", given.exact), ("random", given.random)):
            for number in range(count):
                job = JOBS[number % len(JOBS)]
                if kind == "exact":  # spread over all calls of the command
                    place = (number // len(JOBS) + rng.random()) / -(-count // len(JOBS))
                    index = int(place * len(calls[job.name]))
                    killed = trial.killed_at_call(job, calls[job.name], index)
                    where = f"{calls[job.name][index]}, call {index + 1} of {len(calls[job.name])}"
                else:
                    killed = False
                    while not killed:  # repeat if the command ended before the kill
                        after = rng.uniform(0.2, 1.0) * seconds[job.name]
                        killed = trial.killed_after(job, after)
                    where = f"after {after:.2f} s"
                left = trial.check(job)
                trial.finish(job)
                state = "killed" if killed else "ended before"
                print(f"{kind} {number + 1}: {job.name}, {where}: {state}, left {left}", flush=True)
    print("nothing lost, nothing mixed, nothing left")


if __name__ == "__main__":
    main()
