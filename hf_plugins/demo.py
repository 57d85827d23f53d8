"""``mmhf demo``: find the repository's demo and run it."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run ``tools/demo.py`` of the checkout this suite is installed from; returns its exit code."""
    script = Path(__file__).resolve().parent.parent / "tools" / "demo.py"
    if not script.is_file():
        sys.stderr.write(
            "mmhf demo: the demo's configs and pictures are part of the repository, not of the wheel. "
            "Clone the repository and run `make demo` there.\n"
        )
        return 2
    return runpy.run_path(str(script))["main"](list(argv))
