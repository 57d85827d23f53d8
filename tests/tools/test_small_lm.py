"""The small model's recipe: held-out text stays out, rows keep every token, perplexity is the formula."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.real_data import real_data
from tools import small_lm

TEXTS = [f"document {index} speaks of {'pears' if index % 2 else 'apples'} and rain" for index in range(60)]


def test_heldout_documents_are_one_in_twenty_and_disjoint() -> None:
    training, heldout = small_lm.split_documents(TEXTS)
    assert heldout == [TEXTS[19], TEXTS[39], TEXTS[59]]
    assert sorted(training + heldout) == sorted(TEXTS)


def test_rows_hold_the_documents_in_order_with_the_end_token_between() -> None:
    tokenizer = small_lm.train_tokenizer(TEXTS)
    rows = small_lm.blocks(tokenizer, TEXTS * 4)
    assert rows.shape[1] == small_lm.BLOCK
    text = small_lm.END.join(TEXTS * 4)
    assert text.startswith(tokenizer.decode(rows.flatten()))


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    """With a head of zeros every token has probability 1/V: perplexity V, and the argmax is token 0."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = torch.randint(1, 50, (3, 16))
    rows[0, 1:6] = 0
    value, accuracy = small_lm.perplexity(model, rows, batch_size=2)
    assert math.isclose(value, 50, rel_tol=1e-5)
    assert math.isclose(accuracy, 5 / 45)


@pytest.mark.slow
@pytest.mark.host
def test_short_run_writes_a_model_that_loads_and_is_not_trained_twice(tmp_path: Path) -> None:
    real_data("lm_text")
    small_lm.pretrain(tmp_path, num_steps=4, batch_size=2)
    note = json.loads((tmp_path / "small_lm.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    unseen = small_lm.heldout_blocks(tmp_path, tokenizer)
    assert unseen.numel() == note["heldout_tokens"]
    assert math.isclose(small_lm.perplexity(model, unseen)[0], note["heldout_perplexity"], rel_tol=1e-3)
    stamp = (tmp_path / "model.safetensors").stat().st_mtime_ns
    small_lm.pretrain(tmp_path, num_steps=4, batch_size=2)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == stamp
