"""The console command: lists rooms without importing them, hands over, says what is wrong with a word."""

import sys
from pathlib import Path

import pytest

from hf_plugins import cli


def _room(root: Path, name: str, *, command: str | None) -> None:
    folder = root / "hf_plugins" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('"""What it is for."""\n')
    if command is not None:
        (folder / "__main__.py").write_text(command)


def test_rooms_are_found_by_their_folders(tmp_path: Path) -> None:
    _room(tmp_path, "toy_method", command="")
    _room(tmp_path, "rounds", command=None)
    assert cli.find_rooms(tmp_path) == [
        cli.Room("toy-method", "hf_plugins.toy_method", "What it is for.", has_command=True)
    ]


def test_list_names_every_room(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["list"]) == 0
    assert "pkd" in capsys.readouterr().out


def test_no_command_prints_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 2
    assert "methods (`mmhf METHOD --help`" in capsys.readouterr().out


def test_misspelt_method_gets_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["dotcor"]) == 2
    assert "Did you mean 'doctor'?" in capsys.readouterr().err


@pytest.fixture
def toy_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A room outside of the suite whose command is what the test writes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _toy(root: Path, name: str, command: str | None) -> cli.Room:
    (root / name).mkdir()
    (root / name / "__init__.py").write_text("")
    if command is not None:
        (root / name / "__main__.py").write_text(command)
    return cli.Room("toy", name, "", has_command=command is not None)


def test_arguments_reach_the_room(toy_room: Path) -> None:
    room = _toy(toy_room, "toy_ok", "def main(argv):\n    return len(argv)\n")
    assert cli._dispatch("toy", ["a", "b", "c"], [room]) == 3
    sys.modules.pop("toy_ok.__main__")


def test_missing_package_names_the_extra(toy_room: Path, capsys: pytest.CaptureFixture) -> None:
    room = _toy(toy_room, "toy_lacks", "import a_package_that_is_not_there\n")
    assert cli._dispatch("toy", [], [room]) == 1
    error = capsys.readouterr().err
    assert "needs the package 'a_package_that_is_not_there'" in error
    assert 'pip install "mmhf-plugins[hf]"' in error


def test_a_room_with_an_extra_of_its_own_names_it(toy_room: Path, capsys: pytest.CaptureFixture) -> None:
    room = _toy(toy_room, "toy_tee", "import a_package_that_is_not_there\n")._replace(name="tee-split")
    assert cli._dispatch("tee-split", [], [room]) == 1
    assert 'pip install "mmhf-plugins[hf,tee]"' in capsys.readouterr().err


def test_what_the_package_says_is_missing_is_passed_on(toy_room: Path, capsys: pytest.CaptureFixture) -> None:
    room = _toy(toy_room, "toy_says", "raise ImportError('install the extra mm')\n")
    assert cli._dispatch("toy", [], [room]) == 1
    assert capsys.readouterr().err == "mmhf: install the extra mm\n"


def test_room_without_command_says_where_to_look(toy_room: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli._dispatch("toy", [], [_toy(toy_room, "toy_mute", None)]) == 2
    assert "used through a config of its host" in capsys.readouterr().err


def test_an_interruption_is_one_line(
    toy_room: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = _toy(toy_room, "toy_stopped", "def main(argv):\n    raise KeyboardInterrupt\n")
    monkeypatch.setattr(cli, "find_rooms", lambda: [room])
    assert cli.main(["toy"]) == 130
    assert "mmhf: interrupted" in capsys.readouterr().err


def test_a_package_missed_while_running_names_the_extra_too(
    toy_room: Path, capsys: pytest.CaptureFixture
) -> None:
    room = _toy(toy_room, "toy_late", "def main(argv):\n    import no_such_package\n")
    assert cli._dispatch("toy", [], [room]) == 1
    assert "needs the package 'no_such_package'" in capsys.readouterr().err
    own = _toy(toy_room, "toy_broken", "def main(argv):\n    import hf_plugins.no_such_module\n")
    with pytest.raises(ModuleNotFoundError):
        cli._dispatch("toy", [], [own])
