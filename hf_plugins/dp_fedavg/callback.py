"""BLUR inside a running Trainer: any optimizer, accumulation, PEFT."""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_plugins.dp_fedavg.blur import blur_gradient, delta_norm


class BLURCallback(TrainerCallback):
    """Keeps a Trainer's weights near where they started; pass it as ``callbacks=[BLURCallback(...)]``.

    Adds the gradient of ``strength/2 * max(0, ||w - w_0||^2 - S^2)`` before each optimizer step, over all
    trainable parameters together; with PEFT these are the adapters. It comes after the host's clipping of
    gradients (``max_grad_norm``) and once for each step, however many batches are accumulated. Adaptive
    optimizers rescale it, so S is held more softly there.

    Args:
        clipping_norm: S, > 0: inside this ball nothing happens.
        strength: lambda, >= 0.
        hinge: ``square`` or ``norm``; see `hf_plugins.dp_fedavg.blur.blur_penalty`.
    """

    def __init__(
        self, clipping_norm: float, strength: float = 0.4, *, hinge: Literal["square", "norm"] = "square"
    ) -> None:
        if not clipping_norm > 0 or not strength >= 0:
            raise ValueError(
                f"BLUR needs clipping_norm > 0 and strength >= 0; got {clipping_norm} and {strength}."
            )
        if hinge not in ("square", "norm"):
            raise ValueError(f"hinge must be square or norm; got {hinge!r}.")
        self.clipping_norm, self.strength, self.hinge = clipping_norm, strength, hinge
        self._start: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where the weights start.

        Raises:
            RuntimeError: If the run resumes (the start is then unknown), scales losses or shards weights.
        """
        if state.global_step:
            raise RuntimeError(
                "BLURCallback cannot go on from a checkpoint: it does not hold the weights that the client "
                "started from. Train a client's round from its start."
            )
        if args.fp16 or args.deepspeed or args.fsdp:
            raise RuntimeError(
                "BLURCallback needs whole, unscaled gradients before the step: use bf16 or fp32 on "
                "one device or DDP, not fp16, DeepSpeed or FSDP."
            )
        self._start = [p.detach().clone() for p in kwargs["model"].parameters() if p.requires_grad]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add BLUR's gradient."""
        params = [p for p in kwargs["model"].parameters() if p.requires_grad]
        with torch.no_grad():
            delta = [p.detach() - s for p, s in zip(params, self._start, strict=True)]
            pull = blur_gradient(
                delta, strength=self.strength, clipping_norm=self.clipping_norm, hinge=self.hinge
            )
            for p, addition in zip(params, pull, strict=True):
                p.grad = addition if p.grad is None else p.grad.add_(addition)

    def distance(self, model: torch.nn.Module) -> float:
        """How far the trainable weights are from where they started."""
        params = [p for p in model.parameters() if p.requires_grad]
        return float(delta_norm([p.detach() - s for p, s in zip(params, self._start, strict=True)]))
