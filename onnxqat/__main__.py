"""The program `onnxqat`, from its first import on."""

from __future__ import annotations

import sys

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Run the command line; what interrupts its import is one line too."""
    try:
        from onnxqat.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
    run(prog_name="onnxqat")  # by whatever name Python was told to run it


if __name__ == "__main__":
    main()
