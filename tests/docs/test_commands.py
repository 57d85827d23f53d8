"""Every command line in the documents is understood by the program it names, and names files that exist."""

import configparser
import os
import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Command, commands
from tests.docs.parsing import FOREIGN, Parsed, entry_point, missing_paths, stop_after_parsing

# Commands without a Python parser of ours: mmengine's scripts and Flower's programs have tests of their own.
UNPARSED = re.compile(r"^(python tools/(mm|demo)\.py|flwr|flower-|openssl)")
STAND_INS = {"recipe.yaml": "configs/gradpruner/sms_spam.yaml"}


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that looks like the checkout, with stand-ins for the reader's own files."""
    for name in ("configs", "tests", "tools", "docs", "benchmarks", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, source in STAND_INS.items():
        (tmp_path / name).write_bytes((ROOT / source).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def _pip_extras(words: tuple[str, ...]) -> set[str]:
    return {
        extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")
    }


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command_is_understood(
    command: Command, newcomer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.words
    assert not missing_paths(words, [newcomer]), f"{command}: names files that do not exist"
    if words[0] == "make":
        assert words[1] in _make_targets(), f"{command}: no such target"
        return
    if words[0] == "pip":
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        assert _pip_extras(words) <= set(config["options.extras_require"]), f"{command}: no such extra"
    if words[0] in FOREIGN or UNPARSED.match(" ".join(words)):
        return
    run, arguments = entry_point(words)
    if words[:2] in (("mmhf", "doctor"), ("mmhf", "list")):
        assert run(arguments) in (0, 1)
        return
    if not arguments:
        assert callable(run)
        return
    stop_after_parsing(monkeypatch, arguments)
    try:
        with pytest.raises(Parsed):
            run(arguments)
    except SystemExit:
        pytest.fail(f"{command}: its parser refuses it: {capsys.readouterr().err[-500:]}")
    assert Path.cwd() == newcomer
    assert not [name for name in os.listdir(newcomer) if name == "work_dirs"], "parsing has done work"
