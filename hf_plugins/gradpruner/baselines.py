"""Other rules for which layers go, as scores behind the same plan: the lowest-scored go first."""

# Shapes: L layers.
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from hf_plugins.gradpruner.plan import PruningPlan, protected_layers

# Groups of layers: (receiver, donors).
Groups = Sequence[tuple[int, tuple[int, ...]]]


def reverse_order(num_layers: int) -> Tensor:
    """The last layers go first: the plain baseline of "Reassessing Layer Pruning" (arXiv 2411.15558);
    (L,)."""
    return torch.arange(num_layers, 0, -1, dtype=torch.float64)


def random_order(num_layers: int, *, generator: torch.Generator) -> Tensor:
    """Any layers go: a random permutation of 0 .. L-1; (L,)."""
    return torch.randperm(num_layers, generator=generator).double()


def block_influence(mean_cosines: Sequence[float]) -> Tensor:
    """One minus the mean cosine between what enters and what leaves a layer; (L,).

    Args:
        mean_cosines: One value in [-1, 1] a layer, over all tokens of the calibration text.

    Source: ShortGPT, arXiv 2403.03853, eq. 1.
    """
    return 1 - torch.tensor(mean_cosines, dtype=torch.float64)


def magnitude(weights_by_layer: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sum of absolute values of a layer's matrices; (L,).

    Args:
        weights_by_layer: Matrices of each layer.

    Source: Shortened LLaMA, arXiv 2402.02834, its magnitude criterion.
    """
    return torch.stack(
        [
            sum((w.abs().sum(dtype=torch.float64).cpu() for w in ws), torch.zeros((), dtype=torch.float64))
            for ws in weights_by_layer
        ]
    )


def laco_groups(
    num_layers: int,
    n_prune: int,
    similarity: Callable[[Groups], float],
    *,
    protect: Collection[int] = (0, -1),
    threshold: float = 0.95,
    step: float = 0.05,
) -> Groups:
    """LaCo's search: from the last layer down, collapse windows while the model's output stays similar.

    A window is a receiver and the layers right behind it. It is accepted if the output of the model with it
    (and all windows accepted before) has a cosine to the whole model's output above the threshold; otherwise
    the window moves down by one. The authors set window and threshold by hand for a wanted size; here the
    threshold falls by ``step``, and if even that leaves too few layers collapsed, windows grow by one.

    Args:
        num_layers: L.
        n_prune: Layers to collapse.
        similarity: Mean cosine of the output under the given groups.
        protect: Layers that may receive but not go.
        threshold: First threshold.
        step: How much it falls.

    Returns:
        The groups, from the last to the first.

    Raises:
        ValueError: If the layers between the protected ones do not suffice.

    Source: LaCo, arXiv 2402.11187, algorithm 1, with windows that do not overlap.
    """
    if n_prune == 0:
        return []
    fixed = protected_layers(protect, num_layers)
    for size in range(2, num_layers + 1):
        limit = threshold
        while limit > -1 - step:
            groups = _laco_pass(num_layers, n_prune, similarity, fixed, size, limit)
            if sum(len(donors) for _, donors in groups) == n_prune:
                return groups
            limit -= step
    raise ValueError(
        f"LaCo cannot collapse {n_prune} of {num_layers} layers with layers {sorted(fixed)} protected; "
        "lower n_prune."
    )


def _laco_pass(
    num_layers: int,
    n_prune: int,
    similarity: Callable[[Groups], float],
    fixed: set[int],
    size: int,
    limit: float,
) -> Groups:
    groups: list[tuple[int, tuple[int, ...]]] = []
    left, end, receiver = n_prune, num_layers, num_layers - size
    while receiver >= 0 and left:
        donors = tuple(range(receiver + 1, receiver + 1 + min(size - 1, left)))
        free = donors[-1] < end and not fixed & set(donors)
        if free and similarity([*groups, (receiver, donors)]) > limit:
            groups.append((receiver, donors))
            left, end, receiver = left - len(donors), receiver, receiver - size
        else:
            receiver -= 1
    return groups


def laco_plan(num_layers: int, groups: Groups) -> PruningPlan:
    """The plan of LaCo's groups: all donors go, each merged by difference into its receiver."""
    pairs = sorted((donor, receiver) for receiver, donors in groups for donor in donors)
    return PruningPlan(
        num_layers=num_layers,
        dropped=tuple(donor for donor, _ in pairs),
        merged=tuple(pairs),
        method="laco",
        rule="difference",
    )
