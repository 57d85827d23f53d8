"""Scoring runs on two processes, started by test_callback.py under torchrun: ``ranks.py OUT``."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerControl, TrainerState

from hf_plugins.decoder_layers import find_decoder_layers
from hf_plugins.gradpruner import GradPrunerCallback, GradPrunerConfig
from hf_plugins.process_group import leave_process_group
from tests.hf_plugins import tiny_models
from tests.hf_plugins.gradpruner.collected import arguments, rows, with_lora

CONFIG = {"num_steps": 3, "n_prune": 2}


def trained(out: Path, *, batch: int, accumulation: int = 1) -> GradPrunerCallback:
    """A Trainer run over rows in their order, clipped in every step."""
    callback = GradPrunerCallback(GradPrunerConfig(**CONFIG))
    args = arguments(
        out,
        max_steps=4,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.05,
    )
    model = with_lora(tiny_models.build("llama"))
    Trainer(model, args, train_dataset=rows(), callbacks=[callback]).train()
    return callback


def looped(out: Path, *, rank: int = 0, world: int = 1) -> GradPrunerCallback:
    """The same in a plain loop; with two processes the model is sharded by FSDP2.

    Accelerate starts FSDP on accelerators only, so the Trainer cannot be asked on a CPU; gradients are
    ``DTensor`` all the same, and the callback is called at the place where the Trainer calls it.
    """
    callback = GradPrunerCallback(GradPrunerConfig(**CONFIG))
    model = with_lora(tiny_models.build("llama"))
    if world > 1:
        for layer in find_decoder_layers(model.get_base_model()).modules:
            fully_shard(layer)
        fully_shard(model)
    args, control = arguments(out), TrainerControl()
    state = TrainerState(max_steps=4, is_world_process_zero=rank == 0)
    callback.on_train_begin(args, state, control, model=model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    data = torch.stack([row["input_ids"] for row in rows()])
    for step in range(3):
        batch = data[4 * step : 4 * step + 4].chunk(world)[rank]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.05)
        callback.on_pre_optimizer_step(args, state, control, model=model)
        optimizer.step()
        optimizer.zero_grad()
    return callback


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ddp = trained(out, batch=2)
    rank = torch.distributed.get_rank()
    sharded = looped(out, rank=rank, world=2)
    if rank == 0:
        kept = [len(callback.history or ()) for callback in (ddp, sharded)]
        result = {"ddp": ddp.scores().tolist(), "fsdp2": sharded.scores().tolist(), "history": kept}
        (out / "scores.json").write_text(json.dumps(result))
    else:
        assert ddp.history is sharded.history is None
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
