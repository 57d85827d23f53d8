import pytest

from hf_plugins.data_ops.answers import AnswerError, AnswerSchema, Field, ask
from hf_plugins.data_ops.chat import ScriptedChat

SCHEMA = AnswerSchema(
    fields={
        "score": Field(kind="integer", minimum=1, maximum=10),
        "verdict": Field(kind="string", choices=("win", "lose", "tie"), about="of the first"),
        "text": Field(kind="string", nullable=True),
    }
)
GOOD = '{"score": 9, "verdict": "win", "text": null}'


@pytest.mark.parametrize(
    "text", [GOOD, f"```json\n{GOOD}\n```", f"<think>1 {{}}</think>\n{GOOD}", GOOD.replace("9", "9.0")]
)
def test_good_answers(text: str) -> None:
    assert SCHEMA.parse(text) == {"score": 9, "verdict": "win", "text": None}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("I think 9", "the answer is no JSON object"),
        (f"Sure! {GOOD}", "write nothing but the object"),
        ("[9]", "the answer must be a JSON object; got list"),
        ('{"score": 9}', "the answer lacks verdict, text"),
        (GOOD.replace("9", '"9"'), 'score must be of type integer; got "9"'),
        (GOOD.replace("9", "true"), "score must be of type integer; got true"),
        (GOOD.replace("9", "11"), "score must be at most 10; got 11"),
        (GOOD.replace("9", "0"), "score must be at least 1; got 0"),
        (GOOD.replace("win", "won"), "verdict must be one of win, lose, tie"),
        (GOOD.replace("null", "3"), "text must be of type string"),
    ],
)
def test_bad_answers_say_what_is_wrong(text: str, match: str) -> None:
    with pytest.raises(AnswerError, match=match):
        SCHEMA.parse(text)


def test_instruction_names_every_field() -> None:
    for lang in ("zh", "en"):
        text = SCHEMA.instruction(lang)
        assert '"score": integer, 1 to 10' in text
        assert "one of win, lose, tie (of the first)" in text
        assert "string or null" in text


def test_repair_once() -> None:
    """The first answer is bad, the second good; another one stays bad and is marked, not guessed."""
    client = ScriptedChat(["bad", GOOD, GOOD.replace("9", "99"), GOOD.replace("9", "98")])
    first = ask(client, [[{"role": "user", "content": "q"}]], SCHEMA)
    assert first[0].value is not None
    assert first[0].problem == ""
    # What was wrong goes back to the model, behind its own answer.
    repair = client.requests[1]
    assert [m["role"] for m in repair] == ["user", "assistant", "user"]
    assert "no JSON object" in repair[-1]["content"]
    second = ask(client, [[{"role": "user", "content": "q"}]], SCHEMA)
    assert second[0].value is None
    assert second[0].raw == GOOD.replace("9", "98")
    assert "at most 10" in second[0].problem
    assert len(client.requests) == 4


def test_only_bad_answers_are_asked_again() -> None:
    client = ScriptedChat([GOOD, "bad", GOOD])
    answers = ask(client, [[{"role": "user", "content": str(i)}] for i in range(2)], SCHEMA)
    assert all(a.value for a in answers)
    assert client.requests[2][0]["content"] == "1"
    assert ask(client, [], SCHEMA) == []
