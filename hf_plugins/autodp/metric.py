"""From two models' results to a score: a judge in both orders, or the loss on held-out answers."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_plugins.autodp.verdicts import (
    Score,
    StoppingRule,
    bootstrap_score,
    check_unparsed,
    judge_until,
    length_controlled,
    parse_verdict,
    question_values,
)
from hf_plugins.data_ops.chat import ChatClient, Sampling
from hf_plugins.data_ops.text import has_cjk

logger = logging.getLogger(__name__)

JUDGE = {
    "en": "Compare two responses to a question. Criteria, most important first: accuracy, safety, fluency, "
    "conciseness.\n\nQuestion: {question}\n\nResponse 1: {first}\n\nResponse 2: {second}\n\nIs response 1 "
    "better? Reply with one word on the last line: win, tie or lose.",
    "zh": "请比较同一问题的两个回答。标准按重要性排序：准确、安全、流畅、简洁。\n\n"
    "问题：{question}\n\n回答1：{first}\n\n回答2：{second}\n\n"
    "回答1是否更好？最后一行只输出一个字：赢、平或输。",
}
# value of each held-out question from (strategy's result, raw data's result)
Values = Callable[[dict[str, Any], dict[str, Any]], np.ndarray]


def judge_request(question: str, first: str, second: str) -> list[dict[str, str]]:
    """One comparison, in the language of the question."""
    prompt = JUDGE["zh" if has_cjk(question) else "en"]
    return [{"role": "user", "content": prompt.format(question=question, first=first, second=second)}]


def judge_values(
    client: ChatClient,
    questions: Sequence[str],
    candidate: Sequence[str],
    baseline: Sequence[str],
    *,
    rule: StoppingRule | None = None,
    incumbent: float = -math.inf,
) -> np.ndarray:
    """Value of each judged question, see `question_values`; both orders, greedy, equal answers a tie unasked.

    Returns:
        (n,) with n below the number of questions where judging stopped early.
    """

    def ask(block: range) -> np.ndarray:
        verdicts: list[list[str | None]] = []
        for swap in (False, True):
            texts = [(candidate[i], baseline[i]) for i in block]
            pairs = [(b, a) if swap else (a, b) for a, b in texts]
            differ = [index for index, (a, b) in enumerate(pairs) if a != b]
            requests = [judge_request(questions[block[index]], *pairs[index]) for index in differ]
            replies = client.complete_many(requests, sampling=Sampling(max_tokens=512)) if requests else []
            found: list[str | None] = ["tie"] * len(pairs)
            for index, reply in zip(differ, replies, strict=True):
                found[index] = parse_verdict(reply[0])
            verdicts.append(found)
        return question_values(*verdicts)

    return judge_until(ask, len(questions), rule=rule, incumbent=incumbent)


def loss_values(result: dict[str, Any], raw: dict[str, Any]) -> np.ndarray:
    """How much lower the loss of each held-out answer is than after training on the raw data, nats a
    token.
    """
    return np.array(raw["losses"]) - np.array(result["losses"])


def winrate_score(values: np.ndarray, lengths: np.ndarray, *, level: float, seed: int) -> tuple[Score, float]:
    """Score with interval, and the score at equal length of answers; refuses what the judge left unread."""
    missing = check_unparsed(values)
    if missing:
        logger.warning("%d of %d verdicts could not be read and are left out", missing, len(values))
    return bootstrap_score(values, level=level, seed=seed), length_controlled(values, lengths[: len(values)])
