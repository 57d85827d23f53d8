"""Write the empty doors and mirrored tests of a new room: ``make new-room PKG=hf_plugins NAME=my_method``."""

import argparse
import keyword
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mm_plugins", "hf_plugins")

README = """# {title}

## What it does

TODO: two sentences.

## Run

```bash
{command}
```

## Options

<!-- options:{module}.{config} -->
<!-- /generated -->

## Results

TODO: paper / ours / rival, each with command, seed, hardware; generated from docs/results/.

## Departures from the paper

## Limits

## Source and licence
"""

CORE = '''"""TODO: the paper's formula, as pure functions."""

from torch import Tensor


def {name}_score(x_ND: Tensor) -> Tensor:
    """TODO: one line that says what for.

    Args:
        x_ND: Values (N, D).

    Returns:
        Scores (N,).

    Source: TODO: paper, section or equation.
    """
    return x_ND.mean(dim=1)
'''

CONFIG = '''"""Options of {title}."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class {config}:
    """Options of {title}."""

    keep: float = field(default=0.5, metadata={{"help": "TODO: share that is kept, in [0, 1]."}})

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep must lie in [0, 1]; got {{self.keep}}. It is a share: 0.2 is 20 %.")
'''

HF_ADAPTER = '''"""TODO: the host object of {title}."""

from {module}.config import {config}


class {camel}Callback:
    """TODO: derive from the host's class and call the core."""

    def __init__(self, config: {config}) -> None:
        self.keep = config.keep
'''

MM_ADAPTER = '''"""TODO: the registered module of {title}."""

from torch import nn


class {camel}Loss(nn.Module):
    """TODO: register in the host's MODELS and call the core."""

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
'''

MAIN = '''"""Command line of {title}."""

import argparse
from collections.abc import Sequence

from hf_plugins.process_group import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, call the adapter, print."""
    parser = argparse.ArgumentParser(prog="mmhf {dashed}", description=__doc__)
    parser.parse_args(argv)
    return 0


if __name__ == "__main__":
    run_command(main)
'''

REFERENCE = '''"""The slow, literal formula: loops, float64, no tricks."""


def {name}_score(rows: list[list[float]]) -> list[float]:
    """Mean of each row, by hand."""
    return [sum(row) / len(row) for row in rows]
'''

TEST_CORE = '''"""Golden values and invariants of {title}."""

import torch

from {module}.score import {name}_score
from tests.{module} import reference


def test_against_the_literal_formula() -> None:
    rows = [[1.0, 2.0], [3.0, 5.0]]
    expected = torch.tensor(reference.{name}_score(rows), dtype=torch.float64)
    torch.testing.assert_close({name}_score(torch.tensor(rows, dtype=torch.float64)), expected)
'''

TEST_CONFIG = '''"""Options of {title}: ranges and messages."""

import pytest

from {module}.config import {config}


def test_share_out_of_range_says_how_to_write_it() -> None:
    with pytest.raises(ValueError, match="It is a share: 0.2 is 20 %"):
        {config}(keep=20)
'''

TEST_CALLBACK = '''"""The host object of {title}."""

from {module}.callback import {camel}Callback
from {module}.config import {config}


def test_takes_its_options() -> None:
    assert {camel}Callback({config}(keep=0.25)).keep == 0.25
'''

TEST_MAIN = '''"""Command line of {title}."""

from {module}.__main__ import main


def test_runs() -> None:
    assert main([]) == 0
'''

TEST_LOSS = '''"""The registered module of {title}."""

from {module}.loss import {camel}Loss


def test_keeps_its_weight() -> None:
    assert {camel}Loss(loss_weight=2.0).loss_weight == 2.0
'''

BENCHMARK = '''"""{title} against the best peer in the same run; writes docs/results/{name}.json."""
'''


def room_files(package: str, name: str) -> dict[str, str]:
    """Path (relative to the repository) -> content of everything a new room begins with."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    module, dashed = f"{package}.{name}", name.replace("_", "-")
    on_hf = package == "hf_plugins"
    config = f"{camel}Config" if on_hf else f"{camel}Loss"
    exported = f"{camel}Callback" if on_hf else config
    source = f"{module}.{'callback' if on_hf else 'loss'}"
    words = {
        "title": camel,
        "name": name,
        "camel": camel,
        "module": module,
        "dashed": dashed,
        "config": config,
        "command": f"mmhf {dashed}" if on_hf else f'python -c "import {module}"',
    }
    folder, tests = f"{package}/{name}", f"tests/{package}/{name}"
    names = sorted({config, exported})
    imports = f"from {source} import {exported}\n"
    if on_hf:
        imports += f"from {module}.config import {config}\n"
    listed = ", ".join(f'"{public}"' for public in names)
    files = {
        f"{folder}/__init__.py": f'"""TODO: {camel} in one line."""\n\n{imports}\n__all__ = [{listed}]\n',
        f"{folder}/README.md": README,
        f"{folder}/score.py": CORE,
        f"{tests}/__init__.py": "",
        f"{tests}/reference.py": REFERENCE,
        f"{tests}/test_score.py": TEST_CORE,
        f"benchmarks/{name}.py": BENCHMARK,
        f"configs/{name}/README.md": f"Configs of {camel}.\n",
    }
    if on_hf:
        files |= {
            f"{folder}/config.py": CONFIG,
            f"{folder}/callback.py": HF_ADAPTER,
            f"{folder}/__main__.py": MAIN,
            f"{tests}/test_config.py": TEST_CONFIG,
            f"{tests}/test_callback.py": TEST_CALLBACK,
            f"{tests}/test_main.py": TEST_MAIN,
        }
    else:
        files |= {f"{folder}/loss.py": MM_ADAPTER, f"{tests}/test_loss.py": TEST_LOSS}
    literal = {path for path in files if path.endswith(("__init__.py", "configs/README.md"))}
    return {path: text if path in literal else text.format(**words) for path, text in files.items()}


def write_room(package: str, name: str, root: Path = ROOT) -> list[str]:
    """Write the files of a new room and its entry in the paper index; returns what was written.

    Raises:
        ValueError: If the package or the name cannot be a room.
        FileExistsError: If the room is there already; nothing is written then.
    """
    if package not in PACKAGES:
        raise ValueError(f"PKG must be one of {', '.join(PACKAGES)}; got {package!r}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"NAME must be a Python module name such as my_method; got {name!r}.")
    if (root / package / name).exists():
        raise FileExistsError(f"{package}/{name} exists; choose another NAME or remove that folder first.")
    files = room_files(package, name)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    index = root / "docs" / "paper_index.md"
    entry = f"\n## {name}\n\n- Room: `{package}/{name}`. TODO: paper, settings, departures, its test.\n"
    index.write_text(index.read_text(encoding="utf-8") + entry, encoding="utf-8")
    return [*files, "docs/paper_index.md"]


def main(argv: Sequence[str]) -> int:
    """Parse, write, tell what comes next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", metavar="PKG", help="mm_plugins or hf_plugins")
    parser.add_argument("name", metavar="NAME", help="module name of the room, such as my_method")
    args = parser.parse_args(argv)
    try:
        written = write_room(args.package, args.name)
    except (ValueError, FileExistsError) as error:
        print(f"new-room: {error}", file=sys.stderr)
        return 2
    print("\n".join(written))
    print("Next: docs/add_a_method.md, step 3; `make docs` fills the README's options.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
