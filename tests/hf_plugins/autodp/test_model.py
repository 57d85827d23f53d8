from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_plugins.autodp.held_out import IGNORED, row_losses
from hf_plugins.autodp.model import LessSelector, encode_pairs, encode_texts, write_demo
from hf_plugins.data_ops.op import OpContext
from tests.hf_plugins.autodp.tiny import PAIRS, rows
from tests.real_data import minilm


@pytest.fixture
def op(tmp_path: Path, model_folder: Path) -> LessSelector:
    rows(PAIRS[50:54]).save_to_disk(str(tmp_path / "anchors"))
    return LessSelector(
        hf_model=str(model_folder),
        anchors=str(tmp_path / "anchors"),
        checkpoints=1,
        warmup_ratio=0.2,
        lora_r=4,
        lora_alpha=8,
        projection_dim=256,
        max_length=64,
        use_cpu=True,
    )


def test_a_copy_of_an_anchor_scores_high_and_noise_low(op: LessSelector) -> None:
    noise = [("zq xk?", "xj qz kw vv zz qx jk wq zx"), ("#@!", "%$ #@ !! ?? ~~")]
    table = rows([*PAIRS[:8], PAIRS[50], *noise])
    context = OpContext()
    scores = op.scores(table, context)
    assert scores.abs().max() <= 1 + 1e-5
    assert scores[8] > scores[9:].max()
    found = op.run(table, context)
    assert len(found) == 6
    assert context.ledger.counts() == {("less_selector", "dropped"): 5}
    assert op.scores(table, OpContext()).tolist() == scores.tolist()


def test_all_checkpoints_enter(op: LessSelector) -> None:
    """Regression, defect 10: the release used the last checkpoint four times. One checkpoint here is the
    score of one epoch, so more epochs must change it, and the fingerprint too.
    """
    table = rows(PAIRS[:12])
    more = replace(op, checkpoints=3, learning_rate=1e-2)
    one = replace(op, learning_rate=1e-2)
    assert not torch.allclose(more.scores(table, OpContext()), one.scores(table, OpContext()))
    assert more.fingerprint() != one.fingerprint()


def test_fingerprint_follows_content_not_places(op: LessSelector, tmp_path: Path) -> None:
    rows(PAIRS[50:54]).save_to_disk(str(tmp_path / "elsewhere"))
    rows(PAIRS[50:55]).save_to_disk(str(tmp_path / "other"))
    assert replace(op, anchors=str(tmp_path / "elsewhere")).fingerprint() == op.fingerprint()
    assert replace(op, anchors=str(tmp_path / "other")).fingerprint() != op.fingerprint()


def test_gradient_of_a_row_is_that_of_its_answer(op: LessSelector, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (prompt, answer), empty = encode_pairs(tokenizer, rows([PAIRS[0], ("", "")]), 64)
    assert tokenizer.decode(prompt) == PAIRS[0][0] + "\n"
    assert answer[-1] == tokenizer.eos_token_id
    assert len(empty[0]) >= 1
    assert empty[1] == [tokenizer.eos_token_id]
    labels = torch.tensor([[IGNORED] * len(prompt) + answer])
    loss = row_losses(model(torch.tensor([prompt + answer])).logits, labels)[0]
    assert loss.requires_grad


def test_encode_pairs_keeps_the_answer(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ((prompt, answer),) = encode_pairs(tokenizer, rows([("why " * 100, "because")]), 20)
    assert len(prompt) + len(answer) == 20
    assert tokenizer.decode(answer[:-1]) == "because"


def test_the_demo_is_disjoint_and_half_spoilt(tmp_path: Path) -> None:
    from hf_plugins.autodp.dataset import ANSWER, QUESTION, read_rows

    write_demo(tmp_path)
    parts = {name: read_rows(tmp_path / f"{name}.jsonl") for name in ("rows", "dev", "test")}
    assert len(parts["rows"]) == 96
    held = set(parts["dev"][QUESTION]) | set(parts["test"][QUESTION])
    assert not held & set(parts["rows"][QUESTION])
    spoilt = [a for a in parts["rows"][ANSWER] if not a.endswith("does not stop.")]
    assert 40 <= len(spoilt) <= 48
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 2


@pytest.mark.real
def test_a_real_encoder_puts_like_texts_together() -> None:
    found = encode_texts(str(minilm()), ["A man is eating food.", "Someone eats a meal.", "The stock fell."])
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    # The documented cosine of this pair is 0.7614.
    assert found[0] @ found[1] == pytest.approx(0.7614, abs=2e-3)
    assert found[0] @ found[2] < 0.3
