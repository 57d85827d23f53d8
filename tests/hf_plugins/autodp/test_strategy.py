import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from hf_plugins.autodp import strategy as room
from hf_plugins.autodp.config import AutoDPConfig
from hf_plugins.autodp.dataset import ANSWER, DIRTY, QUESTION, read_rows
from hf_plugins.autodp.strategies import OPERATORS, Space
from hf_plugins.autodp.strategy import AutoDP, read_recipe, screener_from_json, screener_json
from hf_plugins.autodp.trainer import EvaluationError, TrainJob
from hf_plugins.data_ops.chat import ScriptedChat
from tests.contract.rooms import ROOT
from tests.hf_plugins.autodp.tiny import PAIRS, by_table, demo, rows, write_jsonl

SMALL = {
    "metric": "loss",
    "num_dev": 10,
    "num_test": 10,
    "num_anchors": 4,
    "sample_ratio": 1.0,
    "use_cpu": True,
}
LLM = '{"question": "What is new?", "answer": "A new thing that is good for all."}'


def longest(table: Dataset) -> float:
    """The score of rows in tests by table: the share of rows that are unlike the planted stub."""
    return float(np.mean([answer != "stub" for answer in table[ANSWER]]))


def stubs() -> Dataset:
    """36 rows to process, every third a stub that CLEAN drops."""
    return rows([(q, "stub" if i % 3 == 0 else a) for i, (q, a) in enumerate(PAIRS)])


def tuner(model: Path, monkeypatch: pytest.MonkeyPatch, seen: list | None = None, **options: Any) -> AutoDP:
    extra = {name: options.pop(name) for name in ("agent", "values", "cache") if name in options}
    clients = options.pop("clients", {"default": ScriptedChat(lambda _: LLM)})
    if steps := options.pop("steps", ""):
        # Fewer steps, fewer strategies: what is tested there does not depend on their number.
        space = Space(tuple(Space().spec(name) for name in steps.split()))
        monkeypatch.setattr(AutoDP, "space", lambda self: space)
    monkeypatch.setattr(room, "evaluate", by_table(longest, seen))
    values = SMALL | {"select": "deita", "min_tokens": 20, "num_synthetic": 4} | options
    return AutoDP(model, AutoDPConfig(**values), clients=clients, **extra)


@pytest.mark.host
def test_a_search_on_spoilt_rows_beats_the_raw_data(tmp_path: Path) -> None:
    """Half of the rows are garbled, boilerplate or copies; CLEAN or SELECT must win on questions never
    used.
    """
    data = demo(tmp_path / "demo")
    options = SMALL | {
        "num_dev": 24,
        "num_test": 24,
        "num_anchors": 8,
        "isolate": False,
        "search": "exhaustive",
    }
    options |= {"num_steps": 16, "batch_size": 8, "device_batch_size": 8, "learning_rate": 5e-3, "lora_r": 0}
    options |= {
        "max_length": 96,
        "min_tokens": 8,
        "less_checkpoints": 1,
        "less_warmup": 0.2,
        "projection_dim": 256,
    }
    held = {"dev": data / "dev.jsonl", "test": data / "test.jsonl"}
    result = AutoDP(data / "model", AutoDPConfig(**options)).search(
        data / "rows.jsonl", tmp_path / "run", **held
    )
    assert {trial["strategy"] for trial in result["trials"]} == {
        "clean",
        "select",
        "clean>select",
        "select>clean",
    }
    assert result["chosen"][0] in ("clean", "select")
    assert result["final"]["low"] > 0
    assert result["rows"] == {"train": 96, "sample": 96, "dev": 24, "test": 24, "anchors": 8}
    # 5 trainings of the search (one of the raw data), 2 of the report.
    assert result["counts"]["trainings"] == 7
    assert result["counts"]["team_runs"] == 4
    assert result["config"]["seed"] == 42
    # On all rows, as a user would.
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    tuned = AutoDP(recipe["model"], AutoDPConfig(**recipe["config"]), cache=tmp_path / "run" / "cache")
    applied = tuned.apply(recipe, data / "rows.jsonl", tmp_path / "applied")
    assert len(read_rows(tmp_path / "applied" / "rows.jsonl")) == len(applied) < 96
    note = json.loads((tmp_path / "applied" / "applied.json").read_text())
    assert note["rows_before"] == 96
    assert note["rows"] == len(applied)


@pytest.mark.host
def test_exhaustive_runs_65_trainings_and_64_steps(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainJob] = []
    search = tuner(model_folder, monkeypatch, seen, search="exhaustive")
    result = search.search(stubs(), tmp_path / "run")
    assert len(seen) == result["counts"]["trainings"] <= 65 + 2
    assert result["counts"]["team_runs"] == 64
    assert len(result["trials"]) == 64
    assert "clean" in result["chosen_key"]
    assert result["final"]["score"] > 0.2
    again = search.search(stubs(), tmp_path / "run")
    assert again["chosen"] == result["chosen"]
    assert again["counts"]["trainings"] == 0


def test_every_strategy_gets_the_same_number_of_updates(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainJob] = []
    tuner(model_folder, monkeypatch, seen, search="random", num_strategies=3).search(
        stubs(), tmp_path / "run"
    )
    assert {(job.num_steps, job.budget, job.batch_size) for job in seen} == {(100, 1.0, 32)}
    # The report trains with another seed.
    assert {job.seed for job in seen} == {42, 1042}


def test_halving_goes_on_from_its_own_weights(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainJob] = []
    search = tuner(model_folder, monkeypatch, seen, search="halving", steps="clean generate")
    result = search.search(stubs(), tmp_path / "run")
    trials = [trial["budget"] for trial in result["trials"]]
    assert [trials.count(budget) for budget in (0.25, 0.5, 1.0)] == [4, 1, 1]
    folders = {job.out for job in seen if job.budget == 1.0 and job.seed == 42}
    assert folders <= {job.out for job in seen if job.budget == 0.25}
    assert all(job.keep == (job.budget < 1) for job in seen)


def test_an_agent_search_with_a_resumed_run(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run asks the agent nothing and trains nothing, and ends with the same choice."""
    seen: list[TrainJob] = []
    search = tuner(model_folder, monkeypatch, seen, agent={"kind": "heuristic"}, search="agent")
    first = search.search(stubs(), tmp_path / "run")
    count = len(seen)
    silent = tuner(model_folder, monkeypatch, seen, agent=ScriptedChat([]), search="agent")
    second = silent.search(stubs(), tmp_path / "run")
    assert (second["chosen"], len(seen)) == (first["chosen"], count)
    assert first["stopped"] == "final"
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("reply") == len(first["rounds"])


def test_no_row_reaches_the_agent(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unique text in every row of every part; no 12 characters of it in what the agent was sent."""
    canaries = [f"c{i:03d}-{i * 7919:08x}-{i * 104729:08x}" for i in range(60)]
    table = rows([(f"{PAIRS[i][0]} {c}", f"{c} {PAIRS[i][1]}") for i, c in enumerate(canaries)])
    replies = [
        json.dumps({"strategies": [["clean"], [canaries[0]]], "reason": canaries[1]}),
        '{"final": ["clean"]}',
    ]
    agent = ScriptedChat(replies)
    tuner(model_folder, monkeypatch, agent=agent, search="agent").search(table, tmp_path / "run")
    sent = "".join(message["content"] for request in agent.requests for message in request)
    cells = [cell for row in table for cell in (row[QUESTION], row[ANSWER])]
    pieces = {cell[i : i + 12] for cell in cells for i in range(len(cell) - 11)}
    assert len(agent.requests) == 2
    assert not pieces & {sent[i : i + 12] for i in range(len(sent) - 11)}


def test_a_crashing_evaluation_ends_one_strategy_only(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = by_table(longest)

    def evaluate(job: TrainJob, **options: Any) -> dict[str, Any]:
        if len(load_from_disk(job.rows)) > 40:
            raise EvaluationError("out of memory")
        return good(job, **options)

    search = tuner(model_folder, monkeypatch, search="exhaustive", num_synthetic=8, steps="clean generate")
    monkeypatch.setattr(room, "evaluate", evaluate)
    result = search.search(stubs(), tmp_path / "run")
    failed = {trial["strategy"] for trial in result["trials"] if trial.get("failed")}
    assert "generate" in failed
    assert "clean" not in failed
    assert {trial["score"] for trial in result["trials"] if trial.get("failed")} == {-1.0}
    assert result["chosen"]


def test_a_raw_training_that_fails_ends_the_search(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(job: TrainJob, **options: Any) -> dict[str, Any]:
        raise EvaluationError("the evaluation failed twice")

    search = tuner(model_folder, monkeypatch, search="random")
    monkeypatch.setattr(room, "evaluate", evaluate)
    with pytest.raises(EvaluationError, match="failed twice"):
        search.search(stubs(), tmp_path / "run")


def test_a_strategy_that_leaves_no_rows_is_scored_as_failed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tuner(model_folder, monkeypatch, search="exhaustive", min_tokens=2000, steps="clean")
    found = empty.search(stubs(), tmp_path / "run")
    assert found["trials"][0]["failed"] == "no rows are left"
    assert found["chosen"] == []


def test_winrate_with_a_judge(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge likes answers "good", which only strategies without stubs give."""

    def judge(messages: list[dict[str, str]]) -> str:
        text = messages[0]["content"]
        if "Response 1" not in text:
            return LLM
        first, second = ("Response 1: good" in text, "Response 2: good" in text)
        return "win" if first > second else "lose" if first < second else "tie"

    def evaluate(job: TrainJob, **options: Any) -> dict[str, Any]:
        answer = "good" if "stub" not in load_from_disk(job.rows)[ANSWER] else "bad"
        assert job.max_new_tokens == 512
        count = len(load_from_disk(job.questions))
        return {"answers": [answer] * count, "losses": [1.0] * count, "seconds": {"train": 0, "gen": 0}}

    client = ScriptedChat(judge)
    search = tuner(model_folder, monkeypatch, clients={"default": client}, steps="clean generate")
    search.config.search = "exhaustive"
    search.config.metric = "winrate"
    monkeypatch.setattr(room, "evaluate", evaluate)
    result = search.search(stubs(), tmp_path / "run")
    scores = {trial["strategy"]: trial["score"] for trial in result["trials"]}
    assert scores["clean"] == 1.0
    assert scores["generate"] == 0.0
    assert result["chosen_key"] == "clean"
    assert result["final"]["score"] == 1.0


def test_a_metric_of_ones_own(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def values(result: dict[str, Any], raw: dict[str, Any]) -> np.ndarray:
        return np.full(10, -0.5)

    options = {"values": values, "search": "random", "num_strategies": 2}
    result = tuner(model_folder, monkeypatch, **options).search(stubs(), tmp_path / "run")
    assert {trial["score"] for trial in result["trials"]} == {-0.5}
    assert result["chosen"] == []


def test_screening_by_a_teacher(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher sees training rows only; OPTIMIZE then asks about flagged rows only."""

    def reply(messages: list[dict[str, str]]) -> str:
        text = messages[0]["content"]
        return ("yes" if "\nAnswer: stub" in text else "no") if "need rewriting" in text else LLM

    many = [
        (f"{q} Variant {v}?", "stub" if (i + v) % 3 == 0 else a)
        for v in range(4)
        for i, (q, a) in enumerate(PAIRS)
    ]
    client = ScriptedChat(reply)
    search = tuner(model_folder, monkeypatch, clients={"default": client}, search="random", steps="optimize")
    search.config.screening, search.config.num_strategies = "teacher", 1
    search.search(rows(many), tmp_path / "run")
    asked = [r[0]["content"] for r in client.requests if "need rewriting" in r[0]["content"]]
    held = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert len(asked) == 240 - 24
    assert held["config"]["screening"] == "teacher"
    screener = screener_from_json(json.loads((tmp_path / "run" / "screener.json").read_text()))
    assert screener.auc > 0.95
    assert json.dumps(screener_json(screener)) == json.dumps(
        screener_json(screener_from_json(screener_json(screener)))
    )
    rewritten = [r[0]["content"] for r in client.requests if "Rewrite" in r[0]["content"]]
    assert rewritten
    assert sum("\nAnswer: stub" in text for text in rewritten) / len(rewritten) > 0.9
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe["screener"].endswith("screener.json")
    out = search.apply(recipe | {"strategy": ["optimize"]}, rows(many[:30]), tmp_path / "applied")
    assert DIRTY in out.column_names


def test_screening_by_a_column(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"search": "random", "num_strategies": 2}
    table = stubs().add_column("bad", [a == "stub" for a in stubs()[ANSWER]])
    search = tuner(model_folder, monkeypatch, screening="column", screening_column="bad", **few)
    assert search.search(table, tmp_path / "run")["trials"]
    with pytest.raises(ValueError, match="screening='column' needs a column .*bad"):
        search.search(stubs(), tmp_path / "other")


def test_steps_without_a_model_to_ask_are_left_out(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert AutoDP(model_folder, AutoDPConfig(metric="loss")).space().names == ("clean", "select")
    assert "step 'generate' is left out" in caplog.text
    ops = AutoDP(model_folder, AutoDPConfig(metric="loss", space="ops", select="deita")).space()
    assert ops.max_length == 6
    assert "perplexity" in ops.names
    assert "optimize" not in ops.names


@pytest.mark.parametrize("name", [spec.name for spec in OPERATORS])
def test_every_operator_of_the_large_space_runs(
    tmp_path: Path, model_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tuner(model_folder, monkeypatch, space="ops", less_checkpoints=1, projection_dim=32, lora_r=2)
    rows(PAIRS[:3]).save_to_disk(str(tmp_path / "anchors"))
    table = rows(PAIRS[:8])
    space = made.space()
    options = {"anchors": str(tmp_path / "anchors"), "history": False, "synthetic": 1, "num_rows": 8}
    from hf_plugins.data_ops.op import OpContext

    context = OpContext(clients={"default": ScriptedChat(lambda _: LLM)})
    for op in made.step_ops(space.step(name), max_rows=1000, **options):
        table = op.run(table, context)
    expected = {"select_less": 4, "select_deita": 3, "perplexity": 8, "synthesize": 12, "length": 8}
    if name in expected:
        assert len(table) == expected[name]
    else:
        assert len(table) >= 1


def test_two_searches_of_one_cache_share_their_tables(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainJob] = []
    common = {"cache": tmp_path / "shared", "steps": "clean generate"}
    first = tuner(model_folder, monkeypatch, seen, search="exhaustive", **common)
    first.search(stubs(), tmp_path / "a")
    count = len(seen)
    second = tuner(model_folder, monkeypatch, seen, search="random", num_strategies=3, **common)
    result = second.search(stubs(), tmp_path / "b")
    assert result["counts"]["team_runs"] == 0
    assert all(trial["stored"] for trial in result["trials"])
    # Only the report of another winner may need new trainings.
    assert len(seen) - count <= 1


def test_other_settings_in_an_old_folder(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner(model_folder, monkeypatch, search="random", num_strategies=1).search(stubs(), tmp_path / "run")
    with pytest.raises(ValueError, match="config differ"):
        tuner(model_folder, monkeypatch, search="random", num_strategies=2).search(stubs(), tmp_path / "run")


def test_what_is_refused_before_work(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="give the folder that save_pretrained wrote"):
        AutoDP(tmp_path)
    far = {"writer": {"kind": "openai", "base_url": "https://api.example.com/v1", "model": "m"}}
    with pytest.raises(ValueError, match="allow it with remote_data"):
        AutoDP(model_folder, AutoDPConfig(metric="loss", clients=far))
    with pytest.raises(ValueError, match="a Dataset needs columns question and answer"):
        AutoDP(model_folder).search(Dataset.from_dict({"x": [1]}), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="writes recipe.yaml into its folder"):
        read_recipe(tmp_path / "no.yaml")
    (tmp_path / "r.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="it has no key 'strategy'"):
        read_recipe(tmp_path / "r.yaml")


KILLED = """
import sys, time
from pathlib import Path
from tests.hf_plugins.autodp import tiny
from tests.hf_plugins.autodp.test_strategy import SMALL, longest, stubs
from hf_plugins.autodp import strategy as room
from hf_plugins.autodp.config import AutoDPConfig

out, log = Path(sys.argv[2]), Path(sys.argv[3])
table = tiny.by_table(longest)
def evaluate(job, **options):
    with log.open("a") as file:
        file.write(Path(job.out).name + str(job.budget) + "\\n")
    time.sleep(float(sys.argv[4]))
    return table(job, **options)
room.evaluate = evaluate
options = {"search": "random", "num_strategies": 4, "min_tokens": 20, "select": "deita", "num_synthetic": 4}
config = AutoDPConfig(**SMALL | options)
from hf_plugins.data_ops.chat import ScriptedChat
reply = '{"question": "What is new?", "answer": "A new thing that is good for all."}'
clients = {"default": ScriptedChat(lambda _: reply)}
room.AutoDP(sys.argv[1], config, clients=clients).search(stubs(), out)
"""


@pytest.mark.host
def test_killed_between_evaluations_and_resumed(tmp_path: Path, model_folder: Path) -> None:
    """SIGKILL after two trials; the second run repeats no training that had ended and chooses what an
    uninterrupted run chooses. The journal only grows.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log, out = tmp_path / "log", tmp_path / "run"

    def start(folder: Path, note: Path, pause: str) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(model_folder), str(folder), str(note), pause]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)

    process = start(out, log, "0.5")
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if journal.is_file() and journal.read_text().count('"trial"') >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_text()
    ended = before.count('"trial"')
    assert 2 <= ended < 4
    assert start(out, log, "0").wait(timeout=400) == 0
    assert start(tmp_path / "plain", tmp_path / "log2", "0").wait(timeout=400) == 0
    assert journal.read_text().startswith(before)
    trained = log.read_text().split()
    # At most the one that was under way is trained twice.
    assert len(trained) - len(set(trained)) <= 1
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "plain")]
    assert results[0]["chosen"] == results[1]["chosen"]
    assert [t["score"] for t in results[0]["trials"]] == [t["score"] for t in results[1]["trials"]]


def test_files_as_data(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"ask": q, "answer": a} for q, a in PAIRS])
    search = tuner(model_folder, monkeypatch, search="random", num_strategies=1)
    assert search.search(data, tmp_path / "run")["rows"]["train"] == 36
    assert search.confirm(Space().strategy(["clean"]), data, tmp_path / "c")["questions"] == 10
