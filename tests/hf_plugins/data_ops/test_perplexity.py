import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_plugins.data_ops.op import OpContext
from hf_plugins.data_ops.perplexity import PerplexityFilter, model_hash, perplexities
from tests.hf_plugins.data_ops import tiny

TEXTS = ["头痛三天", "发热咳嗽伴流涕两日余", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lm")
    # 259 entries are the special tokens and the bytes alone: no merge, three tokens a character.
    tokenizer = tiny.tokenizer(TEXTS, size=259)
    tokenizer.save_pretrained(place)
    tiny.qwen2(len(tokenizer)).save_pretrained(place)
    return place


def test_against_one_text_at_a_time(folder: Path) -> None:
    """The loop over single texts in float64 is the definition; padding must not move it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = perplexities(model, tokenizer, TEXTS, batch_size=3)
    for text, value in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if ids.shape[1] < 2:
            assert value == math.inf
            continue
        with torch.no_grad():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)
        nll = [-logs[0, i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]
        assert value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = tiny.qwen2(len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert perplexities(model, tokenizer, TEXTS[:1])[0] == pytest.approx(len(tokenizer), rel=1e-4)


def test_filter_by_limit_and_by_share(folder: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS})
    told: list[tuple[str, int, int]] = []
    context = OpContext(progress=lambda *what: told.append(what))
    op = PerplexityFilter(hf_model=str(folder), max_ppl=1e9)
    # A text of one token says nothing: its perplexity is infinite.
    assert list(op.run(data, context)["text"]) == TEXTS[:2]
    assert told[-1][1:] == (3, 3)
    half = PerplexityFilter(hf_model=str(folder), max_ppl=None, max_ratio=0.67)
    assert len(half.run(data)) == 1
    assert context.ledger.rows()[0]["reason"] == "perplexity inf too high"


def test_fingerprint_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    tiny.qwen2(300, seed=1).save_pretrained(tmp_path)
    first, second = (PerplexityFilter(hf_model=str(p)) for p in (folder, tmp_path))
    assert first.materials() != second.materials()
    assert model_hash(str(folder)) == model_hash(str(folder))


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that save_pretrained wrote"):
        model_hash(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="set max_ppl or max_ratio"):
        PerplexityFilter(hf_model="x", max_ppl=None)
    with pytest.raises(ValueError, match=r"max_ratio must lie in \[0, 1\); got 5. Write 0.05 for 5 %"):
        PerplexityFilter(hf_model="x", max_ratio=5)
