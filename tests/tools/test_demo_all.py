"""The tour over all methods: every room has a stop, one stop runs, a broken one is named."""

import json
import re
from pathlib import Path

import pytest

from tests.contract.rooms import rooms
from tools import demo_all
from tools.demo_all import STOPS, Stop, main, printed_lines

QUICK = Stop(
    room="hf_plugins/quick",
    title="A quick one",
    commands=("python -c \"print('figure 42')\"",),
    figure=r"figure (\d+)",
    says="It is {}.",
    picture=printed_lines("figure"),
)
BROKEN = Stop(
    room="hf_plugins/broken",
    title="A broken one",
    commands=("python -c \"raise SystemExit('no such file')\"",),
    figure="",
    says="",
    picture=printed_lines(""),
)


def test_every_room_has_a_stop() -> None:
    assert {stop.room for stop in STOPS} == {f"{room.package}/{room.name}" for room in rooms()}


def test_page_holds_the_figure_and_a_second_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_all, "STOPS", (QUICK,))
    assert main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "It is 42." in page
    assert "<pre>figure 42</pre>" in page
    record = tmp_path / "quick.json"
    kept = json.loads(record.read_text()) | {"printed": "figure 43"}
    record.write_text(json.dumps(kept))
    assert main(["--out", str(tmp_path)]) == 0
    assert "It is 43." in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_stop_that_fails_is_named_and_the_others_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_all, "STOPS", (BROKEN, QUICK))
    assert main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "hf_plugins/broken" in said
    assert "ended with exit code 1:\nno such file" in said
    assert "It is 42." in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not (tmp_path / "broken.json").exists()


def test_a_figure_that_was_not_printed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the stop needs mending"):
        demo_all.section(QUICK, {"printed": "nothing", "seconds": 1.0}, tmp_path)


def test_unknown_room_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "nowhere"])
    assert "--only knows" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_tour(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<section>") == len(STOPS)
    # Names of XML spaces are no addresses that anything is loaded from.
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page)
