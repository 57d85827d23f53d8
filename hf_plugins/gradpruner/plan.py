"""Which layers go, and into which kept layer some of them are merged."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# The paper drops 10 of 32 layers before accuracy falls off, and merges what it removes beyond them.
SAFE_SHARE = 10 / 32
# The paper removes 13 of 32 layers.
PAPER_RATIO = 0.4


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Layers to drop and merges to do before; plain values that survive JSON."""

    num_layers: int
    """Layers of the model as it is."""
    dropped: tuple[int, ...]
    """Numbers of the layers that go, ascending."""
    merged: tuple[tuple[int, int], ...] = ()
    """Pairs (donor, receiver): the donor goes, the receiver stays and takes part of it in."""
    scores: tuple[float, ...] = ()
    """Score of each layer, lowest first to go; empty for a hand-made plan."""
    method: str = "gradpruner"
    """What the scores are."""
    rule: str = "same_sign"
    """How donors are merged: ``same_sign`` (GradPruner) or ``difference`` (LaCo)."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the layers that stay, ascending."""
        return tuple(index for index in range(self.num_layers) if index not in self.dropped)

    @property
    def receivers(self) -> dict[int, tuple[int, ...]]:
        """Receiver -> its donors, ascending."""
        groups: dict[int, tuple[int, ...]] = {}
        for donor, receiver in sorted(self.merged):
            groups[receiver] = (*groups.get(receiver, ()), donor)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruningPlan":
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: If layers do not exist, or a merge does not lead from a dropped to a kept layer.
        """
        plan = cls(
            num_layers=int(values["num_layers"]),
            dropped=tuple(values["dropped"]),
            merged=tuple((donor, receiver) for donor, receiver in values.get("merged", ())),
            scores=tuple(values.get("scores", ())),
            method=values.get("method", "gradpruner"),
            rule=values.get("rule", "same_sign"),
        )
        inside = all(0 <= index < plan.num_layers for index in plan.dropped) and plan.kept
        if not inside or any(d not in plan.dropped or r not in plan.kept for d, r in plan.merged):
            raise ValueError(
                f"not a pruning plan: dropped={list(plan.dropped)}, "
                f"merged={[list(pair) for pair in plan.merged]} for {plan.num_layers} layers. Dropped layers "
                "must exist, and a merge goes from a dropped to a kept one."
            )
        return plan


def protected_layers(protect: Collection[int], num_layers: int) -> set[int]:
    """Layer numbers that may not go; negative ones count from the end.

    Raises:
        ValueError: If one does not exist.
    """
    wrong = sorted(index for index in protect if not -num_layers <= index < num_layers)
    if wrong:
        raise ValueError(
            f"protect names layers {wrong}; this model has 0 to {num_layers - 1} (or -1 for the last)."
        )
    return {index % num_layers for index in protect}


def count_to_prune(num_layers: int, *, n_prune: int | None, ratio: float | None) -> int:
    """How many layers go: ``n_prune`` if given, otherwise the share ``ratio``, rounded to the nearest."""
    if n_prune is not None:
        return n_prune
    return int((PAPER_RATIO if ratio is None else ratio) * num_layers + 0.5)


def count_to_merge(num_layers: int, num_dropped: int, n_merge: int | str | None) -> int:
    """How many of the dropped layers are merged.

    ``None`` follows the paper: what goes beyond 10 of 32 layers (3 of 13 in its experiments). ``all`` merges
    all.
    """
    if n_merge == "all":
        return num_dropped
    if n_merge is None:
        return max(0, num_dropped - int(SAFE_SHARE * num_layers))
    return int(n_merge)


def nearest_preceding(donor: int, kept: Collection[int]) -> int | None:
    """The kept layer closest before ``donor``; None if there is none."""
    return max((index for index in kept if index < donor), default=None)


def plan_pruning(
    scores: Sequence[float] | Tensor,
    *,
    n_prune: int | None = None,
    ratio: float | None = None,
    n_merge: int | str | None = None,
    protect: Collection[int] = (0, -1),
    layers: Collection[int] | None = None,
    method: str = "gradpruner",
) -> PruningPlan:
    """Choose the lowest-scored layers to go, and the highest-scored of those to be merged before.

    Equal scores: the later layer goes first. A donor's receiver is the nearest kept layer before it; a donor
    without one is dropped without a merge.

    Args:
        scores: One number a layer; low means it may go.
        n_prune: Layers to drop.
        ratio: Share of layers to drop, instead of ``n_prune``; 0.4 (13 of 32) if neither is given.
        n_merge: How many dropped layers are merged; ``"all"``; None for the paper's rule, see
            `count_to_merge`.
        protect: Layers that stay whatever their score.
        layers: Exactly these go, instead of the lowest-scored.
        method: Name of the scores, kept in the plan.

    Returns:
        The plan.

    Raises:
        ValueError: If the counts do not fit the number of layers, a protected layer is listed, or a score is
            not finite.

    Source: GradPruner, arXiv 2601.19503. That the highest-scored of the removed are merged, and that layer 0
        and the last are protected, is read from the authors' hand-typed lists.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    num_layers = len(values)
    if not torch.isfinite(values).all():
        bad = [index for index in range(num_layers) if not torch.isfinite(values[index])]
        raise ValueError(f"scores of layers {bad} are not finite; nothing is planned on them.")
    kept_anyway = protected_layers(protect, num_layers)
    if n_prune is not None and ratio is not None:
        raise ValueError(f"n_prune={n_prune} and ratio={ratio} exclude each other; give one.")
    # Ascending score; of equal ones the later layer first.
    order = sorted(range(num_layers), key=lambda index: (float(values[index]), -index))
    if layers is None:
        count = count_to_prune(num_layers, n_prune=n_prune, ratio=ratio)
        free = [index for index in order if index not in kept_anyway]
        if not 0 <= count <= min(len(free), num_layers - 1):
            raise ValueError(
                f"{count} of {num_layers} layers shall go, but only 0 to {min(len(free), num_layers - 1)} "
                f"can: {len(kept_anyway)} are protected ({sorted(kept_anyway)}). Lower n_prune or ratio, or "
                "shorten protect."
            )
        chosen = set(free[:count])
    else:
        chosen = set(layers)
        _check_listed(chosen, kept_anyway, num_layers)
    merges = count_to_merge(num_layers, len(chosen), n_merge)
    if not 0 <= merges <= len(chosen):
        raise ValueError(
            f"n_merge={merges} of {len(chosen)} dropped layers cannot be merged; give 0 to {len(chosen)}."
        )
    donors = [index for index in reversed(order) if index in chosen][:merges]
    kept = [index for index in range(num_layers) if index not in chosen]
    pairs = ((donor, nearest_preceding(donor, kept)) for donor in sorted(donors))
    return PruningPlan(
        num_layers=num_layers,
        dropped=tuple(sorted(chosen)),
        merged=tuple((donor, receiver) for donor, receiver in pairs if receiver is not None),
        scores=tuple(values.tolist()),
        method=method,
    )


def _check_listed(chosen: set[int], protected: set[int], num_layers: int) -> None:
    strange = sorted(index for index in chosen if not 0 <= index < num_layers)
    if strange or len(chosen) >= num_layers:
        raise ValueError(
            f"layers={sorted(chosen)} cannot all go: this model has layers 0 to {num_layers - 1}, and one "
            "must stay."
        )
    both = sorted(chosen & protected)
    if both:
        raise ValueError(
            f"layers {both} are listed to go and protected; take them out of layers or of protect."
        )


def check_plan(plan: PruningPlan, num_layers: int, *, has_history: bool) -> None:
    """Check that a plan fits a model and that merging has what it needs.

    Args:
        plan: The plan.
        num_layers: Layers of the model.
        has_history: Whether gradient factors are at hand.

    Raises:
        ValueError: If it does not fit.
    """
    if plan.num_layers != num_layers:
        raise ValueError(
            f"the plan is for {plan.num_layers} layers and the model has {num_layers}; score this very "
            "model first."
        )
    if plan.merged and plan.rule == "same_sign" and not has_history:
        raise ValueError(
            f"merging layers {[donor for donor, _ in plan.merged]} needs their gradient factors; pass "
            "history=callback.history (history='memory' or 'disk'), or plan with n_merge=0."
        )


def orphans(plan: PruningPlan) -> list[int]:
    """Dropped layers that cannot be merged because no kept layer stands before them."""
    return [index for index in plan.dropped if index < min(plan.kept)]
