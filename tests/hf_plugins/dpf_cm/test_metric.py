import pytest

from hf_plugins.dpf_cm.config import PPVDConfig
from hf_plugins.dpf_cm.metric import attacks, evaluate_guard, leakage
from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB, answer_ids, prompt_ids
from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, tokenizer


def test_leakage_by_hand() -> None:
    """Texts: equal (1.0, exact), half of it (2*2/(2+4) = 0.667), nothing (0)."""
    found = leakage(["头痛三天", "头痛", "别的"], ["头痛三天", "头痛三天", "头痛三天"], threshold=0.66)
    assert found["rouge"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["above"] == pytest.approx(2 / 3)
    assert found["exact"] == pytest.approx(1 / 3)


def test_attacks_ask_for_the_rest() -> None:
    fast = tokenizer()
    tried = {a.name: a for a in attacks(fast, PRIVATE, paraphrases=["改写"] * len(PRIVATE))}
    assert len(tried) == 7
    s = PRIVATE[0]
    q, a = prompt_ids(fast, s.prompt), answer_ids(fast, s.answer)
    half = tried["question + 50% of answer"]
    cut = round(0.5 * len(a))
    assert half.rows[0] == q + a[:cut]
    assert half.targets[0] == fast.decode(a[cut:])
    assert tried["question"].targets[0] == s.answer
    assert fast.decode(tried["last 60 % of question"].rows[0]).count(s.prompt[:4]) == 0
    raw = tried["raw prefix, no template"].rows[0]
    assert len(raw) <= 50
    assert fast.eos_token_id not in raw
    assert tried["paraphrase"].rows[0] == prompt_ids(fast, "改写")


def test_report_counts_what_the_guard_does() -> None:
    guard = PrivacyPreservingVectorDB.build(
        model(), tokenizer(), PRIVATE, ["请咨询医生。"] * len(PRIVATE), BENIGN[:60] + LOOKALIKE,
        config=PPVDConfig(store="numpy", output_guard="off"),
    )  # fmt: skip
    told: list[tuple[int, int]] = []
    memo: dict[str, list[list[int]]] = {}
    report = evaluate_guard(
        guard, PRIVATE, {"seen": BENIGN[:8]}, max_new_tokens=48, memo=memo, progress=lambda *w: told.append(w)
    )
    question = report["attacks"][0]
    assert question["attack"] == "question"
    assert question["rouge_before"] == pytest.approx(1.0)
    assert question["exact_before"] == question["matched"] == 1.0
    assert question["above_after"] == question["exact_after"] == 0.0
    assert question["absolute_drop"] == pytest.approx(question["rouge_before"] - question["rouge_after"])
    assert question["relative_drop"] == pytest.approx(question["absolute_drop"] / question["rouge_before"])
    # Inert where nothing matches: the share of equal replies is one minus the match rate.
    benign = report["benign"][0]
    assert benign["unchanged"] == pytest.approx(1 - benign["false_positives"])
    assert 0.5 < report["roc"]["area"] <= 1.0
    assert told[-1] == (7, 7)
    assert evaluate_guard(guard, PRIVATE, {"seen": BENIGN[:8]}, max_new_tokens=48, memo=memo) == report
