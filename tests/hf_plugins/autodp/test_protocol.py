import json

import pytest

from hf_plugins.autodp.protocol import Reply, describe, echo, feedback, first_prompt, parse_reply
from hf_plugins.autodp.strategies import IDENTITY, Space, StepSpec, strategy_key

SPACE = Space()


def keys(reply: Reply) -> list[str]:
    return [strategy_key(strategy) for strategy in reply.strategies]


def test_json_reply_with_thinking_and_fences() -> None:
    thought = '<think>{"strategies": [["select"]]}</think>\n'
    text = thought + '```json\n{"strategies": [["clean"], ["clean", "select"]]}\n```'
    assert keys(parse_reply(text, SPACE)) == ["clean", "clean>select"]


def test_chinese_reply_in_the_published_format() -> None:
    text = (
        "</think>**###组合[1]###**\n数据清洗团队,数据优化团队\n**###组合[2]###**\n- "
        "数据清洗团队，数据挑选团队\n"
        "**###不同组合的理由###**\n先清洗。【最佳团队】数据生成团队"
    )
    reply = parse_reply(text, SPACE, prompt="paper_zh")
    assert keys(reply) == ["clean>optimize", "clean>select"]
    # Behind the reasons the marker is talk, not a decision.
    assert reply.final is None


@pytest.mark.parametrize(
    "line",
    [
        "数据清洗团队，数据挑选团队",
        "数据清洗团队,数据挑选团队",
        "1. 数据清洗团队、数据挑选团队",
        "* 数据清洗团队 -> 数据挑选团队",
    ],
)
def test_any_comma_or_bullet_is_the_same_strategy(line: str) -> None:
    """Regression, defect 2: in the release a full-width comma made a new key of a known combination."""
    assert keys(parse_reply(f"**###组合[1]###**\n{line}\n", SPACE, prompt="paper_zh")) == ["clean>select"]


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("【最佳团队】\n**数据清洗团队,数据挑选团队**\n**###不同组合的理由###**\n因为", "clean>select"),
        ("【最佳团队】：数据优化团队\n", "optimize"),
        ("**###组合[1]###**\n数据生成团队\n【最佳团队】\n**###不同组合的理由###**", "generate"),
        ("【原始数据无须任何处理】\n**###不同组合的理由###**", "identity"),
    ],
)
def test_decisions_in_chinese(text: str, final: str) -> None:
    reply = parse_reply(text, SPACE, prompt="paper_zh")
    assert reply.final is not None
    assert strategy_key(reply.final) == final


def test_decisions_in_json() -> None:
    assert parse_reply('{"strategies": [], "final": ["clean"]}', SPACE).final == SPACE.strategy(["clean"])
    assert parse_reply('{"strategies": [], "no_processing": true}', SPACE).final == IDENTITY


def test_more_than_four_are_cut_with_a_note() -> None:
    """Regression, defect 13: more than four combinations crashed the release."""
    text = json.dumps({"strategies": [[name] for name in SPACE.names] + [["clean", "select"]]})
    reply = parse_reply(text, SPACE)
    assert len(reply.strategies) == 4
    assert "5 strategies proposed, the first 4 are run" in reply.problems[0]


def test_bad_entries_are_dropped_and_none_of_the_agents_words_is_repeated() -> None:
    secret = "PATIENT-0042 has a rash"
    text = json.dumps({"strategies": [["clean", "clean"], [secret], "clean", ["select"], ["select"], [3]]})
    reply = parse_reply(text, SPACE)
    assert keys(reply) == ["select"]
    assert len(reply.problems) == 4
    assert secret not in " ".join(reply.problems)


@pytest.mark.parametrize(
    "text", ["", "I would clean first.", "{broken", "<think>no end", "[1, 2]", '{"a": 1}']
)
def test_garbage_is_no_reply_and_no_crash(text: str) -> None:
    """Regression, defect 13: a missing ``</think>`` was an IndexError in the release."""
    for prompt in ("json", "paper_zh"):
        reply = parse_reply(text, SPACE, prompt=prompt)
        assert not reply.usable
        assert reply.problems


def test_a_lone_list_or_number_as_strategies() -> None:
    assert not parse_reply('{"strategies": 3}', SPACE).usable


def test_prompts_name_all_steps_and_the_rules() -> None:
    english = first_prompt(SPACE, rounds=6)
    assert all(f"- {name}: " in english for name in SPACE.names)
    assert "at most 4 strategies" in english
    assert "at most 6" in english
    assert "数据挑选团队" in first_prompt(SPACE, prompt="paper_zh")
    ops = Space((StepSpec(name="length", ability="filters", choices={"low": (1, 2)}),))
    assert "low in [1, 2]" in first_prompt(ops)


def test_feedback_gives_scores_in_order_with_four_digits() -> None:
    scores = [(SPACE.strategy(["select"]), 0.123456), (SPACE.strategy(["clean"]), -0.5)]
    text = feedback(scores, space=SPACE, round_number=1, rounds=6, problems=["x."])
    assert text.index('["select"]: 0.1235') < text.index('["clean"]: -0.5000') < text.index("not run: x.")
    assert "数据挑选团队: 0.1235" in feedback(
        scores, space=SPACE, round_number=1, rounds=6, prompt="paper_zh"
    )


def test_the_history_holds_no_free_text() -> None:
    reply = parse_reply('{"strategies": [["clean"]], "reason": "because of the rash"}', SPACE)
    assert echo(reply, SPACE) == '{"strategies": [["clean"]], "final": null}'
    assert echo(reply, SPACE, "paper_zh") == "**###组合[1]###**\n数据清洗团队"
    assert echo(Reply(), SPACE, "paper_zh") == "无"


def test_description() -> None:
    assert describe(SPACE.strategy(["clean", "select"])) == "clean, then select"
