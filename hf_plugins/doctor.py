"""``mmhf doctor``: what is installed and expected, what serves ``mmcv.ops``, how to mend the rest."""

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

DISTRIBUTION = "mmhf-plugins"
# An extra is "in use" when its host is there; an untouched extra is no fault of the machine.
HOSTS = {"mm": ("mmengine", "mmdet"), "hf": ("transformers",), "federated": ("flwr",), "data": ("lancedb",)}


@dataclass(kw_only=True)
class PackageState:
    """One requirement of an extra and what this environment has."""

    name: str
    needed: str
    found: str | None

    @property
    def fits(self) -> bool:
        """Whether the installed version lies in the tested range."""
        return self.found is not None and Requirement(f"{self.name}{self.needed}").specifier.contains(
            self.found, prereleases=True
        )


@dataclass(kw_only=True)
class Report:
    """Everything ``mmhf doctor`` prints; ``--json`` writes it as it is."""

    suite: str
    python: str
    devices: list[str]
    extras: dict[str, list[PackageState]]
    in_use: list[str]
    op_backend: str = "not checked: the extra mm is not complete"
    ops: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements_by_extra() -> dict[str, list[PackageState]]:
    """The requirements of every extra, as the installed metadata of this suite states them."""
    extras: dict[str, list[PackageState]] = {}
    for line in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        if "extra ==" not in marker or requirement.name == DISTRIBUTION:
            continue
        extra = marker.split("extra ==")[1].strip().strip("\"'")
        state = PackageState(
            name=requirement.name, needed=str(requirement.specifier), found=_installed(requirement.name)
        )
        extras.setdefault(extra, []).append(state)
    return extras


def install_line(extra: str) -> str:
    """The one line that installs an extra: with the lock file in a checkout, from the index otherwise."""
    root = Path(__file__).resolve().parent.parent
    if (root / "requirements" / "lock.txt").is_file():
        return f'pip install -c requirements/lock.txt -e ".[{extra}]"'
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def _devices() -> list[str]:
    devices = [f"CPU: {os.cpu_count()} cores ({platform.machine()})"]
    if _installed("torch") is None:
        return [*devices, "CUDA: unknown, torch is not installed"]
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return [*devices, f"CUDA: none (torch {torch.__version__})"]
    names = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return [*devices, *(f"CUDA {index}: {name}" for index, name in enumerate(names))]


def _probe_ops(report: Report) -> None:
    """Import the OpenMMLab side for real: versions in range do not prove that it loads."""
    try:
        compat = importlib.import_module("mm_plugins.compat")
        importlib.import_module("mm_plugins")
        importlib.import_module("mmdet.models")
        importlib.import_module("mmseg.models")
    except (ImportError, AssertionError, RuntimeError, OSError) as error:
        report.op_backend = "none"
        report.faults.append(f"mm_plugins does not import: {type(error).__name__}: {error}")
        return
    report.ops = compat.op_backends()
    if not compat.STANDIN_SERVES:
        report.op_backend = "compiled mmcv._ext"
        return
    by_torchvision = sum(backend == "torchvision" for backend in report.ops.values())
    report.op_backend = (
        f"portable ops of mm_plugins.compat ({len(report.ops) - by_torchvision} ops)"
        + (f", torchvision ({by_torchvision} ops)" if by_torchvision else "")
        + "; others raise and say how to get them"
    )


def examine(asked: Sequence[str] = ()) -> Report:
    """Look at this environment.

    Args:
        asked: Extras to hold complete; empty means those whose host is installed.

    Returns:
        The report; ``faults`` is empty when all that is needed is there.
    """
    extras = requirements_by_extra()
    in_use = list(asked) or [extra for extra, hosts in HOSTS.items() if any(map(_installed, hosts))]
    report = Report(
        suite=metadata.version(DISTRIBUTION),
        python=platform.python_version(),
        devices=_devices(),
        extras=extras,
        in_use=in_use,
    )
    for extra in in_use:
        bad = [state for state in extras[extra] if not state.fits]
        if bad:
            names = ", ".join(f"{state.name}{state.needed} (found {state.found})" for state in bad)
            report.faults.append(f"extra {extra}: {names}. Mend: {install_line(extra)}")
    if not in_use:
        lines = " or ".join(install_line(extra) for extra in ("mm", "hf"))
        report.faults.append(f"no host is installed: neither OpenMMLab nor Hugging Face. Mend: {lines}")
    if "mm" in in_use and all(state.found for state in extras["mm"]):
        _probe_ops(report)
    return report


def _package_line(state: PackageState) -> str:
    mark = "ok" if state.fits else ("missing" if state.found is None else "out of range")
    return f"  {state.name:<18} found {state.found or '-':<14} expected {state.needed:<14} {mark}"


def format_report(report: Report, *, verbose: bool = False) -> str:
    """The report as lines of text, one package a line, faults last."""
    lines = [f"{DISTRIBUTION} {report.suite}, Python {report.python}", *report.devices]
    for extra, states in report.extras.items():
        missing = [state.name for state in states if state.found is None]
        wrong = [state.name for state in states if state.found is not None and not state.fits]
        verdict = "complete" if not missing and not wrong else f"install: {install_line(extra)}"
        lines.append(f"\nextra {extra}: {verdict}")
        lines += [_package_line(state) for state in states]
    lines.append(f"\nmmcv.ops served by: {report.op_backend}")
    if verbose:
        lines += [f"  {name:<34} {backend}" for name, backend in sorted(report.ops.items())]
    lines.append("")
    lines += [f"FAULT: {fault}" for fault in report.faults] or ["All that is in use is complete."]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the report; exit code 1 if something needed is missing or out of range."""
    parser = argparse.ArgumentParser(prog="mmhf doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--ops", action="store_true", help="list every mmcv op and its backend")
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        help="hold this extra complete (repeatable); default: those whose host is installed",
    )
    args = parser.parse_args(argv)
    unknown = set(args.extra) - set(requirements_by_extra())
    if unknown:
        known = ", ".join(requirements_by_extra())
        parser.error(f"--extra {', '.join(sorted(unknown))} is unknown; choose from {known}.")
    report = examine(args.extra)
    text = json.dumps(asdict(report), indent=1) if args.json else format_report(report, verbose=args.ops)
    sys.stdout.write(text + "\n")
    return 1 if report.faults else 0
