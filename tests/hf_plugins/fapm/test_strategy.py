"""FAPM in mergekit: the merge itself, and the registration where mergekit is installed."""

import importlib.util

import pytest
import torch

from hf_plugins.fapm import fapm_prune_tensor
from hf_plugins.fapm.strategy import merge_tensors, register_mergekit
from tests.hf_plugins.fapm.tiny import moved


def test_one_model_is_fapm() -> None:
    w, ft = moved(500, dtype=torch.bfloat16)
    assert torch.equal(
        merge_tensors(w, [ft], density=[0.2], weight=[1.0]), fapm_prune_tensor(w, ft, keep=0.2)[0]
    )


def test_task_vectors_add_up() -> None:
    """Two models with weights 1 and -1/2: base + d1 - d2 / 2 with each task vector pruned on its own."""
    w, first = moved(500)
    second = w + (moved(500, seed=1)[1] - moved(500, seed=1)[0])
    d1, d2 = (fapm_prune_tensor(w, ft, keep=keep)[0] - w for ft, keep in ((first, 0.2), (second, 0.4)))
    merged = merge_tensors(w, [first, second], density=[0.2, 0.4], weight=[1.0, -0.5])
    torch.testing.assert_close(merged, w + d1 - 0.5 * d2)
    assert torch.equal(w, moved(500)[0])


@pytest.mark.skipif(importlib.util.find_spec("mergekit") is not None, reason="mergekit is installed")
def test_without_mergekit() -> None:
    with pytest.raises(ImportError, match="mergekit >= 0.1.5 is not installed here"):
        register_mergekit()


@pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None, reason="mergekit (LGPL-3.0) is not installed"
)
def test_registered_method_merges() -> None:
    from mergekit.merge_methods import TensorGroup

    method = register_mergekit()
    assert method.spec.name == "fapm"
    assert {each.name for each in method.spec.parameters} == {"density", "weight"}
    assert TensorGroup is not None
