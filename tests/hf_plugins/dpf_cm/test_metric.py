from pathlib import Path
from typing import Any

import pytest

from hf_plugins.dpf_cm import metric
from hf_plugins.dpf_cm.config import PPVDConfig
from hf_plugins.dpf_cm.hook import answer_ids, prompt_ids
from hf_plugins.dpf_cm.metric import attacks, evaluate_guard, leakage, search_memory
from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB, Sample
from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, stranger, tokenizer


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


def test_search_finds_all_of_a_memory_and_none_of_a_stranger(tmp_path: Path) -> None:
    found = search_memory(model(), tokenizer(), PRIVATE, journal=tmp_path / "j")
    assert [m.memorised for m in found] == [True] * len(PRIVATE)
    assert [m.rouge for m in found] == [1.0] * len(PRIVATE)
    assert [m.id for m in found] == [s.id for s in PRIVATE]
    assert not any(m.memorised for m in search_memory(stranger(), tokenizer(), PRIVATE))


def test_threshold_is_strict() -> None:
    """ROUGE-L 1 is not above 1."""
    assert not any(m.memorised for m in search_memory(model(), tokenizer(), PRIVATE[:2], threshold=1.0))


def test_early_exit_and_screen_change_no_verdict() -> None:
    """Half of the answers are swapped: those are not memorised, the others are, whatever is skipped."""
    mixed = [
        Sample(s.id, s.prompt, PRIVATE[(i + 1) % 8].answer if i % 2 else s.answer)
        for i, s in enumerate(PRIVATE)
    ]
    mixed.append(Sample("new", "完全没有见过的问题", "完全没有见过的回答内容，和别的都不一样。"))
    full = search_memory(model(), tokenizer(), mixed, early_exit=False)
    verdicts = [m.memorised for m in full]
    assert verdicts == [True, False] * 4 + [False]
    early = search_memory(model(), tokenizer(), mixed)
    assert [m.memorised for m in early] == verdicts
    assert all(a.rouge >= b.rouge - 1e-12 for a, b in zip(early, full, strict=True))
    screened = search_memory(model(), tokenizer(), mixed, screen=0.5)
    assert [m.memorised for m in screened] == verdicts


def test_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "j.jsonl"
    done = search_memory(model(), tokenizer(), PRIVATE[:4], journal=journal)
    # A line that was cut by the kill.
    journal.write_text(journal.read_text()[:-20])
    decoded: list[str] = []
    original = metric._decode

    def counted(m: Any, t: Any, batch: Any, *rest: Any) -> Any:
        decoded.extend(s.id for s in batch)
        return original(m, t, batch, *rest)

    monkeypatch.setattr(metric, "_decode", counted)
    told: list[tuple[int, int]] = []
    found = search_memory(model(), tokenizer(), PRIVATE, journal=journal, progress=lambda *w: told.append(w))
    assert len(decoded) == 5
    assert found[:4] == done
    assert told[-1] == (8, 8)
    search_memory(model(), tokenizer(), PRIVATE, journal=journal)
    assert len(decoded) == 5
    # Another threshold is another question.
    search_memory(model(), tokenizer(), PRIVATE[:1], journal=journal, threshold=0.9)
    assert len(decoded) == 6


def test_repeated_ids() -> None:
    with pytest.raises(ValueError, match="samples need ids of their own; some repeat"):
        search_memory(model(), tokenizer(), [PRIVATE[0], PRIVATE[0]])
