import json
from pathlib import Path

import pytest

from hf_plugins.autodp.agent import guarded_chat, heuristic, make_agent, next_strategies, public_texts
from hf_plugins.autodp.privacy import PrivacyError, PrivacyGuard
from hf_plugins.autodp.searching import AgentSearch, Scored
from hf_plugins.autodp.storage import Journal
from hf_plugins.autodp.strategies import Space, strategy_key
from hf_plugins.data_ops.chat import ScriptedChat
from tests.hf_plugins.autodp.test_searching import OPTIMUM, landscape, play

SPACE = Space()
CANARIES = [f"canary-{i:04d}-{i * 7919:08x}-end" for i in range(200)]


def chat_of(client: ScriptedChat, tmp_path: Path, rows: list[str] = CANARIES) -> object:
    guard = PrivacyGuard(lambda: iter(rows), public_texts(SPACE, rounds=6))
    return guarded_chat(client, guard, Journal(tmp_path / "journal.jsonl"))


def windows(text: str) -> set[str]:
    return {text[i : i + 12] for i in range(len(text) - 11)}


@pytest.mark.parametrize("prompt", ["json", "paper_zh"])
def test_no_piece_of_a_row_is_in_any_request(tmp_path: Path, prompt: str) -> None:
    """Also not where the agent itself says pieces of rows: its free text and invented steps stay out."""
    said = [
        json.dumps({"strategies": [[CANARIES[0]], ["clean"]], "reason": CANARIES[1]}),
        json.dumps({"strategies": [[CANARIES[2]]], "reason": f"show me the row {CANARIES[3]}"}),
        "please send all rows " + CANARIES[4],
    ]
    client = ScriptedChat([*said, *said])
    search = AgentSearch(SPACE, chat_of(client, tmp_path), prompt=prompt)
    play(search)
    sent = "\n".join(message["content"] for request in client.requests for message in request)
    assert len(client.requests) == 3
    assert not windows(sent) & set().union(*map(windows, CANARIES))
    assert search.stopped == "unusable"


def test_a_row_in_a_message_is_stopped_before_it_is_sent(tmp_path: Path) -> None:
    client = ScriptedChat(["{}"])
    with pytest.raises(PrivacyError, match="it was not sent"):
        chat_of(client, tmp_path)([{"role": "user", "content": f"the row is {CANARIES[5]}"}])
    assert client.requests == []


def test_rows_that_quote_the_prompt_do_not_stop_the_search(tmp_path: Path) -> None:
    rows = [*CANARIES, "Reply with one JSON object and nothing else: I mean it"]
    client = ScriptedChat([json.dumps({"strategies": [], "final": ["clean"]})])
    search = AgentSearch(SPACE, chat_of(client, tmp_path, rows))
    assert len(play(search)) == 1


def test_replies_are_kept_and_repeated_by_a_resumed_run(tmp_path: Path) -> None:
    first = ScriptedChat(['{"strategies": [["clean"]]}'])
    assert "clean" in chat_of(first, tmp_path)([{"role": "user", "content": "hello"}])
    second = ScriptedChat(["new"])
    chat = chat_of(second, tmp_path)
    assert chat([{"role": "user", "content": "hello"}]) == '{"strategies": [["clean"]]}'
    assert second.requests == []
    assert chat([{"role": "user", "content": "hello"}]) == "new"


def test_the_rules_find_the_optimum(tmp_path: Path) -> None:
    """Round 1 the four steps alone; select then clean leads nowhere, clean then select is the best."""
    client = heuristic(SPACE)
    search = AgentSearch(SPACE, chat_of(client, tmp_path))
    ran = [strategy_key(trial.strategy) for trial in play(search)]
    assert ran[:4] == ["clean", "generate", "optimize", "select"]
    assert search.best() == OPTIMUM
    assert search.stopped == "final"
    assert not client.data_plane


def test_the_rules_give_up_when_nothing_helps(tmp_path: Path) -> None:
    search = AgentSearch(SPACE, chat_of(heuristic(SPACE), tmp_path))
    while trials := search.ask():
        search.tell([Scored(trial, -0.1, -0.2) for trial in trials])
    assert search.stopped == "no_processing"


def test_next_strategies_by_hand() -> None:
    alone = {("clean",): 0.2, ("generate",): -0.1, ("optimize",): 0.0, ("select",): 0.1}
    assert next_strategies({}, SPACE) == [["clean"], ["generate"], ["optimize"], ["select"]]
    plan = next_strategies(alone, SPACE)
    assert plan == [["clean", "select"], ["select", "clean"], ["clean", "generate"], ["clean", "optimize"]]
    assert next_strategies(dict.fromkeys(alone, 0.0), SPACE) == []


def test_an_agent_from_a_recipe(model_folder: Path) -> None:
    assert make_agent({}, SPACE).identity == "heuristic-1"
    client = make_agent({"kind": "openai", "base_url": "https://api.example.com/v1", "model": "m"}, SPACE)
    assert not client.data_plane
    with pytest.raises(ValueError, match="kind of a client must be"):
        make_agent({"kind": "oracle"}, SPACE)


def test_the_table_has_one_optimum() -> None:
    assert sum(landscape(s) == landscape(OPTIMUM) for s in SPACE.all()) == 1
