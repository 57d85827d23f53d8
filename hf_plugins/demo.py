"""``mmhf demo``: find the repository's demo and run it; ``--all`` shows every method's quick start."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run the checkout's ``tools/demo.py`` or, with ``--all``, ``tools/demo_all.py``; gives the exit code."""
    rest = [word for word in argv if word != "--all"]
    name = "demo.py" if len(rest) == len(argv) else "demo_all.py"
    script = Path(__file__).resolve().parent.parent / "tools" / name
    if not script.is_file():
        sys.stderr.write(
            "mmhf demo: the demo's configs and pictures are part of the repository, not of the wheel. "
            "Clone the repository and run `make demo` there.\n"
        )
        return 2
    return runpy.run_path(str(script))["main"](rest)
