"""`DPTrainer` and `DPSFTTrainer`: the host's trainers whose every optimizer step is paid for, or refused."""

import copy
import json
import logging
import math
import sys
from collections.abc import Sized
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_plugins.accounting import AccountantName, Ledger, Release, noise_multiplier_for
from hf_plugins.dp.config import DPConfig
from hf_plugins.dp.dataset import Chunk, ChunkCollator, PoissonBatches, StepBatch, poisson_loader
from hf_plugins.dp.loss import loss_kind, model_losses
from hf_plugins.dp.mechanism import NoisySum
from hf_plugins.dp.model import (
    NoDropout,
    RecordGradients,
    attach,
    check_model,
    self_check_error,
    trainable,
    why_not_ghost,
)
from hf_plugins.dp.noise import fresh_seed, seeded_gaussian, stream_seed
from hf_plugins.dp.sampling import users_of
from hf_plugins.secure_noise import secure_gaussian
from hf_plugins.whole_files import write_json

logger = logging.getLogger(__name__)

LEDGER_FILE = "dp_ledger.json"
SECRET_FILE = "dp_secret.json"
REPORT_FILE = "privacy.json"
# Records that the self-check sends through the model together and one by one, and how often at most.
_CHECKED = 3
_CHUNKS_CHECKED = 4
# Largest difference the self-check lets pass: rounding in float32, and in bfloat16.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.1
# Methods of the host that carry the guarantee here; a subclass that replaces one would void it unseen.
_SEALED = (
    "training_step",
    "compute_loss",
    "get_train_dataloader",
    "_get_train_sampler",
    "get_batch_samples",
    "_inner_training_loop",
    "_prepare_for_training",
)


def _wrong_arguments(args: TrainingArguments) -> list[str]:
    """Everything in the host's arguments that would void or hide the guarantee."""
    rules = {
        "label_smoothing_factor averages over the tokens of the batch; set it to 0 and smooth in a "
        "compute_loss_func that returns one loss for each record": args.label_smoothing_factor != 0,
        f"train_sampling_strategy={args.train_sampling_strategy!r} (group_by_length) is no Poisson sampling, "
        "for which epsilon is computed; leave it at 'random'": args.train_sampling_strategy != "random",
        "dataloader_drop_last drops records by position; Poisson batches have no last one, so leave it "
        "False": args.dataloader_drop_last,
        "auto_find_batch_size starts steps anew after they were paid for; choose "
        "per_device_train_batch_size": args.auto_find_batch_size,
        "ignore_data_skip would draw the records of past steps again; leave it False": args.ignore_data_skip,
        "fp16 needs a loss scaler, which skips steps depending on the records; use bf16": args.fp16,
        "torch_compile hides the layers that hooks must see; switch it off": args.torch_compile,
        "use_liger_kernel replaces layers by fused ones without gradients of each record; switch it "
        "off": args.use_liger_kernel,
        "fsdp shards parameters, and norms by shard are not the records' norms; use DDP (accelerate launch "
        "--multi_gpu) and LoRA": bool(args.fsdp),
        "deepspeed steps inside backward(), before anything is clipped; use DDP": bool(args.deepspeed),
        "include_num_input_tokens_seen publishes lengths of the drawn records; set it to "
        "'no'": args.include_num_input_tokens_seen != "no",
        f"max_grad_norm={args.max_grad_norm} in TrainingArguments clips the noisy mean; leave it at its "
        "default and set DPConfig.max_grad_norm": args.max_grad_norm not in (0, 0.0, 1.0),
        f"optim={args.optim!r} steps layer by layer inside backward(); choose another": any(
            word in str(args.optim) for word in ("lomo", "layerwise")
        ),
        "more than one GPU in one process (DataParallel) is not supported; start one process for each GPU "
        "with accelerate launch": args.n_gpu > 1,
        "activation checkpointing must be re-entrant, else hooks see each layer twice; set "
        "activation_checkpointing_kwargs={'use_reentrant': True} or leave it out": bool(
            args.activation_checkpointing
            and isinstance(args.activation_checkpointing_kwargs, dict)
            and not args.activation_checkpointing_kwargs.get("use_reentrant", True)
        ),
    }
    if isinstance(args, SFTConfig):
        rules |= {
            "packing puts records of different people into one row; set packing=False": args.packing,
            "padding_free merges the records of a batch into one row; set "
            "padding_free=False": args.padding_free,
            f"loss_type={args.loss_type!r} is not a mean over each record's tokens; use 'nll'": args.loss_type
            != "nll",
            "activation_offloading is not supported; checkpoint instead": args.activation_offloading,
        }
    return [reason for reason, broken in rules.items() if broken]


def _own_arguments(args: TrainingArguments) -> TrainingArguments:
    """A copy for the host's loop: one step is one Poisson batch, and nothing but us clips."""
    own = copy.copy(args)
    own.gradient_accumulation_steps = 1
    own.max_grad_norm = 0.0
    if own.activation_checkpointing:
        given = own.activation_checkpointing_kwargs
        own.activation_checkpointing_kwargs = {
            **(given if isinstance(given, dict) else {}),
            "use_reentrant": True,
        }
    return own


class _DPMixin:
    """What both trainers share; stands before the host's class in the order of inheritance.

    The host's loop sees one batch a step and a plain optimizer. `training_step` runs the chunks of the batch,
    sums their clipped gradients, adds noise, charges the ledger and only then sets ``p.grad``. A hook in
    front of ``optimizer.step()`` lets nothing else through.
    """

    def __init__(self, *args: Any, dp: DPConfig, **kwargs: Any) -> None:
        """Takes the host's arguments and the privacy options.

        Args:
            *args: As the host's trainer: ``model``, ``args``, ...
            dp: Options of privacy.
            **kwargs: As the host's trainer.

        Raises:
            ValueError: If an argument would void the guarantee.
            TypeError: If TrainingArguments are missing, or a subclass replaces a method that carries the
                guarantee.
        """
        values = list(args)
        given = kwargs.get("args", values[1] if len(values) > 1 else None)
        if not isinstance(given, TrainingArguments):
            raise TypeError(
                f"args must be TrainingArguments (SFTConfig for DPSFTTrainer); got {type(given).__name__}. "
                "Batch size and length of the run decide epsilon, so they are never guessed."
            )
        self._check_sealed()
        wrong = _wrong_arguments(given)
        if given.push_to_hub and "checkpoint" in str(given.hub_strategy.value) and not dp.secure:
            wrong.append(
                f"hub_strategy={given.hub_strategy.value!r} pushes checkpoints, and with them the seed "
                "that takes the noise off; use 'every_save' or 'end', or DPConfig(secure=True)"
            )
        if wrong:
            raise ValueError("these arguments do not go with differential privacy: " + " | ".join(wrong))
        own = _own_arguments(given)
        if "args" in kwargs:
            kwargs["args"] = own
        else:
            values[1] = own
        self.dp = dp
        self._virtual_batches = given.gradient_accumulation_steps
        self.ledger = Ledger()
        if dp.spent_ledger is not None:
            self.ledger.load_state_dict(json.loads(Path(dp.spent_ledger).read_text(encoding="utf-8")))
        self._seed = dp.seed
        if dp.seed is not None:
            logger.warning(
                "seed=%s: whoever knows it can take the noise off; leave it None outside of tests", dp.seed
            )
        self._engine: RecordGradients | None = None
        self._proof: list[tuple[Tensor, int]] | None = None
        self._noise_multiplier: float | None = None
        self._allowed_steps = 0
        self._clipped = (0, 0)
        self._batches: PoissonBatches | None = None
        self._inside_train = False
        self._spent: tuple[tuple[int, str], float] | None = None
        super().__init__(*values, **kwargs)
        # The loss is one for each record and has been scaled here; the host must not divide it again.
        self.loss_is_scaled_for_ga = True
        if isinstance(self.train_dataset, IterableDataset) or not isinstance(self.train_dataset, Sized):
            raise ValueError(
                "train_dataset must have a length and an index; got "
                f"{type(self.train_dataset).__name__}. A stream cannot be sampled at a known rate."
            )
        self._units = self._find_units()

    # What is sampled, and how often.

    def _check_sealed(self) -> None:
        for klass in type(self).__mro__:
            if klass is _DPMixin:
                return
            replaced = [name for name in _SEALED if name in vars(klass)]
            if replaced:
                raise TypeError(
                    f"{klass.__name__} replaces {', '.join(replaced)}, which carries the guarantee here. "
                    "Override compute_record_losses(model, inputs) for a loss of your own."
                )

    def _find_units(self) -> list[list[int]]:
        if self.dp.unit == "record":
            return [[number] for number in range(len(self.train_dataset))]
        try:
            column = list(self.train_dataset[self.dp.user_column])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"user_column={self.dp.user_column!r} is no column of train_dataset; it needs a "
                "datasets.Dataset with the user of each record. SFTTrainer drops columns it does not know: "
                "tokenize beforehand."
            ) from error
        return users_of(column)

    @property
    def expected_units(self) -> int:
        """Expected units in a step: batch size x accumulation x processes, as in the host."""
        size = self.args.per_device_train_batch_size * self._virtual_batches * self.args.world_size
        if size > len(self._units):
            raise ValueError(
                f"the batch ({size} = per_device_train_batch_size x gradient_accumulation_steps x processes) "
                f"exceeds the {len(self._units)} {self.dp.unit}s of train_dataset. Make it smaller."
            )
        return size

    @property
    def sample_rate(self) -> float:
        """Probability of a unit in a step."""
        return self.expected_units / len(self._units)

    @property
    def delta(self) -> float:
        """Delta of the guarantee."""
        return self.dp.delta if self.dp.delta is not None else 1 / (10 * len(self._units))

    def get_train_dataloader(self) -> DataLoader:
        """Poisson batches of units; see `hf_plugins.dp.dataset`."""
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        records = self.train_dataset
        if isinstance(records, datasets.Dataset):
            records, collate = self._remove_unused_columns(records, "training"), self.data_collator
        if self._seed is None and not self.dp.secure:
            self._seed = fresh_seed()
        # Ranks must agree on the seed; in secure mode each draws for its own units and none is needed.
        self._seed = _from_first_rank(self._seed)
        self._batches = PoissonBatches(
            self._units,
            sample_rate=self.sample_rate,
            steps=max(1, round(1 / self.sample_rate)),
            bound=self.dp.max_records_per_user,
            seed=self._seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )
        return poisson_loader(
            records,
            self._batches,
            collate,
            units_per_chunk=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    # The budget.

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation over the clipping norm; known once `train` has started."""
        if self._noise_multiplier is None:
            raise RuntimeError("the noise multiplier is computed when train() starts; nothing was spent yet.")
        return self._noise_multiplier

    def epsilon(self, accountant: AccountantName = "pld") -> float:
        """Epsilon spent so far, earlier runs on the same data included.

        Args:
            accountant: ``pld`` (reported everywhere), or ``rdp`` or ``prv`` as a cross-check.

        Returns:
            Epsilon for `delta`, add-or-remove-one-unit neighbours.
        """
        key = (self.ledger.num_steps, accountant)
        if self._spent is None or self._spent[0] != key:
            self._spent = (key, self.ledger.epsilon(delta=self.delta, accountant=accountant))
        return self._spent[1]

    def privacy_report(self) -> dict[str, Any]:
        """What may be said about the trained model, as plain JSON."""
        return {
            "epsilon": _number(self.epsilon()),
            "accountant": "pld",
            "delta": self.delta,
            "unit": self.dp.unit,
            "num_units": len(self._units),
            "neighbours": "add or remove one unit",
            "sampling": "poisson",
            "max_records_per_user": self.dp.max_records_per_user,
            "max_grad_norm": self.dp.max_grad_norm,
            "randomness": "os.urandom" if self.dp.secure else "seeded generator",
            "releases": self.ledger.state_dict()["releases"],
            "covered": "the weights, the optimizer state and everything computed from them",
            "not_covered": "hyper-parameter choice, evaluation on private data"
            + (", the logged training loss" if self.dp.log_private_statistics else ""),
        }

    def _release(self, num_steps: int = 1) -> Release:
        return Release(
            noise_multiplier=self.noise_multiplier, num_steps=num_steps, sample_rate=self.sample_rate
        )

    def _plan(self, num_steps: int) -> None:
        """Fix the noise and refuse a run that the budget does not cover."""
        if self._noise_multiplier is None:
            self._noise_multiplier = (
                self.dp.noise_multiplier
                if self.dp.noise_multiplier is not None
                else self._calibrated(num_steps)
            )
        planned = Ledger()
        planned.load_state_dict(self.ledger.state_dict())
        if num_steps:
            planned.add(self._release(num_steps))
        target = self.dp.target_epsilon
        if target is not None:
            total = planned.epsilon(delta=self.delta)
            if total > target:
                raise RuntimeError(
                    f"{num_steps} more steps would bring epsilon to {total:.3f}, over the budget of {target} "
                    f"({self.ledger.num_steps} steps are spent). Raise target_epsilon, or train on other "
                    "data."
                )
        self._allowed_steps = self.ledger.num_steps + num_steps
        if self._noise_multiplier == 0:
            logger.warning("noise_multiplier=0: this run is not private; epsilon is infinite.")

    def _calibrated(self, num_steps: int) -> float:
        if self.ledger.num_steps:
            raise RuntimeError(
                "target_epsilon cannot be split between an earlier run (spent_ledger) and this one; give "
                "noise_multiplier, and `mmhf dp noise` helps to choose it."
            )
        return noise_multiplier_for(
            target_epsilon=self.dp.target_epsilon or 0.0,
            num_steps=num_steps,
            delta=self.delta,
            sample_rate=self.sample_rate,
        )

    # The host's loop.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._inside_train = True
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._inside_train = False
            self._detach()

    def _detach(self) -> None:
        if self._engine is not None:
            self._engine.detach()
            self._step_guard.remove()
            self._engine = None

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_privacy_state(Path(resume_from_checkpoint))
        self._plan(max_steps - self.state.global_step)
        assert self._batches is not None, "the loader is made before the model is prepared"
        # Past steps of this trainer keep their draws and their noise to themselves.
        self._batches.first_step = self.ledger.num_steps - self.state.global_step
        self._arm(loader)
        return model, loader

    def _arm(self, loader: DataLoader) -> None:
        check_model(self.model)
        self._check_optimizer()
        self._frozen_or_not = [(p, p.requires_grad) for p in self.model.parameters()]
        if self.args.activation_checkpointing:
            # The first checkpointed block gets no gradient otherwise when the embeddings are frozen.
            self.model.enable_input_require_grads()
        tf32 = bool(self.args.tf32) or torch.get_float32_matmul_precision() != "highest"
        fault = why_not_ghost(tf32=tf32, by_user=self.dp.unit == "user")
        self._engine = attach(
            self.model,
            mode=self.dp.grad_sample_mode,
            max_grad_norm=self.dp.max_grad_norm,
            ghost_fault=fault,
        )
        self._step_guard = self._torch_optimizer().register_step_pre_hook(self._guard)
        armed = False
        try:
            self._self_check(loader)
            armed = True
        finally:
            if not armed:
                self._detach()

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        # accelerate's wrapper holds the optimizer that really steps.
        optimizer = self.optimizer
        return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer

    def _check_optimizer(self) -> None:
        known = {id(parameter) for parameter in trainable(self.model).values()}
        held = [p for group in self._torch_optimizer().param_groups for p in group["params"]]
        strangers = sum(p.requires_grad and id(p) not in known for p in held)
        if strangers:
            raise ValueError(
                f"the optimizer holds {strangers} trainable parameters that are not of this model; they "
                "would be trained without clipping. Build it from model.parameters()."
            )

    def _guard(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Runs before every step: the gradients must be, bit for bit, the ones that were paid for."""
        proof, self._proof = self._proof, None
        closure = any(value is not None for value in (*args[1:], *kwargs.values()))
        if proof is None or closure:
            raise RuntimeError(
                "optimizer.step() without a noisy gradient of its own; a step needs training_step() before "
                "it and no closure. Nothing was changed."
            )
        assert self._engine is not None, "the guard lives as long as the engine"
        held = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        ours = {id(p) for p in self._engine.parameters}
        proven = {id(gradient): version for gradient, version in proof}
        for number, parameter in held.items():
            gradient = parameter.grad
            if number not in ours or proven.get(id(gradient)) != gradient._version:
                raise RuntimeError(
                    "a gradient was changed or added after its noise (by a callback, or a second backward); "
                    "such a step is not covered. Remove what touches p.grad."
                )

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None) -> Tensor:
        """One private step on one Poisson batch; called by the host's loop.

        Args:
            model: The host's wrapped model, put into training mode; the plain one does the work, so that DDP
                never reduces what is not clipped.
            inputs: The batch.
            num_items_in_batch: Not used: tokens of the batch are no divisor here.

        Returns:
            Mean loss of the drawn records for the log, or 0 where it is not to be logged.
        """
        self._check_unchanged()
        model.train()
        step = self._open_step()
        losses: list[Tensor] = []
        for chunk in inputs.chunks:
            loss, contributions = self._run_chunk(chunk)
            step.add(contributions)
            losses.append(loss)
        self._pay()
        self._set_gradients(step)
        return self._logged_loss(losses)

    def _check_unchanged(self) -> None:
        if self._engine is None:
            raise RuntimeError(
                "training_step() belongs to train(), which checks the model and arms the guard."
            )
        if any(parameter.requires_grad is not before for parameter, before in self._frozen_or_not):
            raise RuntimeError(
                "the set of trainable parameters changed since train() began (a layer was frozen or "
                "unfrozen); the new ones would go unclipped. Start a new trainer with spent_ledger for the "
                "next phase."
            )

    def _open_step(self) -> NoisySum:
        assert self._engine is not None, "checked at the start of the step"
        return NoisySum(
            [parameter.shape for parameter in self._engine.parameters],
            self._engine.parameters[0].device,
            max_grad_norm=self.dp.max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            expected_units=self.expected_units,
        )

    def _run_chunk(self, chunk: Chunk) -> tuple[Tensor, list[Tensor | None]]:
        assert self._engine is not None, "checked at the start of the step"
        inputs = self._prepare_inputs(chunk.inputs)
        self._engine.start(len(chunk.units))
        with self.compute_loss_context_manager():
            losses = self._checked_losses(inputs, len(chunk.units))
        done = self._engine.backward(losses, chunk.units.to(losses.device), chunk.num_units)
        if self.dp.log_private_statistics:
            clipped, seen = self._clipped
            more = int((done.norms > self.dp.max_grad_norm).sum())
            self._clipped = (clipped + more, seen + chunk.num_units)
        return losses.detach(), done.contributions

    def _checked_losses(self, inputs: dict[str, Any], num_records: int) -> Tensor:
        losses = self.compute_record_losses(self.model, dict(inputs))
        if losses.shape != (num_records,):
            raise ValueError(
                f"the loss must be one number for each record, shape ({num_records},); got "
                f"{tuple(losses.shape)}. A mean over the batch (reduction='mean', num_items_in_batch) mixes "
                "records: return reduction='none', averaged over each record's own tokens."
            )
        return losses

    def _pay(self) -> None:
        """Charge the step before its gradient exists: a crash may cost budget, never privacy."""
        if self.ledger.num_steps >= self._allowed_steps:
            raise RuntimeError(
                f"all {self._allowed_steps} planned steps are spent; another one is not in the budget. Call "
                "train() again, which plans and accounts for more."
            )
        self.ledger.add(self._release())

    def _set_gradients(self, step: NoisySum) -> None:
        assert self._engine is not None, "checked at the start of the step"
        if self.args.process_index == 0:
            step.add_noise(self._gaussian())
        if self.args.world_size > 1:
            for total in step.sums:
                torch.distributed.all_reduce(total)
        proof = []
        for parameter, gradient in zip(self._engine.parameters, step.release(), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            proof.append((parameter.grad, parameter.grad._version))
        self._proof = proof

    def _gaussian(self) -> Any:
        if self.dp.secure:
            return lambda shape, device: secure_gaussian(shape).to(device)
        assert self._seed is not None, "a run that is not secure has a seed"
        device = self.args.device
        generator = torch.Generator(device).manual_seed(
            stream_seed(self._seed, "noise", self.ledger.num_steps)
        )
        return lambda shape, _: seeded_gaussian(shape, generator=generator)

    def _logged_loss(self, losses: list[Tensor]) -> Tensor:
        if not self.dp.log_private_statistics or not losses:
            return torch.zeros((), device=self.args.device)
        return torch.cat(losses).float().mean()

    # The loss.

    def compute_record_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Loss of each record; override it for a loss of your own.

        Args:
            model: The plain model.
            inputs: Collated records, labels included; may be changed.

        Returns:
            ``[B]``: each entry a function of its record alone.

        Raises:
            ValueError: If the model's loss is not known by record and no compute_loss_func is given.
        """
        if self.compute_loss_func is not None:
            labels = inputs.pop("labels", None)
            return self.compute_loss_func(model(**inputs), labels, num_items_in_batch=None)
        return model_losses(model, inputs)

    def _self_check(self, loader: DataLoader) -> None:
        """Compare clipped gradients of a few records with those of a loop over them, before any step.

        Where rounding decides which way max pooling or a ReLU goes, one chunk may differ a little; so more
        chunks are looked at before the model is refused. A model that mixes records differs in all of them.
        """
        assert self._engine is not None, "armed before it is checked"
        collate = loader.collate_fn
        assert isinstance(collate, ChunkCollator), "the loader was made by get_train_dataloader"
        half = self.args.bf16 or any(p.dtype != torch.float32 for p in self._engine.parameters)
        tolerance = _TOLERANCE_HALF if half else _TOLERANCE
        self.model.train()
        for first in range(0, _CHECKED * _CHUNKS_CHECKED, _CHECKED):
            # With few records the later chunks are the first one again.
            units = self._units[first : first + _CHECKED] or self._units[:_CHECKED]
            chunk = collate.chunk([loader.dataset[unit[:1]] for unit in units])
            inputs = self._prepare_inputs(chunk.inputs)
            error, alone = self_check_error(
                self._engine,
                lambda batch: self._checked_losses(batch, len(next(iter(batch.values())))),
                inputs,
                chunk.num_units,
                self.dp.max_grad_norm,
            )
            if error < tolerance or not error < 10 * tolerance:
                break
        if not error < tolerance:
            raise RuntimeError(
                f"gradients of {chunk.num_units} records together differ from those one by one by "
                f"{error:.1%}: the model or the loss mixes records, or a layer's gradient by record is "
                "wrong, and clipping would bound nothing. Look for batch statistics, losses averaged over "
                "the batch, unusual layers."
            )
        if (
            self.compute_loss_func is None
            and type(self).compute_record_losses is _DPMixin.compute_record_losses
        ):
            self._check_own_loss(inputs, alone[0], tolerance)

    def _check_own_loss(self, inputs: dict[str, Any], ours: float, tolerance: float) -> None:
        """The loss by record must be the model's own loss of a batch of one."""
        assert self._engine is not None, "armed before it is checked"
        one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self._engine.start(1)
        with torch.no_grad(), NoDropout(), self._engine.paused():
            own = float(self.model(**one).loss)
        if math.isfinite(own) and abs(own - ours) > tolerance * (1 + abs(own)):
            raise RuntimeError(
                f"the model's own loss of one record is {own:.4f}, ours {ours:.4f}: it is no plain "
                f"{loss_kind(self.model)} loss (an auxiliary loss, class weights?). Give a compute_loss_func "
                "that returns one loss for each record."
            )

    # The host's files and logs.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host; writes ``privacy.json`` (what may be claimed) and ``dp_ledger.json`` next to the
        weights.

        Args:
            output_dir: Where to; default: the host's.
            _internal_call: The host's.
        """
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save and self._noise_multiplier is not None:
            folder = Path(output_dir or self.args.output_dir)
            write_json(folder / REPORT_FILE, self.privacy_report())
            write_json(folder / LEDGER_FILE, self.ledger.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._seed is not None:
            secret = {"warning": "never publish: takes the noise off the model", "seed": self._seed}
            write_json(Path(output_dir) / SECRET_FILE, secret, private=True)

    def _load_privacy_state(self, folder: Path) -> None:
        path = folder / LEDGER_FILE
        if not path.is_file():
            raise RuntimeError(
                f"{folder} has no {LEDGER_FILE}, so what it has spent is unknown and training cannot go on "
                "from it. Resume from a checkpoint of a private run, or load its weights as a new model."
            )
        self.ledger.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        if self.dp.noise_multiplier is None and self.ledger.releases:
            self._noise_multiplier = self.ledger.releases[-1].noise_multiplier
        secret = folder / SECRET_FILE
        if secret.is_file() and not self.dp.secure:
            self._seed = json.loads(secret.read_text(encoding="utf-8"))["seed"]
            assert self._batches is not None, "the loader is made before the model is prepared"
            self._batches.seed = self._seed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the host, with ``dp/epsilon`` in and the training loss out (unless asked for).

        Args:
            logs: What the host logs.
            start_time: The host's.
        """
        if self._inside_train:
            if not self.dp.log_private_statistics:
                for name in ("loss", "train_loss"):
                    logs.pop(name, None)
            elif "loss" in logs and self._clipped[1]:
                logs["dp/clipped_ratio"] = self._clipped[0] / self._clipped[1]
                self._clipped = (0, 0)
            if "learning_rate" in logs or "train_runtime" in logs:
                logs["dp/epsilon"] = _number(self.epsilon())
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        # The host's own call goes through clip_grad_norm_, which writes to the gradients.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        """Always 0: the true number tells the lengths of the drawn records."""
        return 0

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial spends, and the choice between them is no private step.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "hyperparameter_search trains many times on the same records without adding up what that costs. "
            "Search on public data, or run trials one by one with spent_ledger."
        )


class DPTrainer(_DPMixin, Trainer):
    """`transformers.Trainer` with DP-SGD: ``DPTrainer(model, args, train_dataset=..., dp=DPConfig(...))``."""


class DPSFTTrainer(_DPMixin, SFTTrainer):
    """`trl.SFTTrainer` with DP-SGD, for causal language models, LoRA (``peft_config=``) included."""


def _number(value: float) -> float:
    """JSON has no infinity; -1 would be read as a good budget, so the largest float stands for none."""
    return value if math.isfinite(value) else sys.float_info.max


def _from_first_rank(value: int | None) -> int | None:
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
