"""Finding, dropping and bypassing layers, on tiny models of the library's real classes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from hf_plugins import decoder_layers
from hf_plugins.decoder_layers import (
    bypass_layers,
    check_droppable,
    drop_layers,
    find_decoder_layers,
    layer_prefix,
    renumber_layers,
    shorten_config,
    watch_layers,
)
from tests.hf_plugins import tiny_models

FAMILIES = [*tiny_models.CAUSAL, "bert"]
DROPPED = (0, 2, 3)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.token_ids()).logits


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("bert", "bert.encoder.layer"),
        ("gemma2", "model.layers"),
    ],
)
def test_find(family: str, name: str) -> None:
    model = tiny_models.build(family)
    found = find_decoder_layers(model)
    assert found.name == name
    assert len(found.modules) == 6
    assert found.config is model.config.get_text_config()


def test_find_refuses_what_it_cannot_know() -> None:
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        find_decoder_layers(tiny_models.t5())
    albert = AlbertForSequenceClassification(
        AlbertConfig(
            hidden_size=8, num_attention_heads=2, intermediate_size=8, embedding_size=8, vocab_size=9
        )
    )
    with pytest.raises(ValueError, match="has 0 lists of num_hidden_layers=12"):
        find_decoder_layers(albert)


def test_find_takes_the_text_layers_where_two_lists_have_one_length() -> None:
    """As in a multimodal model: the tower's owner has another config."""
    model = tiny_models.build("llama", 2)
    tower = nn.Module()
    tower.config = LlamaConfig()
    tower.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    model.tower = tower
    assert find_decoder_layers(model).name == "model.layers"


@pytest.mark.parametrize("family", FAMILIES)
def test_short_model_is_the_long_one_with_layers_replaced_by_identity(family: str) -> None:
    """Acceptance fact 7: bit-equal, eager, fp32."""
    model = tiny_models.build(family, attn_implementation="eager")
    whole = logits(model)
    with bypass_layers(model, DROPPED):
        want = logits(model)
    assert torch.equal(logits(model), whole)
    assert (want - whole).abs().max() > 1e-3
    drop_layers(model, DROPPED)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    ("family", "attention"),
    # Gemma-2's soft-capped attention has no SDPA form.
    [(f, a) for f in tiny_models.CAUSAL for a in ("eager", "sdpa") if (f, a) != ("gemma2", "sdpa")],
)
def test_cached_decoding_with_layer_0_dropped(family: str, attention: str) -> None:
    """Acceptance fact 8: chunk by chunk through the cache = at once, 1e-5."""
    model = tiny_models.build(family, attn_implementation=attention)
    drop_layers(model, DROPPED)
    assert _cache_error(model) < 1e-5


def test_cached_decoding_fails_without_renumbering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance fact 8, second half: stale numbers are wrong, so the test above can fail."""
    monkeypatch.setattr(decoder_layers, "renumber_layers", lambda layers: None)
    model = tiny_models.build("llama", attn_implementation="sdpa")
    drop_layers(model, DROPPED)
    try:
        error = _cache_error(model)
    except IndexError:
        return
    assert error > 1e-3


@torch.no_grad()
def _cache_error(model: PreTrainedModel) -> float:
    ids = tiny_models.token_ids()
    whole, parts, cache = model(ids).logits, [], None
    for chunk in ids.split((5, 1, 4, 2), dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return float((torch.cat(parts, dim=1) - whole).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_reload(family: str, tmp_path: Path) -> None:
    """Acceptance fact 9."""
    model = tiny_models.build(family)
    kinds = getattr(model.config, "layer_types", None)
    drop_layers(model, DROPPED)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    again, note = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not note["missing_keys"]
    assert not note["unexpected_keys"]
    assert torch.equal(logits(again.eval()), logits(model))
    assert again.config.num_hidden_layers == len(find_decoder_layers(again).modules) == 3
    if kinds:
        assert again.config.layer_types == [kinds[index] for index in (1, 4, 5)]
    if family == "gemma2":
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_forgotten_layer_types_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma-2 with unremapped types gives other logits, so the tests above see a forgotten list."""
    model = tiny_models.build("gemma2", attn_implementation="eager")
    with bypass_layers(model, (0, 2, 3)):
        want = logits(model)
    monkeypatch.setattr(decoder_layers, "PER_LAYER_LISTS", ())
    monkeypatch.setattr(decoder_layers, "INDEX_LISTS", ("layer_types",))
    monkeypatch.setattr(
        decoder_layers, "shorten_config", lambda config, dropped: setattr(config, "num_hidden_layers", 3)
    )
    drop_layers(model, (0, 2, 3))
    assert (logits(model) - want).abs().max() > 1e-3


def test_generation_after_dropping() -> None:
    model = tiny_models.build("llama")
    drop_layers(model, (0, 5))
    out = model.generate(tiny_models.token_ids(), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 16)


def test_renumber_reaches_nested_modules() -> None:
    layers = [nn.Module(), nn.Module()]
    for layer in layers:
        layer.inner = nn.Module()
        layer.inner.layer_idx = 7
    renumber_layers(layers)
    assert [layer.inner.layer_idx for layer in layers] == [0, 1]
    assert "layer_idx" not in vars(layers[0])


class ListedConfig(PreTrainedConfig):
    """A config with everything that speaks of layers by number."""

    model_type = "listed"
    num_hidden_layers: int = 5
    mlp_only_layers: list | None = None
    first_k_dense_replace: int | None = None
    no_rope_layers: list | None = None
    per_layer_config: dict | None = None


def test_every_kind_of_list_is_rewritten() -> None:
    """Layers 1 and 3 go: survivors 0 2 4 become 0 1 2; of the first three, 0 and 2 survive."""
    config = ListedConfig(
        mlp_only_layers=[1, 2, 4],
        first_k_dense_replace=3,
        no_rope_layers=[1, 0, 1, 0, 0],
        per_layer_config={"1": {"a": 1}, "4": {"a": 2}},
    )
    shorten_config(config, (1, 3))
    assert config.mlp_only_layers == [1, 2]
    assert config.first_k_dense_replace == 2
    assert config.no_rope_layers == [1, 1, 0]
    assert config.per_layer_config == {"2": {"a": 2}}
    assert config.num_hidden_layers == 3


def test_formulas_are_refused() -> None:
    config = Qwen2MoeConfig(num_hidden_layers=4, decoder_sparse_step=2)
    with pytest.raises(
        ValueError, match=r"derives what a layer is from its number \(decoder_sparse_step=2\)"
    ):
        check_droppable(config)
    check_droppable(Qwen2MoeConfig(num_hidden_layers=4))
    gpt2 = tiny_models.gpt2(2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True"):
        drop_layers(gpt2, (1,))


def test_a_list_makes_its_formula_harmless() -> None:
    config = MistralConfig(num_hidden_layers=2)
    config.sliding_window_pattern = 6
    with pytest.raises(ValueError, match="sliding_window_pattern=6"):
        check_droppable(config)
    config.layer_types = ["full_attention", "sliding_attention"]
    check_droppable(config)


def test_unknown_lists_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=3)
    config.layer_flavours = ["a", "b", "c"]
    with pytest.raises(ValueError, match="not known here: layer_flavours"):
        check_droppable(config)


def test_impossible_drops() -> None:
    model = tiny_models.build("llama", 3)
    with pytest.raises(ValueError, match=r"layers \[-1, 3\] do not exist"):
        drop_layers(model, (-1, 3))
    with pytest.raises(ValueError, match="all 3 layers would be dropped"):
        drop_layers(model, range(3))
    with pytest.raises(ValueError, match=r"layers \[3\] cannot be bypassed"), bypass_layers(model, [3]):
        pass
    assert len(model.model.layers) == 3


def test_stale_attributes_go() -> None:
    model = tiny_models.build("llama", 3)
    model.hf_device_map = {"": "cpu"}
    drop_layers(model, (1,))
    assert "hf_device_map" not in vars(model)


def test_meta_counts_of_the_papers_models() -> None:
    """Acceptance fact 10: 13 of 32 layers removed."""
    common = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    llama = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **common)
    mistral = MistralConfig(vocab_size=32768, num_key_value_heads=8, **common)
    for config, before, after in (
        (llama, 8_030_261_248, 5_194_805_248),
        (mistral, 7_248_023_552, 4_412_567_552),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        assert model.num_parameters() == before
        drop_layers(model, range(18, 31))
        assert model.num_parameters() == after


@pytest.mark.parametrize("prefix", ["model.layers", "layers", "base.model.layers"])
def test_prefix_of_a_checkpoint(prefix: str) -> None:
    keys = ["embed.weight", *(f"{prefix}.{i}.experts.{j}.w" for i in range(3) for j in range(4))]
    assert layer_prefix(keys, "model.layers", 3) == prefix
    with pytest.raises(ValueError, match="Config and weights do not belong together"):
        layer_prefix(keys, "model.layers", 4)
    with pytest.raises(ValueError, match="found none"):
        layer_prefix(["a.b"], "model.layers", 4)


def test_watching_reports_what_enters_and_leaves() -> None:
    """Chain: what leaves a layer enters the next."""
    model = tiny_models.build("llama", 3)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with watch_layers(model, lambda number, entered, left: seen.update({number: (entered, left)})):
        logits(model)
    assert sorted(seen) == [0, 1, 2]
    assert torch.equal(seen[0][1], seen[1][0])
    assert torch.equal(seen[1][1], seen[2][0])
    seen.clear()
    logits(model)
    assert not seen
