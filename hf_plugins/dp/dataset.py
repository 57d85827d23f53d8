"""Batches of Poisson-sampled units for Trainer's loop, cut into chunks, empty batches included."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_plugins.dp.noise import stream_seed
from hf_plugins.dp.sampling import bounded_records, poisson_draw, share_of


@dataclass(kw_only=True)
class Chunk:
    """Records that go through the model together."""

    inputs: dict[str, Any]
    """What the collator made of them."""
    units: Tensor
    """Unit of each record, counted within the chunk, ``[B]``."""
    num_units: int
    """Units in the chunk."""


@dataclass(kw_only=True)
class StepBatch:
    """All chunks of one step on one rank; none if no unit was drawn."""

    chunks: list[Chunk]


class PoissonBatches(Sampler[list[list[int]]]):
    """Yields, for each step, the records of the units drawn for this rank.

    The randomness of a step is a function of (seed, number of the step), so a resumed run draws what the
    uninterrupted one would have drawn, and no step repeats another's draw.

    Args:
        units: Records of each unit.
        sample_rate: Probability of a unit in a step.
        steps: Steps of an epoch.
        bound: Most records of a unit in a step.
        seed: Seed of the run; None draws from the operating system.
        rank: This process.
        num_ranks: Number of processes.
    """

    def __init__(
        self,
        units: Sequence[Sequence[int]],
        *,
        sample_rate: float,
        steps: int,
        bound: int,
        seed: int | None,
        rank: int,
        num_ranks: int,
    ) -> None:
        self._units, self._rate, self._steps, self._bound = units, sample_rate, steps, bound
        self.seed, self._rank, self._ranks = seed, rank, num_ranks
        self._epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the start of an epoch."""
        self._epoch = epoch

    def draw(self, step: int) -> list[list[int]]:
        """Records of each unit of one step on this rank.

        Args:
            step: Number of the step over all runs on this data.

        Returns:
            One list of record numbers for each drawn unit.
        """
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "sample", step))
        drawn = poisson_draw(len(self._units), self._rate, generator)
        # Every rank draws for all units, so that one rank and two see the same step.
        chosen = {unit: bounded_records(self._units[unit], self._bound, generator) for unit in drawn}
        return [chosen[unit] for unit in share_of(drawn, self._rank, self._ranks)]

    def __iter__(self) -> Iterator[list[list[int]]]:
        start = self.first_step + self._epoch * self._steps
        for number in range(self._steps):
            yield self.draw(start + number)


class _UnitRecords(Dataset):
    """Looks up all records of a unit at once."""

    def __init__(self, records: Any) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, numbers: Sequence[int]) -> list[Any]:
        return [self.records[number] for number in numbers]


class ChunkCollator:
    """Cuts the drawn units into chunks and collates each with the user's collator."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], units_per_chunk: int) -> None:
        self.collate, self.units_per_chunk = collate, units_per_chunk

    def __call__(self, units: list[list[Any]]) -> StepBatch:
        """All chunks of a step; none for an empty draw."""
        size = self.units_per_chunk
        return StepBatch(chunks=[self.chunk(units[at : at + size]) for at in range(0, len(units), size)])

    def chunk(self, units: list[list[Any]]) -> Chunk:
        """One chunk of all the given units."""
        records = [record for unit in units for record in unit]
        number = torch.tensor([i for i, unit in enumerate(units) for _ in unit])
        inputs = dict(self.collate(records))
        check_one_row_each(inputs, len(records))
        return Chunk(inputs=inputs, units=number, num_units=len(units))


def check_one_row_each(inputs: dict[str, Any], num_records: int) -> None:
    """Refuse a collated batch whose rows are not the records.

    Args:
        inputs: What the collator returned.
        num_records: How many records it got.

    Raises:
        ValueError: If a tensor's first axis has another length, as with packing or padding-free batches.
    """
    wrong = {
        name: tuple(value.shape)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != num_records)
    }
    if wrong:
        raise ValueError(
            f"the collator made {wrong} of {num_records} records; private training needs one row for each "
            "record. Packing and padding_free merge records of different people: switch them off."
        )


def poisson_loader(
    records: Any,
    batches: PoissonBatches,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    units_per_chunk: int,
    **options: Any,
) -> DataLoader:
    """Loader of `StepBatch` for Trainer's loop.

    Args:
        records: Map-style data set.
        batches: The sampler.
        collate: The user's collator.
        units_per_chunk: Most units that go through the model together.
        **options: Passed on to `DataLoader` (workers, pinning).

    Returns:
        A plain loader; it must not go through ``accelerator.prepare``, which would shard it again.
    """
    return DataLoader(
        _UnitRecords(records),
        batch_sampler=batches,
        collate_fn=ChunkCollator(collate, units_per_chunk),
        **options,
    )
