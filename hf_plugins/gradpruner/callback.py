"""Collects LoRA gradients in a running Trainer, where they are averaged, clipped and not yet spent."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_plugins.decoder_layers import check_droppable, find_decoder_layers
from hf_plugins.gradpruner.config import GradPrunerConfig
from hf_plugins.gradpruner.importance import simulated_gradient, squared_norm
from hf_plugins.gradpruner.plan import PruningPlan, plan_pruning
from hf_plugins.gradpruner.storage import (
    HISTORY_FOLDER,
    SCORES_FILE,
    GradientHistory,
    Module,
    ScoreRecord,
    read_scores,
)
from hf_plugins.whole_files import write_json

logger = logging.get_logger(__name__)


class GradPrunerCallback(TrainerCallback):
    """Scores decoder layers from the gradients of the first LoRA steps; pass it as ``callbacks=[...]``.

    Works in ``Trainer`` and trl's ``SFTTrainer``, on one device, under DDP and under FSDP2. Training itself
    is not changed, except that it ends after the last collected step if ``stop_after`` is set.

    Args:
        config: Options; the paper's by default.
        history_layers: Keep gradient factors of these layers only (donors of a known plan); None for all.
        resume_from: Checkpoint folder to go on from, where it is not ``output_dir/checkpoint-STEP``.
    """

    def __init__(
        self,
        config: GradPrunerConfig | None = None,
        *,
        history_layers: Collection[int] | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.config = config or GradPrunerConfig()
        self._history_layers, self._resume_from = history_layers, resume_from
        self._modules: dict[Module, LoraLayer] = {}
        self._exact: _ExactGradients | None = None
        self._target = 0
        self.record = ScoreRecord(num_layers=0, estimator=self.config.estimator)
        self.history: GradientHistory | None = None

    @property
    def done(self) -> bool:
        """Whether all wanted steps are collected."""
        return 0 < self._target <= len(self.record.norms)

    def scores(self) -> Tensor:
        """Score of each layer, (L,) fp64.

        Raises:
            ValueError: If nothing, or only zeros, were collected.
        """
        return self.record.scores(score=self.config.score, normalize=self.config.normalize)

    def plan(self) -> PruningPlan:
        """Which layers go, by these scores and the options."""
        config = self.config
        return plan_pruning(
            self.scores(),
            n_prune=config.n_prune,
            ratio=config.ratio,
            n_merge=config.n_merge,
            protect=config.protect,
            layers=config.layers,
        )

    def save(self, folder: str | Path) -> None:
        """Write scores, and the gradient factors if they are in memory, for ``mmhf gradpruner apply``."""
        folder = Path(folder)
        write_json(folder / SCORES_FILE, self.record.to_dict())
        if self.history is not None and self.history.folder is None:
            self.history.save(folder / HISTORY_FOLDER)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the LoRA layers, refuse what hides gradients, go on from a checkpoint."""
        model = kwargs["model"]
        refuse_hidden_gradients(args)
        self._modules, num_layers = find_lora_modules(model)
        share = self.config.num_steps < 1
        self._target = (
            max(1, int(self.config.num_steps * state.max_steps + 0.999))
            if share
            else int(self.config.num_steps)
        )
        # Counts that do not fit the model are told before training, not after.
        _check_counts(self.config, num_layers)
        if state.global_step:
            self._resume(args, state)
        else:
            self.record = ScoreRecord(num_layers=num_layers, estimator=self.config.estimator)
            self.history = self._new_history(args, state)
            if self.history is not None and self.history.folder is not None:
                self.history.truncate(0)
        if self.config.estimator == "exact" and not self.done:
            refuse_split_batches(args)
            self._exact = _ExactGradients(self._modules)
        self.record.num_params = {key: module.weight.numel() for key, module in self._modules.items()}
        self._warn_if_little_data(args, state, kwargs.get("train_dataloader"))

    def _new_history(self, args: TrainingArguments, state: TrainerState) -> GradientHistory | None:
        # Gradients are equal on all ranks, so one keeps them.
        if self.config.history == "scores" or not state.is_world_process_zero:
            return None
        folder = Path(args.output_dir) / HISTORY_FOLDER if self.config.history == "disk" else None
        return GradientHistory(folder, self._history_layers)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = Path(self._resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not (folder / SCORES_FILE).is_file():
            raise ValueError(
                f"training resumes at step {state.global_step}, but {folder} holds no {SCORES_FILE}: the "
                "steps before would be missing. Name the checkpoint by resume_from=, or start the scoring "
                "run anew."
            )
        self.record = read_scores(folder)
        self.history = self._new_history(args, state)
        if self.history is not None:
            if self.history.folder is None:
                self.history.load(folder / HISTORY_FOLDER)
            self.history.truncate(len(self.record.norms))

    def _warn_if_little_data(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        if loader is None or not state.max_steps or state.global_step:
            return
        rows = self._target * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        whole = len(loader) * args.train_batch_size * args.world_size
        if whole and rows / whole < 0.0005:
            logger.warning(
                f"scores will rest on {rows} of {whole} rows, below 0.05 % of the data, where the paper's "
                "ranking breaks down. Raise num_steps or the batch size."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take this step's gradients in."""
        if self.done or not self._modules:
            return
        factors, norms = {}, {}
        for key, module in self._modules.items():
            pair = _step_factors(key, module, self.config.estimator)
            factors[key] = pair
            norms[key] = self._exact.take(key) if self._exact else squared_norm(*pair)
        # One transfer for all modules: a .item() each would wait for the device hundreds of times.
        values = torch.stack(list(norms.values())).tolist()
        if not torch.isfinite(torch.tensor(values)).all():
            self.record.num_skipped += 1
            logger.warning(
                f"step {state.global_step}: a gradient is inf or NaN; the step is not scored "
                f"({self.record.num_skipped} so far). Lower the learning rate if this goes on."
            )
            return
        if self.history is not None:
            self.history.add(
                {key: _in_weight_layout(self._modules[key], pair) for key, pair in factors.items()}
            )
        self.record.add(dict(zip(norms, values, strict=True)))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last collected step log the scores and, if asked, end training."""
        if not self.done or not self._modules:
            return
        self._detach()
        values = self.scores().tolist()
        entry = {f"gradpruner/score_{index}": value for index, value in enumerate(values)}
        state.log_history.append(
            {"step": state.global_step, "gradpruner/steps": len(self.record.norms)} | entry
        )
        logger.info(f"gradpruner: layer scores after {len(self.record.norms)} steps: {values}")
        if self.config.stop_after:
            control.should_training_stop = True

    def _detach(self) -> None:
        self._modules = {}
        if self._exact is not None:
            self._exact.remove()
            self._exact = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what was collected next to the checkpoint, so that a resumed run goes on."""
        if state.is_world_process_zero:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if fewer steps than wanted were there, and fail if they tell nothing."""
        if self._target and not self.done:
            logger.warning(
                f"training ended after {len(self.record.norms)} scored steps, {self._target} were wanted; "
                "scores rest on those. Train longer or lower num_steps."
            )
        self._detach()
        self.scores()


def _check_counts(config: GradPrunerConfig, num_layers: int) -> None:
    plan_pruning(
        torch.zeros(num_layers),
        n_prune=config.n_prune,
        ratio=config.ratio,
        n_merge=config.n_merge,
        protect=config.protect,
        layers=config.layers,
    )


def find_lora_modules(model: nn.Module) -> tuple[dict[Module, LoraLayer], int]:
    """LoRA layers inside the stack of decoder layers, and how many layers the stack has.

    Args:
        model: A PEFT model.

    Returns:
        (layer, name inside the layer) -> module with ``lora_A`` and ``lora_B``; number of layers.

    Raises:
        ValueError: If there is no plain LoRA on linear modules, or a layer cannot be dropped.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"GradPruner reads LoRA gradients and {type(model).__name__} has no adapter. Wrap it: "
            'get_peft_model(model, LoraConfig(target_modules="all-linear")), or give SFTTrainer a '
            "peft_config."
        )
    layers = find_decoder_layers(model.get_base_model())
    check_droppable(layers.config)
    found: dict[Module, LoraLayer] = {}
    for number, layer in enumerate(layers.modules):
        for name, module in layer.named_modules():
            if not isinstance(module, LoraLayer) or not module.lora_A:
                continue
            if not isinstance(module.get_base_layer(), nn.Linear | Conv1D):
                raise ValueError(
                    f"LoRA on {type(module.get_base_layer()).__name__} (layer {number}, {name}) cannot be "
                    "scored; only linear modules can. Take it out of target_modules."
                )
            if len(module.active_adapters) != 1 or any(module.use_dora.values()):
                raise ValueError(
                    f"layer {number}, {name}: exactly one active plain LoRA adapter is needed; got adapters "
                    f"{module.active_adapters}, use_dora={dict(module.use_dora)}. Delete the others, set "
                    "use_dora=False."
                )
            found[number, name] = module
    if not found:
        raise ValueError(
            f"no LoRA module inside {layers.name!r}; GradPruner has nothing to score. Use "
            "target_modules='all-linear'."
        )
    return found, len(layers.modules)


def refuse_hidden_gradients(args: TrainingArguments) -> None:
    """Refuse engines that have spent or scattered the gradients when ``on_pre_optimizer_step`` runs.

    Raises:
        ValueError: Under DeepSpeed, FSDP1 and optimizers that step inside backward.
    """
    cure = "Use DDP or FSDP2, or score with `python -m hf_plugins.gradpruner score` on one device."
    # Read when Trainer has built it; a callback called by hand has none.
    shared = AcceleratorState._shared_state
    kind = shared.get("distributed_type")
    if args.deepspeed or kind == DistributedType.DEEPSPEED:
        raise ValueError(
            f"gradients are already freed when this callback runs: DeepSpeed steps inside backward(). {cure}"
        )
    plugin = shared.get("fsdp_plugin")
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(f"FSDP1 keeps gradients as flat shards without a module's shape. {cure}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "layerwise" in optimizer or optimizer in ("lomo", "adalomo"):
        raise ValueError(
            f"optim={optimizer!r} steps inside backward(), so no gradient is left to score. Use "
            "optim='adamw_torch'."
        )


def refuse_split_batches(args: TrainingArguments) -> None:
    """The exact estimator sees one micro-batch on one process at a time; refuse what would need their sum.

    Raises:
        ValueError: With accumulation, several processes or fp16 loss scaling.
    """
    if args.gradient_accumulation_steps > 1 or args.world_size > 1 or args.fp16:
        raise ValueError(
            "estimator='exact' needs the whole batch in one backward pass: one process, "
            f"gradient_accumulation_steps=1, no fp16; got {args.world_size} processes, "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, fp16={args.fp16}. "
            "Use estimator='product'."
        )


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _step_factors(key: Module, module: LoraLayer, estimator: str) -> tuple[Tensor, Tensor]:
    adapter = module.active_adapters[0]
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    if a.grad is None or b.grad is None:
        raise RuntimeError(
            f"LoRA of layer {key[0]}, {key[1]} has no gradient: it is frozen or was not used in the "
            "forward pass. Train every adapter of the layers, or take the module out of target_modules."
        )
    parts = (_whole(a.detach()), _whole(b.detach()), _whole(a.grad), _whole(b.grad))
    return simulated_gradient(*parts, estimator=estimator)  # type: ignore[arg-type]


def _in_weight_layout(module: LoraLayer, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    left, right = pair
    # GPT-2's Conv1D keeps (in, out): its gradient is the transpose, right^T left^T.
    return (right.T, left.T) if isinstance(module.get_base_layer(), Conv1D) else pair


class _ExactGradients:
    """Squared norm of the true weight gradient, formed for one module at a time while backward passes it."""

    def __init__(self, modules: dict[Module, LoraLayer]) -> None:
        self._norms: dict[Module, Tensor] = {}
        self._handles = [module.register_forward_hook(self._hook(key)) for key, module in modules.items()]

    def _hook(self, key: Module) -> Callable[..., None]:
        def forward(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            entered = arguments[0].detach()

            def backward(gradient: Tensor) -> None:
                left, right = gradient.flatten(0, -2).float(), entered.flatten(0, -2).float()
                self._norms[key] = (
                    squared_norm(left.T, right)
                    if len(left) ** 2 < left.shape[1] * right.shape[1]
                    else ((left.T @ right).square().sum().double())
                )

            output.register_hook(backward)

        return forward

    def take(self, key: Module) -> Tensor:
        """The norm of the last backward pass."""
        return self._norms.pop(key)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
