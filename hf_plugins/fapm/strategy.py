"""FAPM as a merge method of mergekit, where mergekit is installed: ``merge_method: fapm`` with ``density``.

mergekit is LGPL-3.0 and no dependency of this suite; nothing of it is copied here.
"""

from typing import Any

from torch import Tensor

from hf_plugins.fapm.task_vector import fapm_prune_tensor


def merge_tensors(base: Tensor, tuned: list[Tensor], *, density: list[float], weight: list[float]) -> Tensor:
    """Base plus the weighted sum of FAPM-pruned task vectors; with one model and weight 1 this is FAPM.

    Args:
        base: Pre-trained tensor.
        tuned: Fine-tuned tensors of its shape.
        density: Keep of each.
        weight: Factor on each task vector.

    Returns:
        The merged tensor, in dtype and on the device of ``base``.
    """
    if len(tuned) == 1 and weight[0] == 1.0:
        return fapm_prune_tensor(base, tuned[0], keep=density[0])[0].to(base.device)
    start = base.float().cpu()
    # A clone: in fp32 .float() is the base itself, which others may still read.
    total = start.clone()
    for each, keep, factor in zip(tuned, density, weight, strict=True):
        pruned, _ = fapm_prune_tensor(base, each, keep=keep)
        total += factor * (pruned.float() - start)
    return total.to(base.dtype).to(base.device)


def register_mergekit() -> Any:
    """Make ``merge_method: fapm`` known to mergekit in this process; call it before a config is run.

    Parameters in the config, per model: ``density`` (keep, default 0.1) and ``weight`` (default 1).

    Returns:
        The method, as mergekit knows it.

    Raises:
        ImportError: If mergekit is not installed.
    """
    try:
        from mergekit.merge_methods import (
            BasePolicy,
            InputContract,
            PerNonBase,
            TensorGroup,
            merge_method,
            register,
        )
    except ImportError as error:
        raise ImportError(
            "mergekit >= 0.1.5 is not installed here (pip install mergekit; LGPL-3.0). `mmhf fapm BASE "
            "FINETUNED OUT` needs none."
        ) from error

    def fapm(group: TensorGroup, density: PerNonBase[float] = 0.1, weight: PerNonBase[float] = 1.0) -> Tensor:
        tuned = group.non_base
        return merge_tensors(
            group.base.tensor,
            [entry.tensor for entry in tuned],
            density=density.values_for(tuned),
            weight=weight.values_for(tuned),
        )

    method = merge_method(
        fapm,
        name="fapm",
        pretty_name="FAPM",
        reference_url="https://arxiv.org/abs/2509.08255",
        contract=InputContract(base=BasePolicy.REQUIRED),
        uses_accelerator=False,
    )
    register(method)
    return method
