"""The loss by record is the host's loss of a batch of one, model by model."""

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_plugins.dp.loss import loss_kind, model_losses, plain_model
from tests.hf_plugins.dp import tiny

CONFIG = tiny.bert().config


def _inputs() -> dict[str, torch.Tensor]:
    return tiny.batch(tiny.written(), 4)


def _t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=tiny.WORDS, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


CASES = {
    "ForSequenceClassification": (tiny.bert, lambda: tiny.batch(tiny.classified(), 4)),
    "regression": (
        lambda: tiny.bert(labels=1),
        lambda: {**tiny.batch(tiny.classified(), 4), "labels": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    ),
    "multi label": (
        lambda: tiny.bert(labels=3),
        lambda: {**tiny.batch(tiny.classified(), 4), "labels": torch.eye(4)[:, :3]},
    ),
    "ForCausalLM": (tiny.llama, _inputs),
    "gpt2": (tiny.gpt2, _inputs),
    "lora": (lambda: tiny.lora(tiny.llama(), ["q_proj"]), _inputs),
    "ForMaskedLM": (lambda: BertForMaskedLM(CONFIG), _inputs),
    "ForTokenClassification": (
        lambda: BertForTokenClassification(CONFIG),
        lambda: {**_inputs(), "labels": _inputs()["labels"].clamp(-100, 1)},
    ),
    "ForQuestionAnswering": (
        lambda: BertForQuestionAnswering(CONFIG),
        lambda: {
            **tiny.batch(tiny.classified().remove_columns("labels"), 4),
            "start_positions": torch.tensor([0, 1, 2, 3]),
            "end_positions": torch.tensor([1, 1, 4, 5]),
        },
    ),
    "Seq2Seq": (_t5, _inputs),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_by_record_is_the_models_own_of_that_record(name: str) -> None:
    torch.manual_seed(0)
    make, rows = CASES[name]
    model, inputs = make().eval(), rows()
    own = [float(model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss) for i in range(4)]
    losses = model_losses(model, dict(inputs))
    torch.testing.assert_close(losses.detach(), torch.tensor(own), rtol=1e-5, atol=1e-6)


def test_kinds_are_the_hosts() -> None:
    assert loss_kind(tiny.bert()) == "ForSequenceClassification"
    assert loss_kind(tiny.gpt2()) == "ForCausalLM"
    assert loss_kind(_t5()) == "Seq2Seq"
    wrapped = tiny.lora(tiny.llama(), ["q_proj"])
    assert type(plain_model(wrapped)).__name__ == "LlamaForCausalLM"


def test_unknown_loss_and_missing_labels_are_refused() -> None:
    with pytest.raises(
        ValueError, match="Give compute_loss_func.outputs, labels, num_items_in_batch. that returns"
    ):
        loss_kind(torch.nn.Linear(1, 1))
    inputs = tiny.batch(tiny.written(), 2)
    inputs.pop("labels")
    with pytest.raises(ValueError, match="and no labels; the collator must make them"):
        model_losses(tiny.llama(), inputs)
