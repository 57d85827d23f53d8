"""Bit-equality of the halves for every family, partial loading, and refusals by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, T5Config, T5ForConditionalGeneration

from hf_plugins.tee_split import model as room
from hf_plugins.tee_split.model import (
    REFUSED,
    VERIFIED,
    check_supported,
    decoder_parts,
    hidden_states,
    load_half,
    split_model,
)
from hf_plugins.tee_split.split import ZeroPositions
from tests.hf_plugins.tee_split.tiny import NINE, tiny_model, tokens


def halves_equal_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    whole, batch = tiny_model(kind), tokens()
    rest = {key: batch[key] for key in ("attention_mask", "position_ids", "labels")}
    expected = whole(input_ids=batch["input_ids"], use_cache=False, **rest)
    expected.loss.backward()
    grads = {name: p.grad for name, p in whole.named_parameters() if ".layers." in name or ".h." in name}
    for k in cuts:
        client = split_model(copy.deepcopy(whole), k, "client")
        server = split_model(copy.deepcopy(whole), k, "server")
        server.zero_grad()
        hidden = hidden_states(client, batch["input_ids"], batch["attention_mask"]).requires_grad_()
        found = server(inputs_embeds=hidden, use_cache=False, **rest)
        found.loss.backward()
        assert torch.equal(found.logits, expected.logits), (kind, k)
        assert torch.equal(found.loss, expected.loss), (kind, k)
        mine = {name: p.grad for name, p in server.named_parameters() if name in grads}
        assert mine
        for name, gradient in mine.items():
            assert torch.equal(gradient, grads[name]), (kind, k, name)
        # The client's gradients follow from what the server returns for the hidden state.
        client.requires_grad_(True)
        client.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"], use_cache=False,
        ).last_hidden_state.backward(hidden.grad)  # fmt: skip
        theirs = {name: p.grad for name, p in client.named_parameters() if name in grads}
        for name, gradient in theirs.items():
            assert torch.equal(gradient, grads[name]), (kind, k, name)
        assert set(mine) | set(theirs) == set(grads)


@pytest.mark.parametrize("kind", NINE)
def test_halves_equal_the_whole_bit_by_bit(kind: str) -> None:
    halves_equal_the_whole(kind, (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(VERIFIED - set(NINE)))
def test_every_other_listed_family_too(kind: str) -> None:
    halves_equal_the_whole(kind, (1, 2, 3))


def test_gpt2_needs_its_positions_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the repair positions are added twice: the logits are off by far more than rounding."""
    whole, batch = tiny_model("gpt2"), tokens()
    client = split_model(copy.deepcopy(whole), 2, "client")
    hidden = hidden_states(client, batch["input_ids"], batch["attention_mask"])
    monkeypatch.setattr(room, "ZeroPositions", lambda embedding: embedding)
    broken = split_model(copy.deepcopy(whole), 2, "server")
    rest = {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"]}
    difference = (
        broken(inputs_embeds=hidden, **rest).logits - whole(input_ids=batch["input_ids"], **rest).logits
    ).abs()
    assert difference.max() > 0.01


def test_names_stay_those_of_the_whole_model() -> None:
    whole = tiny_model()
    server = split_model(copy.deepcopy(whole), 3, "server")
    names = {name for name, _ in server.named_parameters()}
    assert names < {name for name, _ in whole.named_parameters()}
    assert any(".layers.3." in name for name in names)
    assert not any(".layers.0." in name or "embed" in name for name in names)
    assert server.config.num_hidden_layers == 4


def test_client_is_frozen_and_has_no_head() -> None:
    client = split_model(tiny_model(), 2, "client")
    assert not client.training
    assert not any(p.requires_grad for p in client.parameters())
    assert not any("lm_head" in name or ".norm." in name for name, _ in client.named_parameters())


def test_tied_head_keeps_its_weight_on_the_server() -> None:
    whole = tiny_model(tie_word_embeddings=True)
    server = split_model(copy.deepcopy(whole), 2, "server")
    assert torch.equal(server.get_output_embeddings().weight, whole.get_output_embeddings().weight)


def test_sums_on_the_left_are_refused() -> None:
    client, batch = split_model(tiny_model(), 2, "client"), tokens()
    with pytest.raises(ValueError, match="pad on the right"):
        hidden_states(client, batch["input_ids"], batch["attention_mask"].flip(1))


@pytest.mark.parametrize("kind", [*NINE, "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_partial_loading_reads_half_and_changes_nothing(kind: str, tied: bool, tmp_path: Path) -> None:
    whole, batch = tiny_model(kind, tie_word_embeddings=tied), tokens()
    whole.save_pretrained(tmp_path)
    rest = {
        "attention_mask": batch["attention_mask"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }
    client, server = (load_half(tmp_path, 1, side) for side in ("client", "server"))
    hidden = hidden_states(client.model, batch["input_ids"], batch["attention_mask"])
    assert torch.equal(
        server.model(inputs_embeds=hidden, **rest).logits, whole(input_ids=batch["input_ids"], **rest).logits
    )
    total = sum(p.nbytes for p in whole.parameters())
    embedding = whole.get_input_embeddings().weight.nbytes
    positions = whole.base_model.wpe.weight.nbytes if kind == "gpt2" else 0
    # Each side reads its own; only a tied embedding is read by both, and GPT-2's positions by the client.
    assert client.bytes_read + server.bytes_read == total + (embedding if tied else 0)
    assert client.bytes_read < total / 2
    assert not positions or isinstance(server.model.base_model.wpe, ZeroPositions)


def test_sharded_checkpoint_and_bare_model(tmp_path: Path) -> None:
    whole, batch = tiny_model(), tokens()
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole.base_model.save_pretrained(tmp_path / "bare")
    expected = hidden_states(
        split_model(copy.deepcopy(whole), 2, "client"), batch["input_ids"], batch["attention_mask"]
    )
    for name in ("sharded", "bare"):
        client = load_half(tmp_path / name, 2, "client").model
        assert torch.equal(hidden_states(client, batch["input_ids"], batch["attention_mask"]), expected)


def test_loading_in_another_dtype(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = load_half(tmp_path, 2, "client", dtype=torch.bfloat16).model
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    # Rotary frequencies keep their precision.
    assert model.base_model.rotary_emb.inv_freq.dtype == torch.float32


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    whole = tiny_model()
    whole.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="save the model with save_pretrained first"):
        load_half(tmp_path, 2, "client")
    whole.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if ".layers.1.mlp" not in name}
    from safetensors.torch import save_file

    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="Load the whole model with from_pretrained"):
        load_half(tmp_path, 2, "client")
    assert load_half(tmp_path, 2, "server").bytes_read > 0


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_work_is_refused_by_name_with_the_reason(kind: str) -> None:
    config = LlamaConfig()
    config.model_type = kind
    with pytest.raises(NotImplementedError, match=f"{kind}' cannot be split: "):
        check_supported(config)
    model = tiny_model()
    model.config.model_type = kind
    with pytest.raises(NotImplementedError, match="cannot be split"):
        split_model(model, 2, "client", allow_unverified=True)


def test_unlisted_types_need_a_word(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.model_type = "brand_new"
    with pytest.raises(NotImplementedError, match="has not been verified. Run `mmhf tee-split verify"):
        split_model(model, 2, "client")
    assert split_model(model, 2, "client", allow_unverified=True) is model


def test_embedding_multiplier_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Fold the factor into the embedding weights"):
        split_model(tiny_model("granite", embedding_multiplier=2.0), 2, "client")


def test_models_of_another_build_are_refused() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        decoder_parts(t5)
    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            is_decoder=True,
        )
    )
    with pytest.raises(NotImplementedError, match="has no final norm under"):
        decoder_parts(bert)


def test_both_lists_do_not_overlap() -> None:
    assert not VERIFIED & set(REFUSED)
    assert set(NINE) < VERIFIED


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/out.safetensors", "a/b.safetensors"])
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="is not a file of that folder. Do not trust this checkpoint"):
        room._index(tmp_path)
