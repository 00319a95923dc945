"""The entry point of the program `onnxqat`."""

from __future__ import annotations

import sys

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, as in shells


def main() -> None:
    """Run the command line; an interruption during its import also ends with one line."""
    try:
        from onnxqat.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
    run(prog_name="onnxqat")  # also if it was started as 'python -m onnxqat'


if __name__ == "__main__":
    main()
