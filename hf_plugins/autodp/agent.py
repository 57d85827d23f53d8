"""The agent and its guard: every message is checked against the data before it is sent, every reply is
kept.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from hf_plugins.autodp.privacy import PrivacyGuard
from hf_plugins.autodp.protocol import FEEDBACK, PROMPT_JSON, PROMPT_ZH, REPAIR, first_prompt
from hf_plugins.autodp.storage import Journal
from hf_plugins.autodp.strategies import Space
from hf_plugins.data_ops.chat import ChatClient, Messages, Sampling, ScriptedChat, make_client

# Qwen3-32B's sampling in the release.
THINKING = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)


def public_texts(space: Space, *, rounds: int) -> list[str]:
    """All fixed text that a message to the agent may hold."""
    openings = [first_prompt(space, prompt=prompt, rounds=rounds) for prompt in ("json", "paper_zh")]
    return [PROMPT_JSON, PROMPT_ZH, *REPAIR.values(), *FEEDBACK.values(), *openings]


def guarded_chat(
    client: ChatClient, guard: PrivacyGuard, journal: Journal, *, sampling: Sampling = THINKING
) -> Callable[[Messages], str]:
    """A chat for `AgentSearch`: checks messages, asks, and notes the reply so that a resumed run repeats it.

    Raises:
        PrivacyError: From the chat, if a message holds a piece of a row.
    """
    replies = [entry["text"] for entry in journal.entries("reply")]

    def chat(messages: Messages) -> str:
        guard.check(messages)
        if replies:
            return replies.pop(0)
        text = client.complete(messages, sampling=sampling)[0]
        journal.append({"kind": "reply", "text": text})
        return text

    return chat


def make_agent(spec: Mapping[str, Any] | ChatClient, space: Space) -> ChatClient:
    """The client of the agent, marked as one that may see no rows.

    Raises:
        ValueError: If the entry names no known kind.
    """
    if isinstance(spec, ChatClient):
        client = spec
    elif spec.get("kind", "heuristic") == "heuristic":
        client = heuristic(space)
    else:
        client = make_client(spec)
    client.data_plane = False
    return client


def heuristic(space: Space) -> ChatClient:
    """An agent of three rules, to compare language models with: try each step alone; join the good ones in
    both orders; lengthen the best. It reads the scores from the same messages as any agent.
    """

    def answer(messages: Messages) -> str:
        scores: dict[tuple[str, ...], float] = {}
        for message in messages:
            if message["role"] == "user":
                for names, value in re.findall(r"^(\[.*\]): (-?[\d.]+)$", message["content"], flags=re.M):
                    steps = json.loads(names)
                    scores[tuple(s if isinstance(s, str) else s["name"] for s in steps)] = float(value)
        plan = next_strategies(scores, space)
        if plan:
            return json.dumps({"strategies": plan, "final": None, "no_processing": False, "reason": ""})
        best = max(scores, key=scores.__getitem__)
        done = scores[best] <= 0
        final = None if done else list(best)
        return json.dumps({"strategies": [], "final": final, "no_processing": done, "reason": ""})

    return ScriptedChat(answer, identity="heuristic-1", data_plane=False)


def next_strategies(scores: Mapping[tuple[str, ...], float], space: Space, limit: int = 4) -> list[list[str]]:
    """What the rules try after these scores; empty when they have decided."""
    alone = [(name,) for name in space.names]
    if fresh := [item for item in alone if item not in scores]:
        return [list(item) for item in fresh[:limit]]
    ranked = sorted(scores, key=lambda item: -scores[item])
    best = ranked[0]
    if scores[best] <= 0:
        return []
    good = [item[0] for item in sorted(alone, key=lambda item: -scores[item]) if scores[item] > 0]
    pairs = [(a, b) for a in good for b in good if a != b]
    longer = [] if len(best) == space.max_length else [(*best, n) for n in space.names if n not in best]
    # Pairs of good steps first, then whatever follows the best so far, good alone or not.
    plan = [item for item in dict.fromkeys([*pairs[:limit], *longer]) if item not in scores]
    return [list(item) for item in plan[:limit]]
