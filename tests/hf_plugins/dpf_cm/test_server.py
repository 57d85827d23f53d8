import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from hf_plugins.dpf_cm.config import PPVDConfig
from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB
from hf_plugins.dpf_cm.server import GuardProxy
from tests.hf_plugins.data_ops.servers import completion, serving
from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, tokenizer

SAFE = "请咨询您的医生。"


@pytest.fixture(scope="module")
def guard() -> PrivacyPreservingVectorDB:
    config = PPVDConfig(store="numpy", ngram=4)
    return PrivacyPreservingVectorDB.build(
        model(), tokenizer(), PRIVATE, [SAFE] * len(PRIVATE), BENIGN + LOOKALIKE, config=config
    )


@pytest.fixture
def proxy(guard: PrivacyPreservingVectorDB) -> Iterator[GuardProxy]:
    found = GuardProxy(guard, "http://127.0.0.1:9/v1", timeout=5)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.close()


def post(
    proxy: GuardProxy, body: Any, path: str = "/v1/chat/completions", raw: bytes | None = None
) -> tuple[int, Any]:
    data = json.dumps(body).encode() if raw is None else raw
    request = urllib.request.Request(
        f"http://127.0.0.1:{proxy.port}{path}", data, {"Authorization": "Bearer k"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


@pytest.mark.host
def test_private_prompts_never_reach_the_server_behind(proxy: GuardProxy) -> None:
    with serving(lambda body, _: (200, completion("平常的回答"))) as (url, seen):
        proxy.upstream = url
        status, reply = post(proxy, ask(PRIVATE[0].prompt))
        assert (status, reply["choices"][0]["message"]["content"]) == (200, SAFE)
        # A preamble does not hide the question, parts of content are read together.
        long = [{"role": "user", "content": "你好" * 20}, {"role": "assistant", "content": "请说"}]
        parts = [
            {"type": "text", "text": PRIVATE[1].prompt[:5]},
            {"type": "text", "text": PRIVATE[1].prompt[5:]},
        ]
        body = {"messages": [*long, {"role": "user", "content": parts}]}
        assert post(proxy, body)[1]["choices"][0]["message"]["content"] == SAFE
        assert seen == []
        status, reply = post(proxy, ask(BENIGN[0]))
        assert reply["choices"][0]["message"]["content"] == "平常的回答"
        assert seen[0]["messages"] == ask(BENIGN[0])["messages"]
        assert seen[0]["_key"] == "Bearer k"


@pytest.mark.host
def test_a_private_answer_is_replaced_on_its_way_back(proxy: GuardProxy) -> None:
    with serving(lambda body, _: (200, completion("好的。" + PRIVATE[2].answer))) as (url, seen):
        proxy.upstream = url
        assert post(proxy, ask(BENIGN[3]))[1]["choices"][0]["message"]["content"] == SAFE
        assert len(seen) == 1


@pytest.mark.host
def test_what_cannot_be_read_is_not_sent_on(proxy: GuardProxy) -> None:
    with serving(lambda body, _: (200, completion("x"))) as (url, seen):
        proxy.upstream = url
        for body, words in (
            (ask("x", stream=True), "send stream=false"),
            ({"messages": []}, "the list of messages is empty"),
            ({"messages": [{"role": "user"}]}, "cannot read the prompt"),
            (ask([{"type": "image_url", "image_url": "x"}]), "cannot read the prompt"),
            ([1], "no JSON object"),
        ):
            status, reply = post(proxy, body)
            assert status == 400
            assert words in reply["error"]["message"]
        assert post(proxy, None, raw=b"{broken")[0] == 400
        assert "bytes, allowed are 1 to" in post(proxy, None, raw=b"")[1]["error"]["message"]
        assert post(proxy, ask("x"), path="/v1/embeddings")[0] == 404
        assert seen == []


@pytest.mark.host
@pytest.mark.parametrize(
    ("fault", "status"),
    [((200, b"<html>"), 502), ((200, b"[]"), 502), ((200, b"{}"), 502), ((429, b"slow"), 429), ("cut", 502)],
)
def test_faults_behind_are_told(proxy: GuardProxy, fault: Any, status: int) -> None:
    with serving(lambda *_: fault) as (url, _):
        proxy.upstream = url
        found, reply = post(proxy, ask(BENIGN[0]))
        assert found == status
        assert reply["error"]["type"] == "ppvd_guard"


@pytest.mark.host
def test_text_completions(proxy: GuardProxy) -> None:
    chat = tokenizer().apply_chat_template(
        [{"role": "user", "content": PRIVATE[0].prompt}], tokenize=False, add_generation_prompt=True
    )
    status, reply = post(proxy, {"prompt": chat}, path="/v1/completions")
    assert (status, reply["choices"][0]["text"]) == (200, SAFE)
    assert post(proxy, {"prompt": 3}, path="/v1/completions")[0] == 400
    # Nothing listens behind: the refusal is told, not a traceback.
    assert post(proxy, {"prompt": "你好"}, path="/v1/completions")[0] == 502


def test_upstream_is_checked(guard: PrivacyPreservingVectorDB) -> None:
    with pytest.raises(ValueError, match="upstream must begin with http"):
        GuardProxy(guard, "localhost:8000")
