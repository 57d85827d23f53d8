"""The parrot itself: shapes, masks, losses, saving, bad input."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model

from hf_plugins.embed_parrot.inversion import HotmapEmbedInversion, RidgeInversion
from hf_plugins.embed_parrot.model import EmbedParrot, EmbedParrotConfig, small_decoder


def _parrot(**options: object) -> EmbedParrot:
    torch.manual_seed(0)
    options = {"target_hidden_size": 12, "decoder": small_decoder(2, 64, num_positions=16)} | options
    return EmbedParrot(EmbedParrotConfig(**options)).eval()


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(30, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))


LABELS = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(2))


def test_loss_is_the_angle_to_the_embedding(table: torch.Tensor, hidden: torch.Tensor) -> None:
    parrot = _parrot().set_codebook(table)
    found = parrot(hidden, labels=LABELS)
    assert found.embeds.shape == hidden.shape
    expected = 1 - torch.cosine_similarity(found.embeds, table[LABELS], dim=-1).mean()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(parrot(hidden, labels_embeds=table[LABELS]).loss, expected)
    assert parrot(hidden).loss is None


@pytest.mark.parametrize("loss", ["cosine", "cosine_ce"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_neither_loss_nor_gradient(
    loss: str, causal: bool, table: torch.Tensor, hidden: torch.Tensor
) -> None:
    """Whatever stands in the padding; only a bidirectional or padded row could see it, and must not."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    values = []
    for filling in (0.0, 1e3):
        parrot = _parrot(loss=loss, causal=causal).set_codebook(table)
        padded = torch.where(mask.bool()[..., None], hidden, torch.tensor(filling))
        labels = torch.where(mask.bool(), LABELS, torch.tensor(-100 if filling else 3))
        out = parrot(padded, attention_mask=mask, labels=labels)
        out.loss.backward()
        values.append((out.loss, [p.grad.clone() for p in parrot.parameters() if p.grad is not None]))
    assert torch.equal(values[0][0], values[1][0])
    assert all(torch.equal(a, b) for a, b in zip(values[0][1], values[1][1], strict=True))
    alone = _parrot(loss=loss, causal=causal).set_codebook(table)(hidden[:1, :4]).embeds
    both = _parrot(loss=loss, causal=causal)(hidden, attention_mask=mask).embeds
    torch.testing.assert_close(both[:1, :4], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["cosine", "cosine_ce"])
def test_tokens_without_label_do_not_count(loss: str, table: torch.Tensor, hidden: torch.Tensor) -> None:
    parrot = _parrot(loss=loss).set_codebook(table)
    labels = LABELS.clone()
    labels[:, 3:] = -100
    expected = parrot(hidden[:, :3], labels=LABELS[:, :3]).loss
    torch.testing.assert_close(parrot(hidden, labels=labels).loss, expected)


@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
@pytest.mark.parametrize("causal", [True, False])
def test_switch_of_the_mask_binds_any_decode_model(decoder: str, causal: bool, hidden: torch.Tensor) -> None:
    bert = BertConfig(
        vocab_size=1, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    ).to_diff_dict() | {"model_type": "bert"}
    parrot = _parrot(causal=causal, decoder=small_decoder(2, 64) if decoder == "gpt2" else bert)
    moved = hidden.clone()
    moved[:, -1] += 1
    change = (parrot(moved).embeds - parrot(hidden).embeds).abs().amax((0, 2))
    assert change[-1] > 0.01
    assert (change[:-1] == 0).all() if causal else (change[:-1] > 0).all()


def test_adapter_alone_learns_when_the_decoder_is_frozen(
    table: torch.Tensor, hidden: torch.Tensor, tmp_path: Path
) -> None:
    parrot = _parrot(decoder_trainable=False).set_codebook(table)
    parrot(hidden, labels=LABELS).loss.backward()
    learning = {name.split(".")[0] for name, p in parrot.named_parameters() if p.grad is not None}
    assert learning == {"adapter_in", "adapter_out"}
    parrot.save_pretrained(tmp_path)
    again = EmbedParrot.from_pretrained(tmp_path)
    assert {name.split(".")[0] for name, p in again.named_parameters() if p.requires_grad} == learning


def test_every_parameter_gets_a_gradient(table: torch.Tensor, hidden: torch.Tensor) -> None:
    """DDP waits for the gradient of each parameter; none may be without use."""
    parrot = _parrot().set_codebook(table)
    parrot(hidden, labels=LABELS).loss.backward()
    assert [name for name, p in parrot.named_parameters() if p.requires_grad and p.grad is None] == []


def test_saved_and_loaded_is_the_same(table: torch.Tensor, hidden: torch.Tensor, tmp_path: Path) -> None:
    parrot = _parrot(linear_skip=True, loss="cosine_ce", tau=7.0, layer=3).set_codebook(table)
    parrot.save_pretrained(tmp_path)
    for again in (EmbedParrot.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        again.set_codebook(table)
        assert torch.equal(again(hidden, labels=LABELS).loss, parrot(hidden, labels=LABELS).loss)
        assert (again.config.layer, again.config.tau) == (3, 7.0)
    assert (tmp_path / "model.safetensors").stat().st_size < 600_000


def test_starting_from_ridge_is_ridge(table: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 30, (300,), generator=generator)
    states = table[ids] @ torch.randn(12, 12, generator=generator) + 1
    ridge = RidgeInversion(table).update(states, ids)
    ridge.solve()
    parrot = _parrot(linear_skip=True).set_codebook(table).start_from_ridge(ridge.weight_DE)
    torch.testing.assert_close(
        parrot(states[None, :16]).embeds[0], ridge.to_embeddings(states[:16]), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(parrot.top(states[:16]).ids_TK[:, 0], ridge(states[:16]))
    assert not parrot.skip.weight.requires_grad
    with pytest.raises(ValueError, match="start_from_ridge needs a parrot made with linear_skip=True"):
        _parrot().start_from_ridge(ridge.weight_DE)


def test_top_is_hei_on_the_estimate(table: torch.Tensor, hidden: torch.Tensor) -> None:
    parrot = _parrot().set_codebook(table)
    expected = HotmapEmbedInversion(table)(parrot(hidden[:1]).embeds[0])
    assert torch.equal(parrot.top(hidden[0]).ids_TK[:, 0], expected)


@pytest.mark.parametrize("kind", [GPT2Model, BertModel])
def test_decode_model_from_published_weights(kind: type, tmp_path: Path, hidden: torch.Tensor) -> None:
    small = GPT2Config(n_embd=64, n_layer=1, n_head=1, vocab_size=50, bos_token_id=None, eos_token_id=None)
    bert = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    )
    torch.manual_seed(5)
    source = kind(small if kind is GPT2Model else bert)
    source.save_pretrained(tmp_path / "source")
    parrot = EmbedParrot.from_decoder(str(tmp_path / "source"), target_hidden_size=12, layer=2).eval()
    name = "h.0.mlp.c_fc.weight" if kind is GPT2Model else "encoder.layer.0.output.dense.weight"
    assert torch.equal(parrot.decoder.state_dict()[name], source.state_dict()[name])
    assert not [key for key in parrot.state_dict() if "wte" in key or "word_embeddings" in key]
    parrot.save_pretrained(tmp_path / "parrot")
    again = EmbedParrot.from_pretrained(tmp_path / "parrot").eval()
    assert torch.equal(again(hidden).embeds, parrot(hidden).embeds)


def test_positions_may_be_given_for_padding_on_the_left(hidden: torch.Tensor) -> None:
    parrot = _parrot()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], list(range(6))])
    padded = parrot(hidden, attention_mask=mask, position_ids=positions).embeds
    torch.testing.assert_close(padded[0, 2:], parrot(hidden[:1, 2:]).embeds[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(
        ValueError, match="states are padded on the left; pad on the right or pass position_ids"
    ):
        parrot(hidden, attention_mask=mask)


def test_bad_input(hidden: torch.Tensor, table: torch.Tensor) -> None:
    parrot = _parrot()
    with pytest.raises(ValueError, match=r"hidden_states must be \(batch, positions, 12\); got \(2, 6, 11\)"):
        parrot(hidden[..., :11])
    with pytest.raises(
        ValueError, match="17.* positions, but the decode model has .*16.*; cut the texts into windows"
    ):
        parrot(torch.randn(1, 17, 12))
    with pytest.raises(ValueError, match="the batch holds no token"):
        parrot(hidden[:, :0])
    with pytest.raises(ValueError, match="the batch holds no token"):
        parrot(hidden, attention_mask=torch.zeros(2, 6))
    broken = hidden.clone()
    broken[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="hidden_states hold NaN or infinity; look for overflow"):
        parrot(broken)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [1] * 6])
    assert torch.isfinite(parrot(broken, attention_mask=mask).embeds[mask.bool()]).all()
    with pytest.raises(RuntimeError, match="this parrot knows no codebook; call set_codebook"):
        parrot(hidden, labels=LABELS)
    with pytest.raises(
        ValueError, match="the codebook is .*11.* wide, this parrot serves a model of width .*12"
    ):
        parrot.set_codebook(table[:, :11])
    with pytest.raises(ValueError, match="loss='cosine_ce' compares with tokens; pass labels"):
        _parrot(loss="cosine_ce").set_codebook(table)(hidden, labels_embeds=table[LABELS])


def test_bad_config() -> None:
    with pytest.raises(ValueError, match=r"loss must be 'cosine' \(the paper\) or 'cosine_ce'; got .*'mse'"):
        EmbedParrotConfig(loss="mse")
    with pytest.raises(ValueError, match="tau must be > 0; got .*0.0"):
        EmbedParrotConfig(tau=0.0)
