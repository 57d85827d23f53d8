"""Samples on the wire: joined without padding, checked before use, padded like the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.tee_split.batches import (
    Sample,
    check_samples,
    collate,
    join_samples,
    num_targets,
    part_samples,
)
from hf_plugins.tee_split.tensors import MessageError
from tests.hf_plugins.tee_split.reference import pad_rows


def samples(*sizes: int, dim: int = 3) -> list[Sample]:
    return [Sample(torch.randn(n, dim), torch.arange(n, dtype=torch.int32)) for n in sizes]


def check(tensors: dict, **changes: object) -> None:
    given = {"dim": 3, "dtype": torch.float32, "max_tokens": 8, "vocab_size": 10, **changes}
    check_samples(tensors, **given)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_join_and_part_are_inverse_and_padding_is_the_reference(sizes: list[int]) -> None:
    made = samples(*sizes)
    tensors = join_samples(made)
    check(tensors)
    assert tensors["hidden"].shape == (sum(sizes), 3)
    for before, after in zip(made, part_samples(tensors), strict=True):
        assert torch.equal(before.hidden_TD, after.hidden_TD)
        assert torch.equal(before.labels_T, after.labels_T)
    batch = collate(made)
    labels, mask = pad_rows([sample.labels_T.tolist() for sample in made])
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].tolist() == mask
    assert batch["position_ids"].tolist() == [list(range(max(sizes)))] * len(sizes)
    assert (batch["inputs_embeds"][batch["attention_mask"] == 0] == 0).all()
    assert torch.equal(batch["inputs_embeds"][batch["attention_mask"] == 1], tensors["hidden"])


def test_targets_leave_out_first_and_ignored_tokens() -> None:
    """[5, 6, -100] predicts 6 alone; [5, -100, 7] predicts 7 alone."""
    assert num_targets(torch.tensor([[5, 6, -100], [5, -100, 7]])) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": torch.zeros(5, 3, dtype=torch.float16)}, "hidden states must be torch.float32"),
        ({"labels": torch.zeros(5)}, "labels and lengths int32"),
        ({"hidden": torch.zeros(5, 4)}, r"hidden states must be \(S, .*3\), labels and lengths flat"),
        ({"hidden": torch.zeros(5)}, r"hidden states must be \(S, .*3\), labels and lengths flat"),
        ({"lengths": torch.zeros(0, dtype=torch.int32)}, "a sample has 1 to .*8 tokens"),
        ({"lengths": torch.tensor([9, -4], dtype=torch.int32)}, "a sample has 1 to .*8 tokens"),
        ({"lengths": torch.tensor([2, 2], dtype=torch.int32)}, "do not add up"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "do not add up"),
        ({"labels": torch.full((5,), 10, dtype=torch.int32)}, "labels must be .*100 or below 10"),
        ({"labels": torch.full((5,), -1, dtype=torch.int32)}, "labels must be .*100 or below 10"),
        ({"hidden": torch.full((5, 3), float("nan"))}, "hold inf or NaN"),
        ({"hidden": torch.full((5, 3), float("inf"))}, "hold inf or NaN"),
        ({"more": torch.zeros(1)}, "samples have the tensors"),
    ],
)
def test_everything_else_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        check(join_samples(samples(2, 3)) | changes)
