"""LoRA as a task vector: factors against a merge in fp32, every variant, what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_plugins.fapm import FAPMConfig, fapm_prune_checkpoint
from hf_plugins.fapm.peft import (
    Adapter,
    LoraPair,
    adapter_from_folder,
    adapter_from_model,
    check_fits,
    is_adapter,
    read_adapter,
)
from hf_plugins.fapm.storage import Checkpoint
from tests.hf_plugins.fapm.tiny import moved, read_model, write_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def base_model(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(config)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **size))


def trained(model: nn.Module, **options: object) -> nn.Module:
    """An adapter whose factors are not zero."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            weight.data += torch.randn(weight.shape, generator=generator) * 0.02
        elif weight.requires_grad:
            weight.data *= 1 + torch.rand(weight.shape, generator=generator) * 0.1
    return adapted


VARIANTS = {
    "plain": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 32},
        },
    ),
    "dora": ("llama", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": ("gpt2", {"r": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "lora_only"}),
}


@pytest.mark.host
@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_equal_the_merge_in_fp32(tmp_path: Path, variant: str) -> None:
    """The same mask up to ties, values to 1e-6; what no adapter touches is bit-identical to the base."""
    kind, options = VARIANTS[variant]
    model = base_model(kind)
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, **options)
    adapted.save_pretrained(tmp_path / "adapter")
    config = FAPMConfig(keep=0.2, resident_mib=0, chunk=100)
    live = fapm_prune_checkpoint(tmp_path / "base", adapted, tmp_path / "live", config)
    stored = fapm_prune_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "stored", FAPMConfig(keep=0.2)
    )
    assert live["tensors"].keys() == stored["tensors"].keys()
    assert (tmp_path / "live/model.safetensors").read_bytes() == (
        tmp_path / "stored/model.safetensors"
    ).read_bytes()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = fapm_prune_checkpoint(
        tmp_path / "base", tmp_path / "merged", tmp_path / "out", FAPMConfig(keep=0.2)
    )
    base, ours, theirs = (read_model(tmp_path / name) for name in ("base", "live", "out"))
    touched = set(live["tensors"])
    assert touched
    for name, weight in base.items():
        if name not in touched:
            assert torch.equal(ours[name], weight)
            continue
        # Rounding may swap two entries at the threshold.
        assert int(((ours[name] != weight) != (theirs[name] != weight)).sum()) <= 2
        both = (ours[name] != weight) & (theirs[name] != weight)
        torch.testing.assert_close(ours[name][both], theirs[name][both], atol=1e-6, rtol=0)
        assert abs(live["tensors"][name]["kept_energy"] - merged["tensors"][name]["kept_energy"]) < 1e-3


def adapter_state(shape: tuple[int, int] = (6, 8)) -> dict[str, torch.Tensor]:
    a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    prefix = "base_model.model.layer."
    return {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}


LORA = {"peft_type": "LORA", "lora_alpha": 4}


@pytest.mark.parametrize(("chunk", "resident"), [(5, 0), (48, 0), (7, 1 << 20)])
def test_product_by_rows_is_the_product(tmp_path: Path, chunk: int, resident: int) -> None:
    """W' = W + alpha / r * B @ A with alpha 4 and r 2, in any chunks."""
    w, _ = moved(48)
    state = adapter_state()
    factors = read_adapter(state, LORA).factors["layer.weight"]
    base = Checkpoint(write_model(tmp_path, {"layer.weight": w.view(6, 8)}))
    pair = LoraPair(base, base.entries["layer.weight"], factors, chunk=chunk, resident=resident)
    a, b = state.values()
    expected = (w.view(6, 8) + 2.0 * (b @ a)).flatten()
    for start in range(0, 48, chunk):
        w_part, ft = pair.read(start, min(start + chunk, 48))
        assert torch.equal(w_part, w[start : start + chunk])
        torch.testing.assert_close(ft, expected[start : start + chunk])


def test_bf16_adapter_is_multiplied_in_fp32(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in adapter_state().items()}
    factors = read_adapter(state, LORA).factors["layer.weight"]
    assert factors.left.dtype == factors.right.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, {"peft_type": "IA3"}, "adapter of type.*IA3.*only plain LoRA, rsLoRA and DoRA"),
        ({}, {**LORA, "lora_bias": True}, "adapter of type LORA with lora_bias"),
        ({"base_model.model.layer.lora_B.weight": None}, LORA, "holds only one of lora_A and lora_B"),
        (
            {"base_model.model.layer.lora_A.weight": torch.zeros(2, 3, 1, 1)},
            LORA,
            "LoRA on a convolution is not read from factors",
        ),
        (
            {"base_model.model.layer.lora_magnitude_vector": torch.ones(6)},
            {**LORA, "fan_in_fan_out": True},
            "DoRA on a transposed weight is not read from factors",
        ),
    ],
)
def test_adapters_that_are_no_plain_lora(change: dict, config: dict, message: str) -> None:
    state = {name: tensor for name, tensor in (adapter_state() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        read_adapter(state, config)


def test_adapter_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Checkpoint(write_model(tmp_path / "mine", {"layers.weight": torch.zeros(6, 8)}))
    adapter = read_adapter(adapter_state(), LORA)
    with pytest.raises(ValueError, match="does not hold. Did you mean layers.weight"):
        check_fits(adapter, base)
    other = Checkpoint(write_model(tmp_path / "b", {"layer.weight": torch.zeros(8, 6)}))
    with pytest.raises(ValueError, match="Give the base model that the adapter was trained on"):
        check_fits(adapter, other)
    named = Adapter({}, {}, "someone/else")
    with caplog.at_level(logging.WARNING):
        check_fits(named, base)
    assert "Make sure that they are one model" in caplog.text
    caplog.clear()
    check_fits(Adapter({}, {}, "someone/mine"), base)
    assert not caplog.text


@pytest.mark.host
def test_live_models_that_are_not_ready(tmp_path: Path) -> None:
    adapted = trained(base_model(), r=2, target_modules=["q_proj"])
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="its factors are spent. Call unmerge_adapter"):
        adapter_from_model(adapted)
    adapted.unmerge_adapter()
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter is needed"):
        adapter_from_model(adapted)


@pytest.mark.host
def test_folder_of_an_adapter_is_known(tmp_path: Path) -> None:
    adapted = trained(base_model(), r=2, target_modules=["q_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter")
    assert len(adapter_from_folder(tmp_path / "adapter").factors) == 2
    assert not is_adapter(tmp_path)
