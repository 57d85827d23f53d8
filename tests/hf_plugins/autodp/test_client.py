import json

import pytest
from datasets import Dataset

from hf_plugins.autodp.client import (
    DeitaSelector,
    FillMissingMapper,
    QaOptimizeMapper,
    QaSynthesis,
    all_prompts,
    data_clients,
    fill,
    is_local,
    near_length,
    read_grade,
    read_object,
    teacher_labels,
)
from hf_plugins.autodp.config import CONSENT
from hf_plugins.autodp.dataset import ANSWER, DIRTY, QUESTION
from hf_plugins.data_ops.chat import CachedChat, ScriptedChat
from hf_plugins.data_ops.op import OpContext
from tests.hf_plugins.autodp.tiny import PAIRS, rows


def upper(messages: list[dict[str, str]]) -> str:
    """Rewrites both texts in capitals, whichever is asked for."""
    text = messages[0]["content"]
    question = text.split("\nQuestion: ")[-1].split("\nAnswer: ")[0]
    answer = text.split("\nAnswer: ")[-1].split("\nReply with")[0]
    return json.dumps({"question": question.upper(), "answer": answer.upper()})


def run(op: object, table: Dataset, script: object) -> tuple[Dataset, OpContext, ScriptedChat]:
    chat = ScriptedChat(script)
    context = OpContext(clients={"default": chat})
    return op.run(table, context), context, chat


def test_rows_found_clean_pass_byte_for_byte() -> None:
    """Calls are (dirty rows) x (texts that are there): 20 dirty rows, one without its question: 39."""
    flags = [i % 3 == 0 for i in range(60)]
    pairs = [("", PAIRS[0][1]), *PAIRS[1:]]
    found, context, chat = run(QaOptimizeMapper(), rows(pairs, **{DIRTY: flags}), upper)
    assert len(chat.requests) == 39
    for index, (question, answer) in enumerate(pairs):
        expected = (question.upper(), answer.upper()) if flags[index] else (question, answer)
        assert (found[index][QUESTION], found[index][ANSWER]) == expected
    assert context.ledger.counts() == {("qa_optimize_mapper", "changed"): 39}


def test_without_screening_all_rows_are_rewritten() -> None:
    assert len(run(QaOptimizeMapper(), rows(PAIRS[:5]), upper)[2].requests) == 10


def test_the_answer_is_rewritten_for_the_new_question() -> None:
    _, _, chat = run(QaOptimizeMapper(), rows(PAIRS[:1]), upper)
    assert PAIRS[0][0].upper() in chat.requests[1][0]["content"]


@pytest.mark.parametrize("reply", ["no JSON", '{"answer": ""}', '{"question": 3, "answer": null}'])
def test_an_unreadable_rewrite_keeps_the_text(reply: str) -> None:
    found, context, _ = run(QaOptimizeMapper(), rows(PAIRS[:2]), lambda _: reply)
    assert list(zip(found[QUESTION], found[ANSWER], strict=True)) == PAIRS[:2]
    assert context.ledger.counts() == {("qa_optimize_mapper", "flagged"): 4}


def test_a_rewrite_that_changes_the_length_is_not_taken() -> None:
    """Regression, defect 9: the release never checked its 10 %."""
    text = PAIRS[0][0]
    long = json.dumps({"question": text + "x" * len(text), "answer": "short"})
    found, context, _ = run(QaOptimizeMapper(), rows(PAIRS[:1]), lambda _: long)
    assert found[0][QUESTION] == text
    assert [entry["reason"] for entry in context.ledger.rows()] == [
        "question: length changed too much",
        "answer: length changed too much",
    ]
    assert near_length("x" * 110, "x" * 100, 0.1)
    assert not near_length("x" * 111, "x" * 100, 0.1)


def test_a_changed_row_costs_its_own_calls_only(tmp_path: object) -> None:
    script = ScriptedChat(upper)
    chat = CachedChat(script, tmp_path / "answers.sqlite")
    QaOptimizeMapper().run(rows(PAIRS), OpContext(clients={"default": chat}))
    before = len(script.requests)
    changed = [*PAIRS[:7], (PAIRS[7][0], PAIRS[7][1] + "."), *PAIRS[8:]]
    QaOptimizeMapper().run(rows(changed), OpContext(clients={"default": chat}))
    assert before == 120
    # Both requests of a row hold both of its texts.
    assert len(script.requests) - before == 2


def test_a_missing_question_is_written_from_its_answer() -> None:
    """Regression, defect 6: the release showed the placeholder instead of the answer."""
    table = rows([*PAIRS[:8], ("", "Rest and drink water."), ("How long?", ""), ("", "")])
    reply = json.dumps({"question": "What helps?", "answer": "Two days."})
    found, context, chat = run(FillMissingMapper(), table, lambda _: reply)
    assert len(chat.requests) == 2
    assert "Rest and drink water." in chat.requests[0][0]["content"]
    assert "How long?" in chat.requests[1][0]["content"]
    assert found[8:11][QUESTION] == ["What helps?", "How long?", ""]
    assert found[8:11][ANSWER] == ["Rest and drink water.", "Two days.", ""]
    assert context.ledger.counts() == {("fill_missing_mapper", "changed"): 2}
    again, _, second = run(FillMissingMapper(), found, lambda _: reply)
    assert second.requests == []
    assert again[:] == found[:]


def test_missing_without_a_readable_answer_or_examples() -> None:
    found, context, _ = run(FillMissingMapper(), rows([*PAIRS[:2], ("", "a")]), lambda _: "?")
    assert found[2][QUESTION] == ""
    assert context.ledger.counts() == {("fill_missing_mapper", "flagged"): 1}
    assert run(FillMissingMapper(), rows([("", "a")]), lambda _: "?")[2].requests == []


@pytest.mark.parametrize("count", [1, 3, 999, 1001, 1500, 2001])
def test_any_number_of_rows_can_be_added_to(count: int) -> None:
    """Regression, defect 7: the release crashed on 1,001 to 1,999 rows and on many bad replies."""
    table = rows([(f"q {i}", f"a {i}") for i in range(count)], extra=list(range(count)))
    replies = iter(['{"question": "new", "answer": "row"}', "garbage"] * 10)
    op = QaSynthesis(count=20)
    found, context, chat = run(op, table, lambda _: next(replies))
    expected = 10 if count <= 1000 else 0
    assert len(found) == count + expected
    assert len(chat.requests) == 2 * expected
    if expected:
        assert found[-1][QUESTION] == "new"
        assert found[-1]["extra"] is None
        assert context.ledger.counts() == {("qa_synthesis", "added"): 10}


def test_new_rows_are_clean_and_drawn_from_four_complete_rows() -> None:
    pairs = [*PAIRS[:6], ("", "orphan answer")]
    table = rows(pairs, **{DIRTY: [True] * 7}, history=[[{"role": "user", "content": "x"}]] * 7)
    reply = '{"question": "new", "answer": "row"}'
    found, _, chat = run(QaSynthesis(count=3), table, lambda _: reply)
    text = chat.requests[0][0]["content"]
    assert text.count("Question: ") == 4
    assert "orphan" not in text
    assert found[-1][DIRTY] is False
    assert found[-1]["history"] == []
    assert run(QaSynthesis(count=3), table, lambda _: reply)[0][:] == found[:]


def test_deita_keeps_the_better_half() -> None:
    def grade(messages: list[dict[str, str]]) -> str:
        return "6" if any(f"number {i} " in messages[0]["content"] for i in (2, 4)) else "1 of 6"

    # 4 rows of 4 different topics, so that diversity leaves none out.
    pairs = [(f"{'abcd'[i - 1] * 9} number {i} ", "xyzw"[i - 1] * 20) for i in (1, 2, 3, 4)]
    found, context, chat = run(DeitaSelector(), rows(pairs), grade)
    assert found[QUESTION] == [pairs[1][0], pairs[3][0]]
    assert len(chat.requests) == 8
    assert context.ledger.counts() == {("deita_selector", "dropped"): 2}


@pytest.mark.parametrize(
    ("text", "grade"), [("5", 5), ("<think>2</think> 4.5", 4.5), ("10", None), ("bad", None)]
)
def test_grades_are_numbers(text: str, grade: float | None) -> None:
    """Regression, defect 14: strings sort "9" above "10"."""
    assert read_grade(text) == grade


def test_every_prompt_is_filled_by_name() -> None:
    """Regression, defect 14: a positional format on a named field was a KeyError in the release."""
    values = {"question": "Q?", "answer": "A.", "examples": "E"}
    for name in ("question", "answer", "pair", "better_question", "better_answer", "screen", "complexity"):
        assert "{" not in fill(name, values)[0]["content"].replace('{"', "")
        assert "回答" in fill(name, values | {"question": "什么"})[0]["content"] or name == "complexity"
    assert len(all_prompts()) == 16


def test_objects_in_replies() -> None:
    assert read_object('<think>{"answer": "no"}</think> so {x {"answer": " yes "}', ["answer"]) == {
        "answer": "yes"
    }
    assert read_object('{"answer": "a"}', ["answer", "question"]) is None


def test_labels_of_the_teacher() -> None:
    replies = ScriptedChat(["Yes.", "no", "perhaps", "是"])
    numbers, labels = teacher_labels(replies, rows(PAIRS[:6]), [5, 0, 2, 1])
    assert (numbers.tolist(), labels.tolist()) == ([5, 0, 1], [1, 0, 1])


def test_rows_stay_on_this_machine_unless_said_in_words(tmp_path: object) -> None:
    far = {"kind": "openai", "base_url": "https://api.example.com/v1", "model": "m"}
    near = far | {"base_url": "http://127.0.0.1:8000/v1"}
    with pytest.raises(ValueError, match="allow it with remote_data: 'rows may leave this machine'"):
        data_clients({"writer": far}, cache=None, remote_data="")
    assert data_clients({"writer": far}, cache=None, remote_data=CONSENT)
    assert data_clients({"writer": near}, cache=tmp_path / "a.sqlite", remote_data="")
    assert is_local({"kind": "transformers", "model": "x"})
    assert is_local({"kind": "openai", "base_url": "http://localhost:1/v1"})
    assert not is_local({"kind": "openai", "base_url": "http://127.evil.example/v1"})


def test_a_client_that_may_see_no_rows_is_shown_none() -> None:
    agent = ScriptedChat(["{}"] * 9, data_plane=False)
    with pytest.raises(ValueError, match="which may see none"):
        QaOptimizeMapper().run(rows(PAIRS[:1]), OpContext(clients={"default": agent}))
    assert agent.requests == []


def test_each_operator_says_whether_it_is_idempotent() -> None:
    flags = {op: op.idempotent for op in (FillMissingMapper, QaSynthesis, QaOptimizeMapper, DeitaSelector)}
    assert flags == {
        FillMissingMapper: True,
        QaSynthesis: False,
        QaOptimizeMapper: False,
        DeitaSelector: False,
    }
