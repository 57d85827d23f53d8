import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from hf_plugins.data_ops.chat import (
    BudgetExceeded,
    CachedChat,
    ChatClient,
    ChatError,
    OpenAIChat,
    Sampling,
    ScriptedChat,
    TransformersChat,
    make_client,
)
from tests.hf_plugins.data_ops import tiny
from tests.hf_plugins.data_ops.servers import completion, serving


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def echo(messages: list[dict[str, str]]) -> str:
    return f"<{messages[-1]['content']}>"


def test_script_in_order_and_by_function() -> None:
    client = ScriptedChat(["a", "b", "c"])
    assert client.complete(says("x")) == ["a"]
    assert client.complete(says("y"), sampling=Sampling(n=2, temperature=1)) == ["b", "c"]
    with pytest.raises(ChatError, match="give one for each request"):
        client.complete(says("z"))
    assert [r[0]["content"] for r in client.requests] == ["x", "y", "z"]
    assert ScriptedChat(echo).complete_many([says("a"), says("b")]) == [["<a>"], ["<b>"]]
    with pytest.raises(NotImplementedError, match=r"must write complete\(messages\)"):
        ChatClient().complete(says("a"))


def test_server_gets_messages_and_sampling() -> None:
    with serving(lambda body, _: (200, completion(*["hi"] * body["n"]))) as (url, seen):
        client = OpenAIChat(url, "m", revision="r1", api_key="k", extra={"top_k": 20})
        answers = client.complete(says("头痛"), sampling=Sampling(temperature=0.7, n=2, seed=5, max_tokens=9))
    assert answers == ["hi", "hi"]
    (body,) = seen
    assert body["messages"] == says("头痛")
    assert {k: body[k] for k in ("model", "temperature", "n", "seed", "max_tokens", "top_k")} == {
        "model": "m", "temperature": 0.7, "n": 2, "seed": 5, "max_tokens": 9, "top_k": 20,
    }  # fmt: skip
    assert body["_path"] == "/v1/chat/completions"
    assert body["_key"] == "Bearer k"
    assert client.identity == 'openai:m@r1+{"top_k":20}'


@pytest.mark.parametrize(
    "fault",
    ["hang", "cut", (500, b"oops"), (429, b"slow"), (200, b"<html>"), (200, b"{}"), (200, completion())],
)
def test_faults_of_a_server_are_tried_again(fault: object) -> None:
    with serving(lambda _, number: fault if number < 3 else (200, completion("ok"))) as (url, seen):
        client = OpenAIChat(url, "m", timeout=0.2, backoff=0.01)
        assert client.complete(says("a")) == ["ok"]
        assert len(seen) == 3


def test_a_lasting_fault_says_what_to_do() -> None:
    with serving(lambda *_: (200, b"garbage")) as (url, seen):
        client = OpenAIChat(url, "m", retries=2, backoff=0.01)
        with pytest.raises(
            ChatError, match=r"no usable answer in 3 tries.*garbage.*raise timeout or retries"
        ):
            client.complete(says("a"))
        assert len(seen) == 3
    with pytest.raises(ChatError, match="no usable answer in 1 tries"):
        OpenAIChat(url, "m", retries=0).complete(says("a"))


def test_a_refusal_is_not_tried_again() -> None:
    with serving(lambda *_: (404, b"no model m")) as (url, seen):
        with pytest.raises(
            ChatError, match=r"refuses the request: HTTP 404 no model m. Check the model's name 'm'"
        ):
            OpenAIChat(url, "m").complete(says("a"))
        assert len(seen) == 1


def test_base_url_is_checked() -> None:
    with pytest.raises(ValueError, match="base_url must begin with http"):
        OpenAIChat("localhost:8000", "m")


def test_answers_before_a_death_are_kept(tmp_path: Path) -> None:
    """The server dies after three answers; the next run asks for the others only, in the right order."""
    path = tmp_path / "cache.db"
    asked = [says(str(i)) for i in range(6)]
    with serving(lambda body, n: (200, completion(echo(body["messages"]))) if n <= 3 else (400, b"dead")) as (
        url,
        _,
    ):
        client = CachedChat(OpenAIChat(url, "m", concurrency=1), path)
        with pytest.raises(ChatError, match="refuses"):
            client.complete_many(asked)
    with serving(lambda body, _: (200, completion(echo(body["messages"])))) as (url, seen):
        told: list[tuple[int, int]] = []
        client = CachedChat(OpenAIChat(url, "m"), path)
        answers = client.complete_many(asked, progress=lambda *what: told.append(what))
    assert answers == [[f"<{i}>"] for i in range(6)]
    assert len(seen) == 3
    assert told[-1] == (6, 6)


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    inner = ScriptedChat(echo)
    client = CachedChat(inner, tmp_path / "c.db")
    heard: list[int] = []
    answers = client.complete_many([says("a"), says("b"), says("a")], on_answer=lambda i, _: heard.append(i))
    assert answers == [["<a>"], ["<b>"], ["<a>"]]
    assert client.complete(says("a")) == ["<a>"]
    assert len(inner.requests) == 2
    assert heard == [0, 1, 2]
    client.complete(says("a"), sampling=Sampling(seed=1))
    assert len(inner.requests) == 3
    CachedChat(ScriptedChat(echo, identity="other"), tmp_path / "c.db").complete(says("a"))
    assert CachedChat(inner, tmp_path / "c.db").complete(says("a")) == ["<a>"]
    assert len(inner.requests) == 3


def test_odd_text_survives_the_cache(tmp_path: Path) -> None:
    for text in ("\ud800", "\x00", "头\U0001f600"):
        client = CachedChat(ScriptedChat(lambda _, text=text: text, identity=repr(text)), tmp_path / "c.db")
        assert client.complete(says("a")) == client.complete(says("a")) == [text]


def test_budget(tmp_path: Path) -> None:
    inner = ScriptedChat(echo)
    client = CachedChat(inner, tmp_path / "c.db", max_calls=2)
    with pytest.raises(BudgetExceeded, match=r"1 questions are left.*max_calls=2.*raise it and run again"):
        client.complete_many([says("a"), says("b"), says("c")])
    assert len(inner.requests) == 2
    assert CachedChat(inner, tmp_path / "c.db", max_calls=1).complete_many([says(t) for t in "abc"])
    tokens = CachedChat(inner, tmp_path / "d.db", max_tokens=100)
    tokens.complete(says("a"), sampling=Sampling(max_tokens=60))
    with pytest.raises(BudgetExceeded, match="max_tokens=100"):
        tokens.complete(says("b"), sampling=Sampling(max_tokens=60))


def test_broken_cache_file(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_bytes(b"not a database at all, far from it" * 10)
    with pytest.raises(ChatError, match="is no usable cache"):
        CachedChat(ScriptedChat(echo), tmp_path / "c.db")


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    """SQLite's page limit stands for a full disk: the answer cannot be stored, and the error says so."""
    client = CachedChat(ScriptedChat(lambda m: "x" * 50_000), tmp_path / "c.db")
    original = client._connect

    def limited() -> sqlite3.Connection:
        db = original()
        db.execute("PRAGMA max_page_count=4")
        return db

    client._connect = limited  # type: ignore[method-assign]
    with pytest.raises(ChatError, match=r"cannot take an answer.*free disk space"):
        client.complete(says("a"))
    client._connect = original  # type: ignore[method-assign]
    assert client.complete(says("a")) == ["x" * 50_000]


@pytest.mark.host
def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    code = (
        "import sys; from hf_plugins.data_ops.chat import *\n"
        "c = CachedChat(ScriptedChat(lambda m: m[-1]['content']), sys.argv[1])\n"
        "for i in range(60): c.complete([{'role': 'user', 'content': str(i % 50)}])\n"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c.db")]) for _ in range(2)]
    assert [job.wait(60) for job in jobs] == [0, 0]
    with sqlite3.connect(tmp_path / "c.db") as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (50,)


@pytest.mark.host
def test_local_model(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(["你好医生"] * 5, size=300)
    model = tiny.qwen2(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = TransformersChat(str(tmp_path), batch_size=2)
    in_memory = TransformersChat(model, tokenizer)
    asked = [says("你好"), says("医生医生医生"), says("好")]
    sampling = Sampling(max_tokens=5)
    heard: list[int] = []
    answers = loaded.complete_many(
        asked, sampling=sampling, on_answer=lambda i, _: heard.append(i), progress=lambda *_: None
    )
    # Padding on the left does not change a greedy answer.
    assert answers == [in_memory.complete(m, sampling=sampling) for m in asked]
    assert heard == [0, 1, 2]
    drawn = Sampling(max_tokens=5, temperature=1.0, n=3, seed=3)
    assert loaded.complete(says("你"), sampling=drawn) == loaded.complete(says("你"), sampling=drawn)
    assert len(set(loaded.complete(says("你"), sampling=drawn))) > 1
    assert loaded.identity.startswith("transformers:")
    with pytest.raises(ValueError, match="n > 1 answers need temperature > 0"):
        loaded.complete(says("a"), sampling=Sampling(n=2))
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        TransformersChat(model)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="set tokenizer.chat_template first"):
        TransformersChat(model, tokenizer)


def test_clients_of_recipes(tmp_path: Path) -> None:
    spec = {"kind": "openai", "base_url": "http://x/v1", "model": "m", "max_calls": 3}
    client = make_client(spec, cache=tmp_path / "c.db")
    assert isinstance(client, CachedChat)
    assert client.max_calls == 3
    assert isinstance(make_client({"kind": "openai", "base_url": "http://x/v1", "model": "m"}), OpenAIChat)
    with pytest.raises(ValueError, match="max_calls and max_tokens need a cache"):
        make_client(spec)
    with pytest.raises(ValueError, match="kind of a client must be openai or transformers; got None"):
        make_client({"model": "m"})
    with pytest.raises(ValueError, match=r"client of kind openai: .*Mend the entry in the recipe"):
        make_client({"kind": "openai", "url": "x"})
