"""The documentation site: links turned, pictures taken along, built strictly."""

from pathlib import Path

import pytest

from tools import make_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    room = tmp_path / "mm_plugins" / "toy"
    room.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "faq.md").write_text("[home](../README.md)")
    (room / "plot.png").write_bytes(b"png")
    (room / "README.md").write_text("[faq](../../docs/faq.md#no-network) ![plot](plot.png) [code](loss.py)")
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("[toy](mm_plugins/toy/README.md) [away](https://b.org) [here](#top)")
    return tmp_path


def test_links_are_turned_to_where_the_pages_lie(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    assert "methods/toy.md" in make_site.write_pages(repository, folder)
    expected = "[faq](../faq.md#no-network) ![plot](../pictures/mm_plugins_toy_plot.png) code"
    assert (folder / "methods/toy.md").read_text() == expected
    assert (folder / "pictures/mm_plugins_toy_plot.png").read_bytes() == b"png"
    assert (folder / "index.md").read_text() == "[toy](methods/toy.md) [away](https://b.org) [here](#top)"
    assert (folder / "faq.md").read_text() == "[home](index.md)"


@pytest.mark.host
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """A link to a page or heading that is missing, or a page outside the menu, fails the build."""
    assert make_site.main(["--out", str(tmp_path / "site")]) == 0
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "methods/pkd.html" in start
    assert "https://fonts" not in start, "the site opens without network"
