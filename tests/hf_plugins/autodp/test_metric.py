import numpy as np
import pytest

from hf_plugins.autodp.metric import JUDGE, judge_request, judge_values, loss_values, winrate_score
from hf_plugins.autodp.verdicts import StoppingRule
from hf_plugins.data_ops.chat import ScriptedChat

QUESTIONS = [f"question {i}?" for i in range(200)]


def longer(messages: list[dict[str, str]]) -> str:
    """Prefers the longer response; equal length is a tie."""
    text = messages[0]["content"]
    first = text.split("Response 1: ")[1].split("\n\nResponse 2: ")[0]
    second = text.split("Response 2: ")[1].split("\n\nIs response 1")[0]
    return "win" if len(first) > len(second) else "lose" if len(first) < len(second) else "tie"


def test_swapping_the_models_changes_the_sign() -> None:
    a, b = ["long answer"] * 4, ["long answer", "short", "longer answer", "x"]
    forth = judge_values(ScriptedChat(longer), QUESTIONS[:4], a, b)
    assert forth.tolist() == [0, 1, -1, 1]
    assert judge_values(ScriptedChat(longer), QUESTIONS[:4], b, a).tolist() == (-forth).tolist()


def test_a_judge_that_always_says_first_gives_zero() -> None:
    chat = ScriptedChat(lambda _: "win")
    assert judge_values(chat, QUESTIONS, ["a"] * 200, ["b"] * 200).tolist() == [0] * 200
    assert len(chat.requests) == 400


def test_equal_answers_are_a_tie_that_nobody_is_asked_about() -> None:
    chat = ScriptedChat([])
    assert judge_values(chat, QUESTIONS[:3], ["a"] * 3, ["a"] * 3).tolist() == [0, 0, 0]
    assert chat.requests == []


def test_verdicts_repeat() -> None:
    """Regression, defect 11: the release sampled its second pass."""
    seen = []

    class Watch(ScriptedChat):
        def complete_many(self, conversations: list, **options: object) -> list[list[str]]:
            seen.append(options["sampling"])
            return super().complete_many(conversations, **options)

    judge_values(Watch(lambda _: "win"), QUESTIONS[:1], ["a"], ["b"])
    assert [sampling.temperature for sampling in seen] == [0.0, 0.0]


def test_an_unreadable_judge_stops_the_scoring_and_does_not_hang() -> None:
    """Regression, defect 11: the release opened a debugger."""
    values = judge_values(ScriptedChat(lambda _: "Both are fine."), QUESTIONS[:5], ["a"] * 5, ["b"] * 5)
    assert np.isnan(values).all()
    with pytest.raises(RuntimeError, match="or use another judge"):
        winrate_score(values, np.zeros(5), level=0.95, seed=0)


def test_a_hopeless_strategy_is_judged_in_part() -> None:
    chat = ScriptedChat(longer)
    values = judge_values(chat, QUESTIONS, ["x"] * 200, ["longer"] * 200, rule=StoppingRule(), incumbent=0.2)
    assert len(values) == 40
    assert len(chat.requests) == 80
    score, _ = winrate_score(values, np.zeros(200), level=0.95, seed=0)
    assert (score.value, score.num_questions) == (-1.0, 40)


def test_length_controlled_score_of_a_judge_of_length() -> None:
    """Candidates are longer for 150 of 200 questions, the judge likes length: nothing is left without."""
    a = ["long"] * 150 + ["x"] * 50
    b = ["x"] * 150 + ["long"] * 50
    values = judge_values(ScriptedChat(longer), QUESTIONS, a, b)
    lengths = np.array([len(p) - len(q) for p, q in zip(a, b, strict=True)])
    score, controlled = winrate_score(values, lengths, level=0.95, seed=0)
    assert score.value == 0.5
    assert abs(controlled) < 1e-9


def test_loss_values_are_above_zero_where_the_strategy_is_better() -> None:
    values = loss_values({"losses": [1.0, 3.0]}, {"losses": [2.0, 2.0]})
    assert values.tolist() == [1.0, -1.0]


def test_the_prompt_follows_the_language() -> None:
    assert "赢" in judge_request("头痛怎么办", "a", "b")[0]["content"]
    assert "win, tie or lose" in judge_request("What now?", "a", "b")[0]["content"]
    assert set(JUDGE) == {"en", "zh"}
