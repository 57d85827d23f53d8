"""Shorten a model in memory, and measure what the baselines need of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_plugins.decoder_layers import bypass_layers, drop_layers, find_decoder_layers, watch_layers
from hf_plugins.gradpruner.baselines import (
    Groups,
    block_influence,
    laco_groups,
    laco_plan,
    magnitude,
    random_order,
    reverse_order,
)
from hf_plugins.gradpruner.config import GradPrunerConfig
from hf_plugins.gradpruner.merging import Donor, merge_difference, merge_module
from hf_plugins.gradpruner.plan import PruningPlan, check_plan, count_to_prune, orphans, plan_pruning
from hf_plugins.gradpruner.storage import GradientHistory

logger = logging.get_logger(__name__)
Batch = Mapping[str, Tensor]


def prune_model(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    history: GradientHistory | None = None,
    keep: float = 0.2,
    weighting: str = "none",
) -> dict[str, Any]:
    """Merge and drop layers of a model, in place.

    Args:
        model: The base model, without an adapter. Afterwards it saves and reloads as any other.
        plan: Which layers go; from `plan_pruning` or ``callback.plan()``.
        history: Gradient factors of the donors (``callback.history``); needed if the plan merges by sign.
        keep: Share of a donor's entries that may be merged.
        weighting: See `merging.merge_module`.

    Returns:
        What was done, for the result file: counts of each merged module.

    Raises:
        TypeError: If the model still carries an adapter or its weights are quantised.
        ValueError: If plan, history and model do not belong together.
    """
    if isinstance(model, PeftModel):
        raise TypeError(
            "prune_model works on the base model; call model.unload() first. The adapter of the scoring "
            "run is thrown away, merging it would change the base weights."
        )
    layers = find_decoder_layers(model).modules
    check_plan(plan, len(layers), has_history=history is not None)
    if plan.merged and orphans(plan):
        logger.warning(
            f"layers {orphans(plan)} have no kept layer before them and are dropped without merging."
        )
    counts = {}
    for receiver, donors in plan.receivers.items():
        if plan.rule == "difference":
            _merge_all(layers[receiver], [layers[donor] for donor in donors])
            continue
        assert history is not None, "check_plan lets no sign merge without a history pass"
        for name in history.modules(donors[0]):
            merged = _merge_one(layers, receiver, donors, name, history, keep=keep, weighting=weighting)
            counts[f"{receiver}.{name}"] = merged
    drop_layers(model, plan.dropped)
    return counts


def _matrix(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor), "a LoRA target has a weight"
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TypeError(
            f"{name} holds {weight.dtype} of shape {tuple(weight.shape)}: quantised weights cannot be "
            "merged. Load the model unquantised, or run `mmhf gradpruner apply` on its original checkpoint."
        )
    return weight.data


@torch.no_grad()
def _merge_one(
    layers: nn.ModuleList,
    receiver: int,
    donors: Sequence[int],
    name: str,
    history: GradientHistory,
    *,
    keep: float,
    weighting: str,
) -> dict[str, int]:
    target = _matrix(layers[receiver], name)
    # Merged on the CPU, where the factors are; a module is small and this happens once.
    work = target.cpu().clone()
    sources = [Donor(_matrix(layers[donor], name).cpu(), *history.factors(donor, name)) for donor in donors]
    own = history.factors(receiver, name) if weighting == "importance" else None
    counts = merge_module(work, sources, keep=keep, weighting=weighting, receiver_factors=own)  # type: ignore[arg-type]
    target.copy_(work)
    return counts._asdict()


@torch.no_grad()
def _merge_all(receiver: nn.Module, donors: Sequence[nn.Module]) -> None:
    others = [dict(donor.named_parameters()) for donor in donors]
    for name, parameter in receiver.named_parameters():
        merge_difference(parameter.data, [other[name].data for other in others])


def baseline_plan(
    model: PreTrainedModel, config: GradPrunerConfig, batches: Sequence[Batch] = ()
) -> PruningPlan:
    """The plan of a method that needs no gradients.

    Args:
        model: The base model.
        config: Its ``method`` names the baseline; counts and protection hold as for GradPruner, merging does
            not.
        batches: Calibration batches, keyword arguments of the model, for ``block_influence`` and ``laco``.

    Returns:
        A plan without sign merging.

    Raises:
        ValueError: If the method needs calibration batches and there is none, or is ``gradpruner``.
    """
    method = config.method
    if method in ("block_influence", "laco") and not batches:
        raise ValueError(
            f"method={method!r} looks at text; give calibration batches (train_file in the command)."
        )
    layers = find_decoder_layers(model).modules
    count = len(layers)
    if method == "laco":
        wanted = count_to_prune(count, n_prune=config.n_prune, ratio=config.ratio)
        with _still(model):
            return laco_plan(
                count, laco_groups(count, wanted, _Similarity(model, batches), protect=config.protect)
            )
    if method == "reverse":
        scores = reverse_order(count)
    elif method == "random":
        scores = random_order(count, generator=torch.Generator().manual_seed(config.plan_seed))
    elif method == "magnitude":
        scores = magnitude([[p.detach() for p in layer.parameters() if p.ndim == 2] for layer in layers])
    elif method == "block_influence":
        with _still(model):
            scores = block_influence(mean_cosines(model, batches))
    else:
        raise ValueError(
            "method='gradpruner' plans from gradients: use GradPrunerCallback, or `score` in the command."
        )
    plan = plan_pruning(
        scores,
        n_prune=config.n_prune,
        ratio=config.ratio,
        n_merge=0,
        protect=config.protect,
        layers=config.layers,
    )
    return replace(plan, method=method)


@contextmanager
def _still(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


def mean_cosines(model: PreTrainedModel, batches: Iterable[Batch]) -> list[float]:
    """Mean cosine between what enters and what leaves each layer, over all tokens that are not padding."""
    count = len(find_decoder_layers(model).modules)
    total, tokens = torch.zeros(count, dtype=torch.float64), 0
    for batch in batches:
        mask = _token_mask(batch)

        def report(number: int, entered: Tensor, left: Tensor, mask: Tensor = mask) -> None:
            cosine = torch.nn.functional.cosine_similarity(entered.float(), left.float(), dim=-1)
            total[number] += (cosine * mask).sum(dtype=torch.float64).cpu()

        with watch_layers(model, report):
            model(**batch)
        tokens += int(mask.sum())
    return (total / tokens).tolist()


def _token_mask(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


class _Similarity:
    """Mean cosine between the last hidden states of the whole model and of one with collapsed groups."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._whole = [self._last(batch) for batch in batches]
        self._known: dict[tuple, float] = {}

    def _last(self, batch: Batch) -> Tensor:
        return self._model(**batch, output_hidden_states=True).hidden_states[-1].float()

    def __call__(self, groups: Groups) -> float:
        key = tuple(groups)
        if key not in self._known:
            self._known[key] = self._measure(groups)
        return self._known[key]

    def _measure(self, groups: Groups) -> float:
        layers = find_decoder_layers(self._model).modules
        before = {
            receiver: [p.detach().clone() for p in layers[receiver].parameters()] for receiver, _ in groups
        }
        try:
            for receiver, donors in groups:
                _merge_all(layers[receiver], [layers[donor] for donor in donors])
            total, tokens = 0.0, 0
            with bypass_layers(self._model, [donor for _, donors in groups for donor in donors]):
                for batch, whole in zip(self._batches, self._whole, strict=True):
                    mask = _token_mask(batch)
                    cosine = torch.nn.functional.cosine_similarity(self._last(batch), whole, dim=-1)
                    total, tokens = total + float((cosine * mask).sum()), tokens + int(mask.sum())
            return total / tokens
        finally:
            for receiver, saved in before.items():
                for parameter, old in zip(layers[receiver].parameters(), saved, strict=True):
                    parameter.data.copy_(old)
