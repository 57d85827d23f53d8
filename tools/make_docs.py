"""Fill the generated parts of README and docs: ``make docs`` writes them, ``--check`` fails when one is
stale.

A generated part stands between two markers, ``<!-- results:NAME -->`` (the table of
``docs/results/NAME.json``), ``<!-- options:NAME -->`` (the arguments of a public class or function of the
README's own room) or ``<!-- overview:methods -->`` and ``<!-- overview:figures -->`` (all methods, from
``docs/claims.toml`` and the result files it points at), and ``<!-- /generated -->``.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
PART = re.compile(r"(<!-- (results|options|overview):([\w.]+) -->\n).*?(<!-- /generated -->)", flags=re.S)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with four digits."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def results_part(name: str, root: Path) -> str:
    """The table of one result file, with the command, the machine and the versions below it.

    Raises:
        FileNotFoundError: If the file is missing: a table without its measurement is not shown.
    """
    path = root / "docs" / "results" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; run the benchmark that writes it, or drop the marker"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    notes = [f"- {note}" for note in record.get("notes", [])]
    return "\n".join(
        [
            markdown_table(record["table"]["columns"], record["table"]["rows"]),
            "",
            *notes,
            f"- Repeat: `{record['command']}` (seeds {seeds}).",
            f"- Measured on {record['hardware']}; {versions}"
            + (f"; commit {record['commit']}." if "commit" in record else "."),
        ]
    )


def _figure(figure: dict[str, Any], root: Path) -> dict[str, str]:
    """One figure of ``docs/claims.toml`` with the cells it points at filled in.

    Raises:
        ValueError: If the result file has no such row or column; the message lists those it has.
    """
    path = root / "docs" / "results" / f"{figure['file']}.json"
    if not path.is_file():
        raise FileNotFoundError(f"docs/claims.toml asks for {path.name}; run the benchmark that writes it.")
    record = json.loads(path.read_text(encoding="utf-8"))
    columns, rows = record["table"]["columns"], record["table"]["rows"]
    cells = {}
    for key in ("ours", "peer"):
        if key not in figure:
            cells[key] = ""
            continue
        row, column, *text = figure[key]
        begins = [row] if isinstance(row, str) else row
        found = [line for line in rows if [str(cell) for cell in line[: len(begins)]] == begins]
        if len(found) != 1 or column not in columns:
            raise ValueError(
                f"docs/claims.toml: {len(found)} rows of {figure['file']}.json begin with {begins} "
                f"(one must), columns are {columns}, asked for {column!r}; rows: {rows}. Correct the entry."
            )
        value = _cell(found[0][columns.index(column)])
        cells[key] = text[0].format(value) if text else f"{' '.join(begins)}: {value}"
    how = f"{len(record['seeds'])} seed{'s' * (len(record['seeds']) > 1)}"
    return cells | {
        "what": figure["what"],
        "how": f"{how}, {record['hardware']}, commit {record.get('commit', 'not recorded')}",
        "command": f"`{record['command']}`",
    }


def _first(figure: dict[str, str]) -> str:
    """A method's first figure in a cell, with what it was compared with in the same run."""
    rival = f"; {figure['peer']}" if figure["peer"] else ""
    return f"{figure['what']}: **{figure['ours']}**{rival}"


def overview_part(kind: str, root: Path, document: Path) -> str:
    """All methods in one table, from ``docs/claims.toml``: ``methods`` for a first look, ``figures`` in full.

    Args:
        kind: Which of the two.
        root: The repository.
        document: The document that shows it, which links are relative to.

    Raises:
        ValueError: If the kind is unknown.
    """
    methods = tomllib.loads((root / "docs" / "claims.toml").read_text(encoding="utf-8"))["method"]
    up = "../" * (len(document.relative_to(root).parts) - 1)
    if kind == "methods":
        rows = []
        for method in methods:
            figures = [_figure(figure, root) for figure in method.get("figure", [])]
            first = _first(figures[0]) if figures else "not measured yet"
            link = f"[{method['name']}]({up}{method['room']}/README.md)"
            rows.append([link, method["gives"], f"{first} ([all]({up}{method['room']}/README.md#results))"])
        return markdown_table(["method", "what it gives you", "measured here: **ours**; compared with"], rows)
    if kind != "figures":
        raise ValueError(f"an overview is of methods or figures; got {kind!r}. Correct the marker.")
    rows = [
        [method["name"], method["paper"], f["what"], f["ours"], f["peer"], f["how"], f["command"]]
        for method in methods
        for f in (_figure(figure, root) for figure in method.get("figure", []))
    ]
    head = ["method", "the paper says", "here, on", "ours", "best other in the same run", "how", "repeat"]
    return markdown_table(head, rows)


def _argument_help(docstring: str) -> dict[str, str]:
    """What an ``Args:`` section says of each argument."""
    section = re.search(
        r"^\s*Args:\n(.*?)(?=^\s*\w[\w ]*:\n|\Z)", inspect.cleandoc(docstring), flags=re.S | re.M
    )
    if section is None:
        return {}
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", section.group(1), flags=re.S | re.M)
    return {name: " ".join(text.split()) for name, text in found}


def options_part(dotted: str) -> str:
    """The options of a dataclass (its ``help`` texts) or of a constructor (its ``Args:`` section)."""
    module, name = dotted.rsplit(".", 1)
    target = getattr(importlib.import_module(module), name)
    # A config of transformers is a dataclass of options of its own besides those that its constructor names.
    if dataclasses.is_dataclass(target) and not hasattr(target, "model_type"):
        rows = [
            (f"`{f.name}`", f"`{_default(f)}`", f.metadata.get("help", ""))
            for f in dataclasses.fields(target)
        ]
        return markdown_table(["option", "default", "meaning"], rows)
    documented = _argument_help(target.__doc__ or "") | _argument_help(
        getattr(target.__init__, "__doc__", "") or ""
    )
    rows = [
        (
            f"`{p.name}`",
            "required" if p.default is p.empty else f"`{p.default!r}`",
            documented.get(p.name, ""),
        )
        for p in inspect.signature(target).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    return markdown_table(["option", "default", "meaning"], rows)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def render(text: str, *, module: str, root: Path, document: Path | None = None) -> str:
    """A document with its generated parts filled; ``document`` is where it stands (default: the root)."""

    def fill(match: re.Match[str]) -> str:
        head, kind, name, tail = match.groups()
        if kind == "results":
            body = results_part(name, root)
        elif kind == "overview":
            body = overview_part(name, root, document or root / "README.md")
        else:
            body = options_part(name if "." in name else f"{module}.{name}")
        return f"{head}{body}\n{tail}"

    return PART.sub(fill, text)


def documents(root: Path) -> list[Path]:
    """Every Markdown file that may hold generated parts."""
    patterns = ("README.md", "docs/*.md", "mm_plugins/*/README.md", "hf_plugins/*/README.md")
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def _rendered(path: Path, root: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    module = ".".join(path.relative_to(root).parent.parts)
    return text, render(text, module=module, root=root, document=path)


def stale_files(root: Path) -> list[str]:
    """Documents whose generated parts differ from what their sources give today."""
    pairs = {path: _rendered(path, root) for path in documents(root)}
    return [str(path.relative_to(root)) for path, (old, new) in pairs.items() if old != new]


def main(argv: Sequence[str]) -> int:
    """Write the generated parts, or with ``--check`` only tell which are stale."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    args = parser.parse_args(argv)
    stale = stale_files(ROOT)
    if args.check:
        print("\n".join(f"stale: {name} (run `make docs`)" for name in stale) or "docs are current")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(_rendered(ROOT / name, ROOT)[1], encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
