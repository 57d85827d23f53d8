"""Build the documentation site: the READMEs of the repository and its methods, and docs/, as one set.

Nothing is written twice: pages are copies of the Markdown files with their links turned to where the pages
lie on the site. Links to files that are no page (configs, code) become plain text. mkdocs builds the result
strictly, so a page or heading that is missing fails the build.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
IMAGES = (".jpg", ".png", ".svg")


def pages(root: Path) -> dict[str, str]:
    """Site path of each Markdown file, both relative."""
    found = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    found |= {str(path.relative_to(root)): path.name for path in sorted((root / "docs").glob("*.md"))}
    for package in ("mm_plugins", "hf_plugins"):
        for path in sorted((root / package).glob("*/README.md")):
            found[str(path.relative_to(root))] = f"methods/{path.parent.name}.md"
    return found


def relink(text: str, source: str, where: dict[str, str], root: Path) -> tuple[str, dict[str, str]]:
    """A page's text with its links turned, and the pictures that it shows as ``{file: site path}``.

    Args:
        text: Markdown.
        source: Its path below the root.
        where: Site path of each Markdown file.
        root: The repository.
    """
    images: dict[str, str] = {}
    here = Path(where[source]).parent

    def turn(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        name, _, anchor = target.partition("#")
        path = os.path.normpath(Path(source).parent / name)
        if path in where:
            link = os.path.relpath(where[path], here)
            return f"{bang}[{label}]({link}{'#' + anchor if anchor else ''})"
        if bang and path.endswith(IMAGES) and (root / path).is_file():
            images[path] = f"pictures/{path.replace('/', '_')}"
            return f"![{label}]({os.path.relpath(images[path], here)})"
        return label

    return LINK.sub(turn, text), images


def write_pages(root: Path, folder: Path) -> list[str]:
    """Write every page and picture below ``folder``; returns the site paths of the pages."""
    shutil.rmtree(folder, ignore_errors=True)
    where = pages(root)
    for source, page in where.items():
        text, images = relink((root / source).read_text(encoding="utf-8"), source, where, root)
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        for picture, place in images.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / picture, folder / place)
    return list(where.values())


def main(argv: Sequence[str]) -> int:
    """Write the pages and let mkdocs build them; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the built site")
    args = parser.parse_args(argv)
    written = write_pages(ROOT, ROOT / "build" / "site_pages")
    print(f"{len(written)} pages -> {args.out}", flush=True)
    command = [sys.executable, "-m", "mkdocs", "build", "-f", "docs/mkdocs.yml", "--strict", "--quiet"]
    command += ["--site-dir", str(args.out.resolve())]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
