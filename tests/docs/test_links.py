"""Links between the documents lead somewhere: files exist, and so do the headings they point at."""

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tools.make_docs import documents

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DOCUMENTS = [*documents(ROOT), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def anchors(path: Path) -> set[str]:
    """Names of the headings, as the common Markdown renderers make them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name) if name else path
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            broken.append(target)
    assert not broken, f"{path.name}: links that lead nowhere: {broken}"
