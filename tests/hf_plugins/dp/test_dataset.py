"""Batches for the host's loop: chunks, empty batches, steps that can be found again."""

import pytest
import torch
from transformers import default_data_collator

from hf_plugins.dp.dataset import PoissonBatches, check_one_row_each, poisson_loader
from tests.hf_plugins.dp import tiny


def _batches(
    units: int = 20, *, rate: float = 0.3, rank: int = 0, ranks: int = 1, seed: int | None = 3
) -> PoissonBatches:
    return PoissonBatches(
        [[i] for i in range(units)], sample_rate=rate, steps=4, bound=1, seed=seed, rank=rank, num_ranks=ranks
    )


def test_chunks_hold_all_drawn_records_once() -> None:
    rows = tiny.classified(20).remove_columns("user")
    batches = _batches(rate=0.5)
    loader = poisson_loader(rows, batches, default_data_collator, units_per_chunk=3)
    for number, step in enumerate(loader):
        drawn = [record for unit in batches.draw(number) for record in unit]
        seen = [row for chunk in step.chunks for row in chunk.inputs["input_ids"].tolist()]
        assert seen == [rows[i]["input_ids"] for i in drawn]
        assert all(len(chunk.units) <= 3 for chunk in step.chunks)
        assert [chunk.num_units for chunk in step.chunks] == [len(chunk.units) for chunk in step.chunks]
    assert number == 3


def test_empty_draw_is_a_step_without_chunks() -> None:
    rows = tiny.classified(4).remove_columns("user")
    loader = poisson_loader(rows, _batches(4, rate=1e-9), default_data_collator, units_per_chunk=2)
    assert [step.chunks for step in loader] == [[], [], [], []]
    assert len(loader.dataset) == 4


def test_users_stay_together() -> None:
    rows = tiny.classified(6).remove_columns("user")
    batches = PoissonBatches(
        [[0, 2, 4], [1], [3, 5]], sample_rate=1.0, steps=1, bound=2, seed=0, rank=0, num_ranks=1
    )
    (step,) = list(poisson_loader(rows, batches, default_data_collator, units_per_chunk=2))
    assert [chunk.units.tolist() for chunk in step.chunks] == [[0, 0, 1], [0, 0]]
    assert [chunk.num_units for chunk in step.chunks] == [2, 1]


def test_ranks_split_one_draw() -> None:
    for step in range(4):
        whole = _batches().draw(step)
        parts = [_batches(rank=rank, ranks=2).draw(step) for rank in range(2)]
        assert sorted(whole) == sorted([*parts[0], *parts[1]])


def test_steps_do_not_repeat_and_are_found_again() -> None:
    batches = _batches(50)
    first = [batches.draw(step) for step in range(8)]
    assert len({str(draw) for draw in first}) == 8
    batches.set_epoch(1)
    assert list(batches) == first[4:]
    batches.set_epoch(0)
    batches.first_step = 2
    assert list(batches) == first[2:6]
    assert len(batches) == 4
    unseeded = _batches(50, seed=None)
    assert unseeded.draw(0) != unseeded.draw(0)


def test_rows_that_are_no_records_are_refused() -> None:
    check_one_row_each({"x": torch.zeros(3, 2), "name": "kept"}, 3)
    with pytest.raises(ValueError, match="Packing and padding_free merge records of different people"):
        check_one_row_each({"x": torch.zeros(1, 6)}, 3)
    with pytest.raises(ValueError, match="needs one row for each record"):
        check_one_row_each({"x": torch.zeros(())}, 1)
