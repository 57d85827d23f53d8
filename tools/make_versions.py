"""Write docs/versions.md: which versions are allowed, tested and oldest, and under which licence they come.

Ranges are those of setup.cfg; tested is what is installed here (the versions of requirements/lock.txt);
oldest is requirements/oldest.txt, which ``make test-oldest`` writes after a pass. A licence is what the
package's own metadata say.
"""

import configparser
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.make_docs import markdown_table  # noqa: E402
from tools.oldest import normal  # noqa: E402

PAGE = ROOT / "docs" / "versions.md"
HEAD = """# Versions and licences

Python 3.11. Written by `python tools/make_versions.py`; do not edit. `mmhf doctor` tells what your machine
has.

Tested: what the tests of this state ran with. Oldest: the lowest versions within the ranges that fit
together; `make test-oldest` ran the Hugging Face side's tests with them. mmdet, mmseg and mmcv have one
version each.
"""
# What `make install` leaves out (test-extras installs it), as its metadata say.
ELSEWHERE = {"presidio-analyzer": "MIT", "spacy": "MIT", "tldextract": "BSD-3-Clause"}
NEED = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?(?P<range>.*)")


def allowed(setup_cfg: str) -> dict[str, list[tuple[str, str]]]:
    """Extra to its packages and their ranges, as setup.cfg has them."""
    config = configparser.ConfigParser()
    config.read_string(setup_cfg)
    found: dict[str, list[tuple[str, str]]] = {}
    for extra, lines in config["options.extras_require"].items():
        needs = (NEED.match(line.strip()) for line in lines.splitlines() if "mmhf-plugins" not in line)
        found[extra] = [(need["name"], need["range"] or "any") for need in needs if need]
    return {extra: needs for extra, needs in found.items() if needs}


def installed(name: str) -> str:
    """Version found here without its local part; of an extra outside of ``make install`` the locked one."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        locked = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
        return oldest_pins(locked).get(normal(name), "not installed")


def licence(name: str) -> str:
    """A package's licence in a few words, or ``not stated``."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return ELSEWHERE.get(normal(name), "not installed")
    if "License-Expression" in found:
        return found["License-Expression"]
    named = [c.split(" :: ")[-1] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [text for text in named if text != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = (found["License"] if "License" in found else "").strip()
    return text.splitlines()[0][:40] if text else "not stated"


def oldest_pins(text: str) -> dict[str, str]:
    """Package to version of a pins file."""
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


def page(setup_cfg: str, oldest: Mapping[str, str]) -> str:
    """The page, from setup.cfg and the oldest versions that passed."""
    parts = [HEAD]
    for extra, needs in allowed(setup_cfg).items():
        rows = []
        for name, bounds in needs:
            lowest = "-" if extra in ("mm", "dev") else oldest.get(normal(name), "-")
            rows.append([name, bounds, installed(name), lowest, licence(name)])
        table = markdown_table(["package", "allowed", "tested", "oldest", "licence"], rows)
        parts.append(f"## `{extra}`\n\n{table}\n")
    return "\n".join(parts)


def current() -> str:
    """The page as it should be now."""
    pins = ROOT / "requirements" / "oldest.txt"
    oldest = oldest_pins(pins.read_text(encoding="utf-8")) if pins.is_file() else {}
    return page((ROOT / "setup.cfg").read_text(encoding="utf-8"), oldest)


def main() -> int:
    """Write the page."""
    part = PAGE.with_suffix(".part")
    part.write_text(current(), encoding="utf-8")
    part.replace(PAGE)
    print(f"{PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
