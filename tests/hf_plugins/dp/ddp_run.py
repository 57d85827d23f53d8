"""Started by accelerate in a test: the same private training on one rank or on several."""

import sys

import torch

from hf_plugins.process_group import leave_process_group
from tests.hf_plugins.dp import tiny

folder, size = sys.argv[1], int(sys.argv[2])
run = tiny.trainer(
    folder,
    dp={"max_grad_norm": 0.1, "seed": 0, "noise_multiplier": 4.0},
    per_device_train_batch_size=size,
    max_steps=8,
    logging_steps=4,
)
run.train()
if run.is_world_process_zero():
    torch.save({"weights": tiny.weights(run.model), "epsilon": run.epsilon()}, f"{folder}/rank0.pt")
else:
    torch.save({"weights": tiny.weights(run.model), "epsilon": run.epsilon()}, f"{folder}/rank1.pt")
leave_process_group()
