"""LoRA, prefix and SPF on the tail; what is saved fits the whole model bit by bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_plugins.tee_split.config import SPFConfig, TailConfig
from hf_plugins.tee_split.heads import head_rows
from hf_plugins.tee_split.model import hidden_states, split_model
from hf_plugins.tee_split.peft import (
    SIMULATED,
    apply_spf,
    attach_adapter,
    default_target,
    load_spf,
    merge_spf,
    prefix_tensor,
    projections,
    save_spf,
    save_tail,
    spf_layers,
    tail_layers,
)
from tests.hf_plugins.tee_split.tiny import NINE, tiny_model, tokens

FAMILIES = (*NINE, "gpt_neox", "starcoder2")


def tail_options(**changes: Any) -> TailConfig:
    return TailConfig(**{"model": "m", "cut": 2, "lora_dropout": 0.0, **changes})


def trained(
    kind: str, *, ratio: float, k: int = 2, steps: int = 2, **changes: Any
) -> tuple[Any, Any, torch.Tensor]:
    """A whole model, its tail after a few steps, and the hidden state it was trained on."""
    whole, batch = tiny_model(kind), tokens()
    client = split_model(copy.deepcopy(whole), k, "client")
    hidden = hidden_states(client, batch["input_ids"], batch["attention_mask"])
    tail = attach_adapter(split_model(copy.deepcopy(whole), k, "server"), tail_options(**changes))
    apply_spf(tail, SPFConfig(ratio=ratio))
    optimizer = torch.optim.AdamW([p for p in tail.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        run(tail, hidden, batch, labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole, tail, hidden


def run(model: Any, hidden: torch.Tensor, batch: dict, **more: Any) -> Any:
    return model(
        inputs_embeds=hidden, attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
        use_cache=False, **more,
    )  # fmt: skip


def whole_run(model: Any) -> torch.Tensor:
    batch = tokens()
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"], use_cache=False,
    ).logits  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_saved_tail_gives_the_whole_model_bit_equal_logits(kind: str, tmp_path: Path) -> None:
    whole, tail, hidden = trained(kind, ratio=0.5)
    save_tail(tail, tmp_path, SPFConfig(ratio=0.5), simulated=True)
    expected = run(tail.eval(), hidden, tokens()).logits
    portable = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path).eval()
    load_spf(portable, tmp_path)
    assert torch.equal(whole_run(portable), expected)
    assert (whole_run(whole) - expected).abs().max() > 1e-3
    names = [name for name, _ in portable.named_parameters() if "lora" in name]
    assert names
    assert all(".2." in name or ".3." in name for name in names)
    merge_spf(portable)
    assert not spf_layers(portable)
    torch.testing.assert_close(whole_run(portable), expected, atol=2e-6, rtol=1e-5)
    assert SIMULATED in (tmp_path / "README.md").read_text()
    assert SIMULATED in (tmp_path / "spf_config.json").read_text()


def test_hardware_run_is_not_called_simulated(tmp_path: Path) -> None:
    save_tail(trained("llama", ratio=0.5, steps=0)[1], tmp_path, SPFConfig(), simulated=False)
    assert SIMULATED not in (tmp_path / "README.md").read_text() + (tmp_path / "spf_config.json").read_text()


def test_lora_of_the_tail_equals_lora_of_the_whole_model_restricted_to_it() -> None:
    """Same initial values, one step of AdamW: every LoRA gradient and the updated weights are bit-equal."""
    whole, batch = tiny_model(), tokens()
    client = split_model(copy.deepcopy(whole), 2, "client")
    tail = attach_adapter(split_model(copy.deepcopy(whole), 2, "server"), tail_options())
    lora = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["self_attn.o_proj"],
        layers_to_transform=[2, 3],
        task_type="CAUSAL_LM",
    )
    full = get_peft_model(copy.deepcopy(whole), lora)
    full.load_state_dict(
        {name: value for name, value in tail.state_dict().items() if "lora" in name}, strict=False
    )
    hidden = hidden_states(client, batch["input_ids"], batch["attention_mask"])
    run(tail, hidden, batch, labels=batch["labels"]).loss.backward()
    full(**batch, use_cache=False).loss.backward()
    mine = {name: p.grad for name, p in tail.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in full.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert len(mine) == 4
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("select", ["top", "bottom", "random"])
def test_exactly_the_stated_rows_learn(select: str) -> None:
    """Llama: 4 query heads, 2 key-value heads of 8 rows, 48 feed-forward rows: int(.5 * n) of each."""
    tail = split_model(tiny_model(), 2, "server").requires_grad_(False)
    layers = apply_spf(tail, SPFConfig(ratio=0.5, select=select))
    counts = {
        name.split(".", 3)[-1]: layer.spf_rows.numel() for name, layer in layers.items() if ".2." in name
    }
    assert counts == {
        "self_attn.q_proj": 16,
        "self_attn.k_proj": 8,
        "self_attn.v_proj": 8,
        "mlp.gate_proj": 24,
        "mlp.up_proj": 24,
    }
    assert sum(p.numel() for p in tail.parameters() if p.requires_grad) == 2 * 32 * sum(counts.values())


def test_ratio_zero_is_plain_lora_and_too_small_a_ratio_says_so() -> None:
    assert apply_spf(split_model(tiny_model(), 2, "server"), SPFConfig(ratio=0.0)) == {}
    with pytest.raises(ValueError, match="selects no row of this model"):
        apply_spf(split_model(tiny_model(), 2, "server"), SPFConfig(ratio=0.01, ffn=False))


def test_lora_on_the_same_matrix_keeps_its_names(tmp_path: Path) -> None:
    whole, tail, hidden = trained("llama", ratio=0.5, target_modules=["q_proj"])
    save_tail(tail, tmp_path, SPFConfig(ratio=0.5), simulated=False)
    portable = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path).eval()
    load_spf(portable, tmp_path, merge=False)
    assert torch.equal(whole_run(portable), run(tail.eval(), hidden, tokens()).logits)
    load_spf(portable, tmp_path, merge=True)
    assert not spf_layers(portable)


def test_spf_without_peft(tmp_path: Path) -> None:
    whole, tail, hidden = trained("llama", ratio=0.5, adapter="none")
    save_tail(tail, tmp_path, SPFConfig(ratio=0.5), simulated=False)
    load_spf(whole, tmp_path)
    assert torch.equal(whole_run(whole), run(tail, hidden, tokens()).logits)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", "q"), ("phi3", "concatenated"), ("gpt_neox", "interleaved"), ("gpt2", "concatenated")],
)
def test_selected_query_head_changes_no_other_head(kind: str, layout: str) -> None:
    """Perturb the query rows of head 1 and look at what reaches the output projection, head by head."""
    model, batch = tiny_model(kind), tokens()
    heads = model.config.num_attention_heads
    kv = getattr(model.config, "num_key_value_heads", None) or heads
    dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    name = next(
        p.name for p in projections(model, range(3, 4), attention=True, ffn=False) if p.layout == layout
    )
    out = model.get_submodule(".".join(name.split(".")[:3]) + "." + default_target(model)[0])
    seen: list[torch.Tensor] = []
    out.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    layers = apply_spf(model, SPFConfig(ratio=1.0, ffn=False))
    whole_run(model)
    rows = head_rows(layout, num_heads=heads, num_kv_heads=kv, head_dim=dim)["q"][1]
    layer = layers[name]
    with torch.no_grad():
        layer.spf_delta[torch.isin(layer.spf_rows, rows)] += 1.0
    whole_run(model)
    before, after = (x.view(*batch["input_ids"].shape, heads, dim) for x in seen)
    changed = [(before[:, :, head] != after[:, :, head]).any().item() for head in range(heads)]
    assert changed == [head == 1 for head in range(heads)]


def test_prefix_learns_behind_the_cut_alone(tmp_path: Path) -> None:
    whole, batch = tiny_model(), tokens()
    client = split_model(copy.deepcopy(whole), 2, "client")
    hidden = hidden_states(client, batch["input_ids"], batch["attention_mask"])
    tail = attach_adapter(
        split_model(copy.deepcopy(whole), 2, "server"), tail_options(adapter="prefix", num_virtual_tokens=5)
    )
    tail(
        inputs_embeds=hidden, attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
    ).loss.backward()
    gradient = tail.prompt_encoder["default"].embedding.weight.grad.view(5, 4, -1)
    assert not gradient[:, :2].any()
    assert gradient[:, 2:].abs().sum() > 0
    assert prefix_tensor(tail).shape == (5, 2, 32)
    save_tail(tail, tmp_path, SPFConfig(), simulated=True)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "prefix.safetensors")["prefix"].shape == (5, 2, 32)
    with pytest.raises(ValueError, match="carries no prefix without projection"):
        prefix_tensor(attach_adapter(split_model(copy.deepcopy(whole), 2, "server"), tail_options()))


def test_differences_fit_only_their_model(tmp_path: Path) -> None:
    _, tail, _ = trained("llama", ratio=0.5, steps=1)
    save_spf(tail, tmp_path, SPFConfig(ratio=0.5))
    with pytest.raises(KeyError, match="load the same base model"):
        load_spf(tiny_model("gpt2"), tmp_path)
    other = split_model(tiny_model(), 2, "server")
    apply_spf(other, SPFConfig(ratio=0.25))
    with pytest.raises(ValueError, match="Use the SPF options the difference was trained with"):
        load_spf(other, tmp_path)


def test_tail_layers_counts_what_is_there() -> None:
    assert list(tail_layers(tiny_model())) == [0, 1, 2, 3]
    assert list(tail_layers(split_model(tiny_model(), 3, "server"))) == [3]


def test_unknown_matrices_are_named() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(
        NotImplementedError,
        match="SPF knows no .*feed-forward matrix in .*it looks for .* off for this model",
    ):
        apply_spf(model, SPFConfig())
    assert apply_spf(model, SPFConfig(ratio=0.5, ffn=False))
    model = tiny_model()
    for layer in model.base_model.layers:
        layer.self_attn.projection = layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Identity()
        del layer.self_attn.o_proj
    with pytest.raises(NotImplementedError, match="name it with target_modules"):
        default_target(model)
