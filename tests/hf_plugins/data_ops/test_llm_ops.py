import json
from typing import Any

import pytest
from datasets import Dataset

from hf_plugins.data_ops.chat import ScriptedChat
from hf_plugins.data_ops.llm_ops import (
    GenerateQaFromExamplesMapper,
    GenerateTextFromExamplesMapper,
    LlmQualityScoreFilter,
    OptimizeQaMapper,
    within,
)
from hf_plugins.data_ops.op import OpContext
from hf_plugins.data_ops.prompts import HEADER, check_lang, templates


def pairs(*rows: tuple[str | None, str | None], **extra: list[Any]) -> Dataset:
    return Dataset.from_dict({"question": [r[0] for r in rows], "answer": [r[1] for r in rows], **extra})


def asks(**roles: Any) -> OpContext:
    return OpContext(clients={role: ScriptedChat(script) for role, script in roles.items()})


def score(value: int) -> str:
    return json.dumps({"score": value, "reason": "because"})


def rewrite(question: str | None, answer: str | None, flag: bool = True) -> str:
    return json.dumps(
        {"optimize": flag, "question": question, "answer": answer, "reason": "vague"}, ensure_ascii=False
    )


def test_scores_of_nine_stay() -> None:
    context = asks(scorer=[score(9), score(8), score(10), "?", "?"])
    out = LlmQualityScoreFilter().run(pairs(("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")), context)
    assert list(out["question"]) == ["a", "c"]
    assert list(out["llm_quality_score"]) == [0.9, 1.0]
    assert list(out["llm_quality_reason"]) == ["because"] * 2
    reasons = [row["reason"] for row in context.ledger.rows()]
    assert reasons[0] == "score 0.8 outside [0.9, 1]"
    assert reasons[1].startswith("unparsed: the answer is no JSON object")


def test_unparsed_rows_may_stay() -> None:
    context = asks(scorer=["?", "?"])
    out = LlmQualityScoreFilter(on_unparsed="keep").run(pairs(("a", "b")), context)
    assert list(out["llm_quality_score"]) == [None]
    assert context.ledger.rows()[0]["action"] == "flagged"


def test_prompt_holds_criteria_and_texts() -> None:
    context = asks(scorer=[score(9)])
    LlmQualityScoreFilter(lang="en").run(pairs(("headache", None)), context)
    system, user = context.clients["scorer"].requests[0]
    for word in ("Professionalism", "Safety", "Fluency"):
        assert word in system["content"]
    assert system["content"].index("Professionalism") < system["content"].index("Safety")
    assert "## Question\nheadache" in user["content"]
    assert "## Answer\n\n" in user["content"]


def test_optimise_survivors() -> None:
    context = asks(
        default=[
            rewrite(None, None, flag=False),
            rewrite("头痛三天怎么办", "请先测量血压并就诊检查"),
            rewrite(None, "太长" * 20),
            "?", "?",
        ]
    )  # fmt: skip
    rows = [("a", "1"), ("头痛三天咋办", "请测血压并且到医院检查"), ("c", "短的回答"), ("d", "4")]
    out = OptimizeQaMapper().run(pairs(*rows, other=[1, 2, 3, 4]), context)
    assert out[0]["answer"] == "1"
    assert out[1]["question"] == "头痛三天怎么办"
    assert out[1]["answer"] == "请先测量血压并就诊检查"
    assert out[2]["answer"] == "短的回答"
    assert list(out["other"]) == [1, 2, 3, 4]
    kinds = [(row["action"], row["reason"].split(":")[0]) for row in context.ledger.rows()]
    assert kinds == [("changed", "vague"), ("flagged", "answer not taken"), ("flagged", "unparsed")]


def test_length_rule_by_hand() -> None:
    """30 % of 10 characters: 7 to 13 pass, 6 and 14 do not; an empty text may become anything."""
    assert [n for n in range(20) if within("x" * 10, "y" * n, 0.3)] == list(range(7, 14))
    assert within("", "anything", 0.3)


def test_band_rewrites_rescores_and_drops() -> None:
    """0.5 lies below the band, 0.6 and 0.8 in it, 0.9 above: two are asked, one passes the second score."""
    context = asks(
        optimizer=[rewrite(None, "bb"), rewrite(None, None, flag=False)], scorer=[score(9), score(8)]
    )
    data = pairs(("a", "1"), ("b", "b2"), ("c", "3"), ("d", "4"), llm_quality_score=[0.5, 0.6, 0.8, 0.9])
    out = OptimizeQaMapper(optimize_scope="band").run(data, context)
    assert list(out["question"]) == ["b", "d"]
    assert list(out["answer"]) == ["bb", "4"]
    assert list(out["llm_quality_score"]) == [0.9, 0.9]
    assert len(context.clients["optimizer"].requests) == 2
    dropped = {row["reason"] for row in context.ledger.rows(action="dropped")}
    assert dropped == {"score 0.5 < 0.9 after optimisation", "score 0.8 < 0.9 after optimisation"}


def test_scorer_does_not_enter_the_fingerprint_of_survivors() -> None:
    def key(op: OptimizeQaMapper, scorer: str) -> str:
        clients = {"optimizer": ScriptedChat([], identity="o"), "scorer": ScriptedChat([], identity=scorer)}
        return op.fingerprint(OpContext(clients=clients))

    assert key(OptimizeQaMapper(), "a") == key(OptimizeQaMapper(), "b")
    band = OptimizeQaMapper(optimize_scope="band")
    assert key(band, "a") != key(band, "b")
    assert OptimizeQaMapper().fingerprint() != band.fingerprint()


def test_new_pairs_from_examples() -> None:
    good = json.dumps({"question": "新问题", "answer": "新回答"}, ensure_ascii=False)
    context = asks(writer=[good, "?", "?", good])
    data = pairs(("a", "1"), ("b", "2"), ("c", None), ("d", "4"), other=[1, 2, 3, 4])
    op = GenerateQaFromExamplesMapper(num_rows=3, example_num=2, seed=1)
    out = op.run(data, context)
    assert len(out) == 6
    assert out[4]["question"] == out[5]["question"] == "新问题"
    assert out[4]["row_id"] != out[5]["row_id"]
    assert out[4]["other"] is None
    assert out[0]["example_ids"] is None
    # A row without an answer is no example.
    assert data[2]["question"] not in [
        text for r in context.clients["writer"].requests for text in r[1]["content"].split("\n")
    ]
    assert [row["action"] for row in context.ledger.rows()] == ["flagged", "added", "added"]
    again = op.run(data, asks(writer=[good, "?", "?", good]))
    assert list(again["row_id"]) == list(out["row_id"])
    assert len(GenerateQaFromExamplesMapper(num_rows=0).run(data, context)) == 4


def test_new_passages_need_the_header() -> None:
    context = asks(
        writer=[f"{HEADER['zh']}\n高血压的防治", "没有标题的正文", f"<think>x</think>{HEADER['zh']}\n糖尿病"]
    )
    data = Dataset.from_dict({"text": ["a", "b", "c"]})
    out = GenerateTextFromExamplesMapper(num_rows=3).run(data, context)
    assert list(out["text"])[3:] == ["高血压的防治", "糖尿病"]
    assert context.ledger.rows(action="flagged")[0]["reason"] == "unparsed: no passage under the header"


def test_too_few_examples() -> None:
    with pytest.raises(
        ValueError, match=r"2 rows can serve as examples and example_num=3 are needed; lower example_num"
    ):
        GenerateTextFromExamplesMapper(num_rows=1).run(
            Dataset.from_dict({"text": ["a", "b", ""]}), asks(writer=[])
        )


def test_prompts_enter_the_fingerprint() -> None:
    assert templates("score") != templates("optimize")
    assert len(set(templates("score", "optimize", "write", "qa", "vote"))) == 5


@pytest.mark.parametrize(
    ("op", "wrong", "match"),
    [
        (
            LlmQualityScoreFilter,
            {"min_score": 9},
            r"must lie in \[0, 1\]; got 9 and 1. Write 0.9 for 9 of 10",
        ),
        (LlmQualityScoreFilter, {"field_names": ("Q",)}, "give one of field_names for each of input_keys"),
        (LlmQualityScoreFilter, {"on_unparsed": "guess"}, "on_unparsed must be drop or keep"),
        (OptimizeQaMapper, {"optimize_scope": "all"}, "optimize_scope must be survivors or band"),
        (OptimizeQaMapper, {"band": (0.9, 0.6)}, "band must be two rising scores"),
        (OptimizeQaMapper, {"length_tolerance": 0}, "length_tolerance must be > 0"),
        (GenerateQaFromExamplesMapper, {"num_rows": -1}, "num_rows must be >= 0 and example_num >= 1"),
    ],
)
def test_wrong_parameters(op: Any, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        op(**wrong)
    with pytest.raises(ValueError, match=r"lang must be one of zh, en, the language of the prompt"):
        check_lang("x", "fr")
