import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_plugins.dpf_cm import model as room
from hf_plugins.dpf_cm.calibration import CalibrationError
from hf_plugins.dpf_cm.config import PPVDConfig
from hf_plugins.dpf_cm.hook import answer_ids, left_pad, prompt_ids
from hf_plugins.dpf_cm.keys import sign_projection, sketch
from hf_plugins.dpf_cm.model import PPVDLogitsProcessor, PrivacyPreservingVectorDB
from hf_plugins.dpf_cm.rouge import rouge_l
from tests.hf_plugins.dpf_cm import memorised
from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, stranger, tokenizer

KEY = b"0123456789abcdef0123456789abcdef"
SAFE = [f"这个问题请直接咨询医生。{i}" for i in range(len(PRIVATE))]
PUBLIC = BENIGN[:60] + LOOKALIKE


def build(folder: Path | None = None, net: Any = None, **options: Any) -> PrivacyPreservingVectorDB:
    key = KEY if options.get("protect", "none") != "none" else None
    config = PPVDConfig(**({"store": "numpy"} | options))
    return PrivacyPreservingVectorDB.build(
        net or model(), tokenizer(), PRIVATE, SAFE, PUBLIC, config=config, folder=folder, key=key
    )


@pytest.fixture(scope="module")
def guard() -> PrivacyPreservingVectorDB:
    return build()


def padded(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return left_pad([prompt_ids(tokenizer(), p) for p in prompts], tokenizer(), "cpu")


def texts(out: torch.Tensor, start: int) -> list[str]:
    return tokenizer().batch_decode(out[:, start:], skip_special_tokens=True)


def plain(prompts: list[str], **options: Any) -> torch.Tensor:
    ids, mask = padded(prompts)
    return model().generate(
        input_ids=ids, attention_mask=mask, **({"do_sample": False, "max_new_tokens": 40} | options)
    )


def guarded(guard: PrivacyPreservingVectorDB, prompts: list[str], **options: Any) -> torch.Tensor:
    ids, mask = padded(prompts)
    return guard.generate(ids, mask, **({"do_sample": False, "max_new_tokens": 40} | options))


def test_exact_prompts_match_with_cosine_one(guard: PrivacyPreservingVectorDB) -> None:
    found = guard.match([s.prompt for s in PRIVATE])
    assert [m.sample for m in found if m] == [s.id for s in PRIVATE]
    assert all(m is not None and abs(m.cosine - 1) < 1e-5 for m in found)
    assert guard.calibration is not None
    assert guard.calibration.true_positive_rate == 1.0
    assert guard.calibration.false_positive_rate <= 0.01


def test_answer_prefixes_match_by_their_own_keys(guard: PrivacyPreservingVectorDB) -> None:
    """Prompt and 50 % of the answer hit the third key of their sample (prompt, 25, 50, 75 %)."""
    rows, half = [], []
    for s in PRIVATE:
        q, a = prompt_ids(tokenizer(), s.prompt), answer_ids(tokenizer(), s.answer)
        rows.append(q + a[: -(-len(a) // 2)])
        half.append(s.id)
    found = guard.match_ids(rows)
    assert [(m.sample, m.slot) for m in found if m] == [(name, 2) for name in half]


def test_prompt_only_keys_miss_answer_prefixes_and_whole_samples_miss_prompts() -> None:
    """Why several keys: each single design of the paper's reading misses an attack."""
    pairs = [(prompt_ids(tokenizer(), s.prompt), answer_ids(tokenizer(), s.answer)) for s in PRIVATE]
    rows = [q + a[: 3 * len(a) // 4] for q, a in pairs]
    whole = build(key_points=(1.0,), whiten=False, threshold=0.97, min_tpr=0.0, max_fpr=0.9)
    assert whole.calibration is not None
    # The model is trained here, so that a machine's rounding moves single prompts across the threshold.
    assert whole.calibration.true_positive_rate <= 0.25
    assert sum(map(bool, whole.match([s.prompt for s in PRIVATE]))) <= 2
    assert all(build().match_ids(rows))


def test_guarded_rows_get_their_safe_answer_and_others_are_untouched(
    guard: PrivacyPreservingVectorDB,
) -> None:
    off = build(output_guard="off")
    quiet = [prompt for prompt in BENIGN if off.match([prompt]) == [None]]
    # The threshold was set on the first 60 of 96; most of the others are quiet too.
    assert len(quiet) > 80
    prompts = [PRIVATE[0].prompt, quiet[-1], PRIVATE[5].prompt, quiet[-2]]
    out, ref = guarded(off, prompts), plain(prompts)
    start = padded(prompts)[0].shape[1]
    assert texts(out, start)[0] == SAFE[0]
    assert texts(out, start)[2] == SAFE[5]
    assert texts(ref, start)[0] == PRIVATE[0].answer
    for row in (1, 3):
        assert texts(out, start)[row] == texts(ref, start)[row]
    assert [m.sample if m else None for m in off.last_matches] == ["p0", None, "p5", None]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 2},
    ],
)
def test_no_match_is_token_identical(options: dict[str, Any]) -> None:
    prompts = BENIGN[70:74]
    off = build(output_guard="off")
    torch.manual_seed(0)
    a = plain(prompts, **options)
    torch.manual_seed(0)
    b = guarded(off, prompts, **options)
    assert torch.equal(a, b)


def test_limits_of_the_threshold() -> None:
    """Above 1 nothing is replaced, at -1 everything is; an empty store is inert."""
    prompts = [PRIVATE[0].prompt, BENIGN[75]]
    inert = build(threshold=1.1, min_tpr=0.0, output_guard="off")
    assert torch.equal(guarded(inert, prompts), plain(prompts))
    empty = PrivacyPreservingVectorDB.build(
        model(), tokenizer(), [], [], PUBLIC, config=PPVDConfig(store="numpy")
    )
    assert torch.equal(guarded(empty, prompts), plain(prompts))
    assert len(empty) == 0
    assert empty.match(prompts) == [None, None]


def test_threshold_minus_one_replaces_always(
    guard: PrivacyPreservingVectorDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivacyPreservingVectorDB, "threshold", -1.01)
    prompts = [BENIGN[75], BENIGN[76]]
    out = texts(guarded(guard, prompts), padded(prompts)[0].shape[1])
    assert set(out) <= set(SAFE)


def test_after_guarding_the_leak_is_that_of_the_safe_answers(guard: PrivacyPreservingVectorDB) -> None:
    """Fact 10: mean ROUGE-L behind the guard equals mean ROUGE-L of safe and private answers."""
    prompts = [s.prompt for s in PRIVATE]
    out = texts(guarded(guard, prompts), padded(prompts)[0].shape[1])
    after = [rouge_l(list(t), list(s.answer)) for t, s in zip(out, PRIVATE, strict=True)]
    safe = [rouge_l(list(t), list(s.answer)) for t, s in zip(SAFE, PRIVATE, strict=True)]
    assert after == safe
    assert sum(after) / len(after) < 0.3


def test_blocking_breaks_a_leak_that_starts_elsewhere() -> None:
    """Keys that match nothing (threshold above 1): only the n-grams stand before the answer."""
    open_door = build(threshold=1.1, min_tpr=0.0, ngram=4)
    prompts = [s.prompt for s in PRIVATE]
    start = padded(prompts)[0].shape[1]
    out = guarded(open_door, prompts)
    for text, sample in zip(texts(out, start), PRIVATE, strict=True):
        assert text != sample.answer
    for row in out[:, start:].tolist():
        assert open_door._grams.hits(row) == {}


def test_replacing_a_leak_at_the_end() -> None:
    guard = build(threshold=1.1, min_tpr=0.0, output_guard="replace", ngram=4)
    prompts = [PRIVATE[0].prompt, BENIGN[75]]
    start = padded(prompts)[0].shape[1]
    out = texts(guarded(guard, prompts, max_new_tokens=60), start)
    assert out[0] == SAFE[0]
    assert guard.leaks(PRIVATE[3].answer) == "p3"
    assert guard.leaks("今天天气很好") is None
    as_dict = guarded(guard, prompts, max_new_tokens=60, return_dict_in_generate=True)
    assert texts(as_dict.sequences, start)[0] == SAFE[0]


def test_ways_around_the_guard_are_refused(guard: PrivacyPreservingVectorDB) -> None:
    ids, mask = padded([BENIGN[0]])
    with pytest.raises(ValueError, match="the guard judges rows, not beams; use num_beams=1"):
        guard.generate(ids, mask, num_beams=2)
    with pytest.raises(ValueError, match="does not see through .*prompt_lookup_num_tokens"):
        guard.generate(ids, mask, prompt_lookup_num_tokens=3)
    processor = PPVDLogitsProcessor(guard, mask, 2)
    with pytest.raises(RuntimeError, match="did not see the prompt in one piece"):
        processor(ids, torch.zeros(1, 10))


def test_own_processors_still_run(guard: PrivacyPreservingVectorDB) -> None:
    seen = []

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return scores

    guarded(guard, [BENIGN[70]], max_new_tokens=3, logits_processor=[watch])
    assert len(seen) == 3


# --- keeping


@pytest.mark.parametrize("store", ["numpy", "lancedb"])
@pytest.mark.parametrize("protect", ["none", "encrypt", "sketch"])
def test_stored_guard_answers_as_the_built_one(store: str, protect: str, tmp_path: Path) -> None:
    key = None if protect == "none" else KEY
    built = build(tmp_path, store=store, protect=protect)
    opened = PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer(), key=key)
    prompts = [s.prompt for s in PRIVATE] + BENIGN[60:70]
    found = [[m and (m.sample, m.slot) for m in guard.match(prompts)] for guard in (opened, built)]
    assert found[0] == found[1]
    # Keys are computed in other batches: equal to rounding.
    assert opened.calibration == pytest.approx(built.calibration, abs=1e-5)
    assert all(opened.match([s.prompt for s in PRIVATE]))
    assert opened.safe_answer("p3") == SAFE[3]
    assert opened.leaks(PRIVATE[3].answer) == "p3"
    if protect != "none":
        for wrong in (None, b"x"):
            with pytest.raises(ValueError, match="needs a key of 32 bytes that lies elsewhere"):
                PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer(), key=wrong)
        stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
        assert KEY not in stored


def test_private_text_is_never_written(tmp_path: Path) -> None:
    build(tmp_path, store="lancedb")
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for sample in PRIVATE:
        assert sample.answer.encode() not in stored
        assert json.dumps(sample.answer)[1:-1].encode() not in stored


def _read_back(train: torch.Tensor, keys: torch.Tensor, bags: list[set[int]]) -> torch.Tensor:
    """Scores (N, V) of the linear attack of `hf_plugins.embed_parrot`, fitted on keys of known text."""
    from hf_plugins.embed_parrot import RidgeInversion

    # One-hot targets: the map's output is how strongly a key speaks for each token.
    ridge = RidgeInversion(torch.eye(len(tokenizer())))
    sizes = torch.tensor([len(bag) for bag in bags])
    ridge.update(train.repeat_interleave(sizes, 0), torch.tensor([t for bag in bags for t in sorted(bag)]))
    ridge.solve(penalties=(1e-6,))
    assert ridge.weight_DE is not None
    return torch.cat([keys, torch.ones(len(keys), 1)], 1).double() @ ridge.weight_DE.double()


def test_inversion_reads_plain_keys_and_no_sketches() -> None:
    """Fact 12: what an attacker with the model and the store recovers of the private part of the prompts.

    He knows the form of the prompts and fits on other people's. Rate: share of a prompt's tokens outside the
    form among as many best guesses; guessing the commonest tokens gives .29. With a sketch he has no pairs of
    text and code, so he makes them with a key of his own; the last line shows what they would be worth.
    """
    names, ills = memorised._NAMES, memorised._ILLS
    others = [
        f"病人{name}今年{(7 * a + 11 * b) % 60 + 20}岁，查出{ill}，应当怎么办？"
        for a, name in enumerate(names)
        for b, ill in enumerate(ills)
        if a >= 8 or a != b
    ]
    special = set(tokenizer().all_special_ids)

    def bag(text: str) -> set[int]:
        return set(prompt_ids(tokenizer(), text)) - special

    bags = [bag(text) for text in others]
    form = set.intersection(*bags)

    def rate(scores: torch.Tensor) -> float:
        scores = scores.index_fill(1, torch.tensor(sorted(form)), -torch.inf)
        shares = []
        for row, sample in zip(scores, PRIVATE, strict=True):
            wanted = bag(sample.prompt) - form
            shares.append(len(wanted & set(row.topk(len(wanted)).indices.tolist())) / len(wanted))
        return sum(shares) / len(shares)

    found = {}
    for protect in ("none", "sketch"):
        guard = build(protect=protect, sketch_bits=512)
        rows = guard.store.load()
        keys = torch.from_numpy(rows.vectors[rows.slots == 0])
        states = room._prompt_states(guard.reader, others, guard.config)
        assert guard.whitening is not None
        # The whitening is not secret: it lies beside the store.
        mine = guard.whitening(states)
        if protect == "sketch":
            found["known pairs"] = rate(_read_back(guard._key(states), keys, bags))
            mine = sketch(mine, sign_projection(b"attacker's own secret", mine.shape[1], 512))
        found[protect] = rate(_read_back(mine, keys, bags))
    counts = torch.zeros(len(tokenizer()))
    for known in bags:
        counts[sorted(known)] += 1
    guess = rate(counts.expand(len(PRIVATE), -1))
    assert found["none"] > guess + 0.3
    assert found["sketch"] < guess + 0.1
    assert found["known pairs"] > guess + 0.1


def test_another_model_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(ValueError, match="was made for other weights.*Build it anew"):
        PrivacyPreservingVectorDB.open(tmp_path, stranger(), tokenizer())
    with pytest.raises(FileNotFoundError, match="build one with `mmhf dpf-cm ppvd build`"):
        PrivacyPreservingVectorDB.open(tmp_path / "none", model(), tokenizer())


@pytest.mark.parametrize("kind", ["lancedb", "numpy"])
def test_a_guard_whose_keys_are_gone_does_not_open(kind: str, tmp_path: Path) -> None:
    """An empty store would let everything through without a word."""
    build(tmp_path, store=kind)
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="samples, and its store holds .*0: keys"):
        PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer())
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", tmp_path / "store")
    assert len(PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer())) == 8


def test_a_kill_amid_forget_leaves_a_guard_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = build(tmp_path, store="numpy")
    monkeypatch.setattr(guard.store, "delete", lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard.forget(["p3"])
    opened = PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer())
    assert len(opened) == 8
    assert opened.forget(["p3"]) == 1
    assert len(PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer())) == 7


@pytest.mark.parametrize("protect", ["none", "encrypt"])
def test_forget_and_add(protect: str, tmp_path: Path) -> None:
    guard = build(tmp_path, store="lancedb", protect=protect)
    assert guard.forget(["p3", "p3", "unknown"]) == 1
    assert len(guard) == 7
    found = guard.match([PRIVATE[3].prompt, PRIVATE[4].prompt])
    assert found[1] is not None
    assert found[0] is None or found[0].sample != "p3"
    assert guard.leaks(PRIVATE[3].answer) != "p3"
    key = KEY if protect == "encrypt" else None
    opened = PrivacyPreservingVectorDB.open(tmp_path, model(), tokenizer(), key=key)
    assert len(opened) == 7
    opened.add([PRIVATE[3]], ["新的安全回答"])
    assert opened.safe_answer("p3") == "新的安全回答"
    again = opened.match([PRIVATE[3].prompt])[0]
    assert again is not None
    assert again.sample == "p3"
    with pytest.raises(ValueError, match=r"samples p3.* are stored already; forget\(\) them first"):
        opened.add([PRIVATE[3]], ["x"])
    assert opened.forget([s.id for s in PRIVATE]) == 8
    assert opened.match([PRIVATE[0].prompt]) == [None]
    # Another process that still has the old keys in memory reads anew.
    guard.refresh()
    assert len(guard) == 0


def test_guard_refuses_to_start(tmp_path: Path) -> None:
    """Benign prompts that are the private ones: no threshold keeps both promises, and nothing is stored."""
    config = PPVDConfig(store="numpy")
    with pytest.raises(CalibrationError, match="would let"):
        PrivacyPreservingVectorDB.build(
            model(),
            tokenizer(),
            PRIVATE,
            SAFE,
            [s.prompt for s in PRIVATE] * 4,
            config=config,
            folder=tmp_path,
        )
    assert not (tmp_path / "ppvd.json").exists()
    assert not list(tmp_path.rglob("keys.npz"))


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="give one safe answer a sample; got .*1 for 8"):
        PrivacyPreservingVectorDB.build(model(), tokenizer(), PRIVATE, ["x"], PUBLIC)
    with pytest.raises(ValueError, match="3.* benign prompts cannot calibrate a guard; give some hundred"):
        PrivacyPreservingVectorDB.build(model(), tokenizer(), PRIVATE, SAFE, PUBLIC[:3])


def test_suffix_keys_catch_prompts_that_lost_their_beginning() -> None:
    ends = [s.prompt[len(s.prompt) - round(0.6 * len(s.prompt)) :] for s in PRIVATE]
    with_ends = build(suffix_points=(0.6,))
    found = with_ends.match(ends)
    assert [m.sample for m in found if m] == [s.id for s in PRIVATE]
    assert all(m is not None and m.cosine > 1 - 1e-5 for m in found)
