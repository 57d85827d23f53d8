"""Gradients of each record through Opacus, attached to a plain model; and which models cannot have them."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from hf_plugins.dp.clipping import (
    bias_clipped_sum,
    bias_norms,
    clip_factors,
    clipped_sum,
    embedding_clipped_sum,
    embedding_gradients,
    embedding_norms,
    linear_clipped_sum,
    linear_norms,
    unit_means,
    unit_norms,
)
from hf_plugins.dp.convolution import depthwise_gradients, is_depthwise, pointwise_gradients

logger = logging.getLogger(__name__)


class ChunkResult(NamedTuple):
    """What one chunk of records gives to the step."""

    contributions: list[Tensor | None]
    """Clipped sum of each trainable parameter, float32; None where no record reached it."""
    norms: Tensor
    """Norm of each unit before clipping, float64."""


def _embedding_sampler(layer: nn.Embedding, activations: Sequence[Tensor], backprops: Tensor) -> dict:
    """Opacus' own sampler trains the padding row, which PyTorch never does."""
    table = embedding_gradients(
        activations[0], backprops, rows=layer.num_embeddings, padding_idx=layer.padding_idx
    )
    return {layer.weight: table}


def _linear_sampler(layer: nn.Linear, activations: Sequence[Tensor], backprops: Tensor) -> dict:
    """As Opacus', through one batched product, which is faster than its einsum over named axes."""
    x = activations[0].reshape(activations[0].shape[0], -1, activations[0].shape[-1]).to(backprops.dtype)
    g = backprops.reshape(backprops.shape[0], -1, backprops.shape[-1])
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = torch.bmm(g.mT, x)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = g.sum(1)
    return found


def _conv2d_sampler(layer: nn.Conv2d, activations: Sequence[Tensor], backprops: Tensor) -> dict:
    """Opacus unfolds the input, which costs a depthwise convolution 5 to 25 times the time of the layer."""
    # Opacus reads a channels_last input through strides of the usual order and returns a wrong gradient.
    # Under autocast the input is kept as it came, and the gradient in half precision.
    inputs = activations[0].to(backprops.dtype).contiguous()
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or layer.bias is not None or not layer.weight.requires_grad:
        return compute_conv_grad_sample(layer, [inputs], backprops)
    if is_depthwise(layer.in_channels, layer.out_channels, layer.groups):
        gradients = depthwise_gradients(
            inputs,
            backprops,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
        )
        return {layer.weight: gradients}
    if (*layer.kernel_size, *layer.stride, *layer.padding, layer.groups) == (1, 1, 1, 1, 0, 0, 1):
        return {layer.weight: pointwise_gradients(inputs, backprops)}
    return compute_conv_grad_sample(layer, [inputs], backprops)


class _Kept(NamedTuple):
    """What one call of a layer saw: enough for norms and clipped sums, without gradients of each record."""

    layer: nn.Module
    inputs: Tensor
    gradients: Tensor


# An own table instead of Opacus' registration, which would change its behaviour for everybody in the process.
class _Hooks(GradSampleHooks):
    """Opacus' hooks, and two things more.

    ``sources`` are the parameters at which a backward pass may end and still run through every hooked layer:
    those of layers whose inputs need no gradient, since whatever lies behind them leads to one. A pass to
    them alone leaves out the gradients of all other weights, which nobody reads.

    With ``keep`` linear layers and embeddings keep what they saw instead of building gradients.
    """

    GRAD_SAMPLERS = {
        **GradSampleHooks.GRAD_SAMPLERS,
        nn.Conv2d: _conv2d_sampler,
        nn.Embedding: _embedding_sampler,
        nn.Linear: _linear_sampler,
    }

    def __init__(self, model: nn.Module, *, keep: bool) -> None:
        self.keep = keep
        self.sources: list[nn.Parameter] = []
        self.kept: dict[int, list[_Kept]] = {}
        super().__init__(model, loss_reduction="sum", strict=False)

    def capture_activations_hook(self, module: nn.Module, forward_input: Any, _forward_output: Any) -> None:
        super().capture_activations_hook(module, forward_input, _forward_output)
        if torch.is_grad_enabled() and not any(t.requires_grad for t in forward_input):
            self.sources += [p for p in module.parameters() if p.requires_grad]

    def capture_backprops_hook(
        self, module: nn.Module, _forward_input: Any, forward_output: Any, **options: Any
    ) -> None:
        if not self.keep or not self.hooks_enabled or type(module) not in (nn.Linear, nn.Embedding):
            super().capture_backprops_hook(module, _forward_input, forward_output, **options)
            return
        activations, gradients = self.rearrange_grad_samples(
            module=module, backprops=forward_output[0].detach(), **options
        )
        for parameter in module.parameters():
            if parameter.requires_grad:
                self.kept.setdefault(id(parameter), []).append(_Kept(module, activations[0], gradients))
                parameter._forward_counter -= 1


def _kept_norms(kept: _Kept, parameter: nn.Parameter) -> Tensor:
    layer = kept.layer
    if isinstance(layer, nn.Embedding):
        return embedding_norms(
            kept.inputs, kept.gradients, rows=layer.num_embeddings, padding_idx=layer.padding_idx
        )
    return (
        linear_norms(kept.inputs, kept.gradients) if parameter is layer.weight else bias_norms(kept.gradients)
    )


def _kept_sum(kept: _Kept, parameter: nn.Parameter, factors: Tensor) -> Tensor:
    layer = kept.layer
    if isinstance(layer, nn.Embedding):
        return embedding_clipped_sum(
            kept.inputs,
            kept.gradients,
            factors,
            rows=layer.num_embeddings,
            padding_idx=layer.padding_idx,
        )
    if parameter is layer.weight:
        return linear_clipped_sum(kept.inputs, kept.gradients, factors)
    return bias_clipped_sum(kept.gradients, factors)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def mixing_layers(model: nn.Module) -> list[str]:
    """Layers whose output for one record depends on the others of the batch, frozen or not."""
    found = []
    for name, module in model.named_modules():
        running = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        if isinstance(module, _BatchNorm) or running:
            found.append(f"{name} ({type(module).__name__})")
    return found


def check_model(model: nn.Module) -> None:
    """Refuse models that no clipping of records' gradients can make private.

    Args:
        model: The model as it will be trained.

    Raises:
        ValueError: If a layer mixes records, or nothing is trainable.
    """
    mixing = mixing_layers(model)
    if mixing:
        raise ValueError(
            f"these layers mix the records of a batch: {', '.join(mixing[:5])}. One record then moves the "
            "gradients of others and clipping bounds nothing, even where the layer is frozen. Replace "
            "them, for example by nn.GroupNorm (opacus.validators.ModuleValidator.fix does it)."
        )
    if not trainable(model):
        raise ValueError("no parameter of the model is trainable; unfreeze a layer or add a LoRA adapter.")


class RecordGradients:
    """Clipped sums of records' gradients of one model; made by `attach`, undone by `detach`.

    Args:
        model: The plain model; hooks are put on it, it is not wrapped.
        ghost: Linear layers and embeddings give norms and clipped sums, not gradients of each record.
        max_grad_norm: Clipping norm.
    """

    def __init__(self, model: nn.Module, *, ghost: bool, max_grad_norm: float) -> None:
        self.names = list(trainable(model))
        self.parameters = list(trainable(model).values())
        self._norm = max_grad_norm
        self._hooks = _Hooks(model, keep=ghost)
        self._batch = 0
        self._modules = list(model.modules())
        # Re-entrant checkpoints run a backward pass of their own and allow no end points.
        self._lean = not any(m.__dict__.get("gradient_checkpointing") for m in self._modules)
        self._expanders = [
            module.register_forward_pre_hook(self._expand)
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.weight.requires_grad
        ]

    def detach(self) -> None:
        """Take all hooks and the attributes that Opacus put on parameters away."""
        for handle in self._expanders:
            handle.remove()
        self._hooks.cleanup()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward in here are PyTorch's own."""
        self._hooks.disable_hooks()
        try:
            yield
        finally:
            self._hooks.enable_hooks()

    def start(self, num_records: int) -> None:
        """Announce a chunk, before its forward pass.

        Args:
            num_records: Records of the chunk.
        """
        self._batch = num_records
        self._hooks.sources, self._hooks.kept = [], {}
        for parameter in self.parameters:
            parameter.grad = None
            parameter.grad_sample = None
            parameter._forward_counter = 0
        # A forward pass without a backward one (a callback's, say) leaves its activations behind.
        for module in self._modules:
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)

    def backward(
        self, losses: Tensor, units: Tensor, num_units: int, *, thorough: bool = False
    ) -> ChunkResult:
        """Backward pass of one chunk, clipped by unit.

        Args:
            losses: Loss of each record, ``[B]``.
            units: Unit of each record, ``[B]``.
            num_units: Units of the chunk.
            thorough: Compute all gradients of the batch as well, to find parameters that hooks do not see.

        Returns:
            Clipped sums and norms.

        Raises:
            RuntimeError: If a parameter has a gradient that is not known by record.
        """
        ends = list({id(p): p for p in self._hooks.sources}.values())
        losses.sum().backward(inputs=None if thorough or not self._lean else ends or None)
        found = [self._found(parameter) for parameter in self.parameters]
        self._check_known(found)
        if num_units < self._batch:
            found = [None if g is None else unit_means(g, units, num_units) for g in found]
        norms = unit_norms(
            [
                _kept_norms(g, p)[:, None] if isinstance(g, _Kept) else g
                for g, p in zip(found, self.parameters, strict=True)
                if g is not None
            ]
        )
        factors = clip_factors(norms, self._norm)
        sums = [
            _kept_sum(g, p, factors)
            if isinstance(g, _Kept)
            else (None if g is None else clipped_sum(g, factors))
            for g, p in zip(found, self.parameters, strict=True)
        ]
        self.start(0)
        return ChunkResult(sums, norms)

    def _found(self, parameter: nn.Parameter) -> Tensor | _Kept | None:
        """Gradients of each record, or what stands for them, or None if no record reached the parameter."""
        kept, built = self._hooks.kept.get(id(parameter), []), parameter.grad_sample
        if not kept:
            return built
        if len(kept) == 1 and built is None:
            return kept[0]
        # A layer that is called twice, or tied to another: the norm of a sum needs the sum.
        total = sum(self._build(each, parameter) for each in kept)
        return total if built is None else total + built

    def _build(self, kept: _Kept, parameter: nn.Parameter) -> Tensor:
        sampler = self._hooks.GRAD_SAMPLERS[type(kept.layer)]
        return sampler(kept.layer, [kept.inputs], kept.gradients)[parameter]

    def _expand(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give broadcast indices (BERT's and GPT-2's positions come as one row) the axis of the records."""
        index = inputs[0]
        if index.dim() > 1 and index.shape[0] == 1 < self._batch and module.training:
            return (index.expand(self._batch, *index.shape[1:]), *inputs[1:])
        return inputs

    def _check_known(self, found: Sequence[Tensor | _Kept | None]) -> None:
        sizes = [len(g.gradients) if isinstance(g, _Kept) else None if g is None else len(g) for g in found]
        lost = [
            name
            for name, parameter, size in zip(self.names, self.parameters, sizes, strict=True)
            if (size is None and parameter.grad is not None) or size not in (None, self._batch)
        ]
        if lost:
            raise RuntimeError(
                f"gradients of these parameters are not known record by record: {', '.join(lost[:5])}. "
                "They would go unclipped. Freeze them, or train LoRA adapters on linear layers instead."
            )


class NoDropout(TorchFunctionMode):
    """Within it dropout does nothing, wherever it is called from; layers stay in training mode."""

    _DROPOUTS = frozenset({F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout})

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in self._DROPOUTS:
            return args[0] if args else options["input"]
        if func is F.scaled_dot_product_attention and (len(args) > 4 or "dropout_p" in options):
            args, options["dropout_p"] = (*args[:4], 0.0, *args[5:])[: len(args)], 0.0
            if len(args) > 4:
                del options["dropout_p"]
        return func(*args, **options)


def self_check_error(
    gradients: RecordGradients,
    losses_of: Callable[[dict[str, Any]], Tensor],
    inputs: dict[str, Any],
    num_records: int,
    max_grad_norm: float,
) -> tuple[float, list[float]]:
    """How far the clipped sum of some records is from a loop over them, dropout off.

    Args:
        gradients: Attached to the model, which is in training mode.
        losses_of: Losses of the records of a batch.
        inputs: A collated batch of ``num_records`` records.
        num_records: B.
        max_grad_norm: Clipping norm.

    Returns:
        Norm of the difference over norm of the loop's result, and the loss of each record alone.
    """
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in gradients.parameters]
    alone = []
    with NoDropout():
        for number in range(num_records):
            one = {
                name: value[number : number + 1] if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
            with gradients.paused():
                gradients.start(1)
                loss = losses_of(one)
                loss.sum().backward()
            own = [
                torch.zeros_like(s) if p.grad is None else p.grad.float()
                for p, s in zip(gradients.parameters, sums, strict=True)
            ]
            factor = clip_factors(unit_norms([g[None] for g in own]), max_grad_norm)
            for total, gradient in zip(sums, own, strict=True):
                total += clipped_sum(gradient[None], factor)
            alone.append(float(loss.detach().sum()))
        gradients.start(num_records)
        units = torch.arange(num_records, device=sums[0].device)
        together = gradients.backward(losses_of(inputs), units, num_records, thorough=True).contributions
    difference = [s if c is None else s - c for s, c in zip(sums, together, strict=True)]
    size = float(unit_norms([s[None] for s in sums]))
    return float(unit_norms([d[None] for d in difference])) / max(size, 1e-12), alone


def why_not_ghost(*, tf32: bool, by_user: bool) -> str | None:
    """Reason why ghost clipping is not exact here, or None.

    Args:
        tf32: Whether matrix products may drop mantissa bits.
        by_user: Whether the unit of privacy is a user.

    Returns:
        One clause, for the log or the error.
    """
    if by_user:
        return "the norm of a user's mean gradient does not follow from the norms of records"
    if tf32:
        return "TF32 rounds the products that the norms are made of"
    return None


def attach(model: nn.Module, *, mode: str, max_grad_norm: float, ghost_fault: str | None) -> RecordGradients:
    """Put the chosen way to get records' gradients on a model.

    Args:
        model: A plain model that passed `check_model`.
        mode: ``ghost``, ``hooks`` or ``auto``.
        max_grad_norm: Clipping norm.
        ghost_fault: From `why_not_ghost`.

    Returns:
        The attached gradients.

    Raises:
        ValueError: If ghost was asked for where it is not exact.
    """
    if mode == "ghost" and ghost_fault is not None:
        raise ValueError(
            f"grad_sample_mode='ghost' is not exact here: {ghost_fault}. Use 'hooks', or 'auto', which "
            "chooses."
        )
    ghost = mode == "ghost" or (mode == "auto" and ghost_fault is None)
    # The first layer's input needs no gradient, which is as it should be; PyTorch would say so once a layer.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    reason = f" ({ghost_fault})" if mode == "auto" and ghost_fault else ""
    logger.info("gradients of each record by %s%s", "ghost clipping" if ghost else "hooks", reason)
    return RecordGradients(model, ghost=ghost, max_grad_norm=max_grad_norm)
