import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hf_plugins.autodp.storage import META, Cache, Journal, only_search, settle_run
from tests.contract.rooms import ROOT

TABLE = Dataset.from_dict({"a": [1, 2, 3]})


def test_a_table_is_built_once(tmp_path: Path) -> None:
    cache, built = Cache(tmp_path), []

    def build() -> tuple[Dataset, dict]:
        built.append(1)
        return TABLE, {"x": 5}

    for _ in range(2):
        table, note = cache.table("k", build)
        assert table["a"] == [1, 2, 3]
        assert note["x"] == 5
    assert Cache(tmp_path).table("k", build)[1] == {"x": 5, "num_rows": 3}
    assert len(built) == 1
    assert (cache.hits, cache.misses) == (1, 1)
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == ["k"]
    Cache(tmp_path, reuse=False).table("k", build)
    assert len(built) == 2


@pytest.mark.parametrize("damage", ["rows", "meta", "gone"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.table("k", lambda: (TABLE, {}))
    place = tmp_path / "tables" / "k"
    (arrow,) = (place / "rows").glob("data-*.arrow")
    if damage == "rows":
        arrow.write_bytes(arrow.read_bytes()[:-1] + b"x")
    elif damage == "meta":
        (place / META).write_text("{half")
    else:
        arrow.unlink()
    assert cache.table("k", lambda: (TABLE, {}))[0]["a"] == [1, 2, 3]
    assert cache.misses == 2


def test_evaluations_and_their_damage(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.evaluation("e") is None
    cache.store_evaluation("e", {"losses": [1.5]})
    assert cache.evaluation("e") == {"losses": [1.5]}
    assert Cache(tmp_path, reuse=False).evaluation("e") is None
    path = tmp_path / "evaluations" / "e.json"
    path.write_text(path.read_text().replace("1.5", "0.5"))
    assert cache.evaluation("e") is None
    path.write_text("{")
    assert cache.evaluation("e") is None


def test_journal_survives_a_cut_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    assert journal.entries() == []
    journal.append({"kind": "trial", "n": 1})
    with journal.path.open("a") as file:
        file.write('{"kind": "trial", "n"')
    journal.append({"kind": "reply", "text": "一"})
    assert journal.entries("trial") == [{"kind": "trial", "n": 1}]
    assert [entry["kind"] for entry in journal.entries()] == ["trial", "reply"]


def test_two_searches_in_one_folder(tmp_path: Path) -> None:
    with only_search(tmp_path), pytest.raises(RuntimeError, match="give this one an --out of its own"):
        with only_search(tmp_path):
            pass
    with only_search(tmp_path):
        pass


def test_a_killed_search_lets_go_of_its_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hf_plugins.autodp.storage import only_search\n"
        "with only_search(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match="another search is working"), only_search(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with only_search(tmp_path):
        pass


def test_other_settings_are_refused(tmp_path: Path) -> None:
    assert not settle_run(tmp_path, {"seed": 1})
    assert settle_run(tmp_path, {"seed": 1})
    with pytest.raises(ValueError, match=" holds a search with other settings: .*seed differ"):
        settle_run(tmp_path, {"seed": 2})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="away to start anew"):
        settle_run(tmp_path, {"seed": 1})


def test_two_processes_build_an_entry_once(tmp_path: Path) -> None:
    """The second waits for the first and reads what it wrote."""
    code = (
        "import sys, time; from pathlib import Path; from datasets import Dataset\n"
        "from hf_plugins.autodp.storage import Cache\n"
        "def build():\n    time.sleep(1); return Dataset.from_dict({'a': [1]}), {}\n"
        "cache = Cache(Path(sys.argv[1])); cache.table('k', build); print(cache.misses)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert sum(int(process.communicate(timeout=100)[0].split()[-1]) for process in both) == 1
