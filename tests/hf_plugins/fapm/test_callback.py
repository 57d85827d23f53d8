"""FAPM inside the stock Trainer: at saves, at the end, with LoRA, and refused where weights are sharded."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hf_plugins.fapm
from hf_plugins.fapm import FAPMCallback, FAPMConfig, fapm_prune_checkpoint
from tests.hf_plugins.fapm.tiny import read_model

ROOT = Path(__file__).resolve().parents[3]
transformers = pytest.importorskip("transformers")


def model() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **size))


def train(trained: nn.Module, folder: Path, callback: FAPMCallback, *, steps: int = 4) -> None:
    rows = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model=trained, args=arguments, train_dataset=rows, callbacks=[callback]).train()


@pytest.mark.host
def test_checkpoints_and_the_end_are_pruned(tmp_path: Path) -> None:
    live = model()
    live.save_pretrained(tmp_path / "base")
    callback = FAPMCallback(tmp_path / "base", FAPMConfig(keep=0.2), at=("save", "end"))
    train(live, tmp_path / "run", callback)
    assert len(callback.reports) == 3
    run = tmp_path / "run"
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        again = tmp_path / checkpoint
        fapm_prune_checkpoint(tmp_path / "base", run / checkpoint, again, FAPMConfig(keep=0.2))
        assert (again / "model.safetensors").read_bytes() == (
            run / checkpoint / "fapm" / "model.safetensors"
        ).read_bytes()
    # The end is the last checkpoint here, and the training weights are untouched.
    assert (run / "fapm" / "model.safetensors").read_bytes() == (
        run / "checkpoint-4" / "fapm" / "model.safetensors"
    ).read_bytes()
    stored = read_model(run / "checkpoint-4")
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in stored.items())
    assert not [path for path in run.iterdir() if path.name.startswith(".fapm-")]
    transformers.AutoModelForCausalLM.from_pretrained(run / "fapm")


@pytest.mark.host
def test_lora_training_ends_in_a_full_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = model()
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    callback = FAPMCallback(tmp_path / "base", FAPMConfig(keep=0.2))
    train(adapted, tmp_path / "run", callback, steps=2)
    before, after = read_model(tmp_path / "base"), read_model(tmp_path / "run" / "fapm")
    changed = sorted(name for name in before if not torch.equal(before[name], after[name]))
    assert changed == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    assert len(callback.reports) == 1


def arguments(**options: object) -> SimpleNamespace:
    return SimpleNamespace(deepspeed=None, fsdp=[], output_dir="out", **options)


def test_sharded_training_is_refused(tmp_path: Path) -> None:
    callback = FAPMCallback(tmp_path)
    for options in ({"deepspeed": "zero3.json"}, {"fsdp": ["full_shard"]}):
        with pytest.raises(ValueError, match="consolidate the checkpoint"):
            callback.on_train_begin(SimpleNamespace(**vars(arguments()) | options), None, None)


def test_base_that_is_no_folder_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base must be the folder of the pre-trained model"):
        FAPMCallback(tmp_path / "nowhere").on_train_begin(arguments(), None, None)


def test_moment_that_is_none(tmp_path: Path) -> None:
    for at in ((), ("start",)):
        with pytest.raises(ValueError, match="at must name 'save', 'end' or both"):
            FAPMCallback(tmp_path, at=at)


def test_other_processes_do_nothing(tmp_path: Path) -> None:
    callback = FAPMCallback(tmp_path, at=("save", "end"))
    state = SimpleNamespace(is_world_process_zero=False, global_step=1)
    callback.on_save(arguments(), state, None)
    callback.on_train_end(arguments(), state, None)
    assert callback.reports == []


def test_callback_is_loaded_when_it_is_asked_for() -> None:
    """Streaming over disk does without transformers; a name that is none still says so."""
    code = "import sys, hf_plugins.fapm; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="has no attribute.*nothing"):
        _ = hf_plugins.fapm.nothing
