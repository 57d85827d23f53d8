"""Poisson sampling of privacy units, and how the drawn units are cut into chunks that fit in memory."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from hf_plugins.dp.noise import secure_uniform


def poisson_draw(num_units: int, sample_rate: float, generator: torch.Generator | None) -> list[int]:
    """Numbers of the units of one step: each is in with probability ``sample_rate``, whatever the others do.

    Args:
        num_units: Units in all.
        sample_rate: Probability, in (0, 1].
        generator: Seeded generator on the CPU; None takes the operating system's randomness.

    Returns:
        Sorted numbers; the list may be empty.
    """
    if sample_rate >= 1:
        return list(range(num_units))
    if generator is None:
        return np.flatnonzero(secure_uniform(num_units) <= sample_rate).tolist()
    uniform = torch.rand(num_units, generator=generator, dtype=torch.float64)
    return (uniform < sample_rate).nonzero().flatten().tolist()


def bounded_records(records: Sequence[int], bound: int, generator: torch.Generator | None) -> list[int]:
    """At most ``bound`` records of one user, drawn without replacement.

    Args:
        records: Record numbers of the user.
        bound: Most records of a user in a step, >= 1.
        generator: As in `poisson_draw`.

    Returns:
        Sorted record numbers.
    """
    if len(records) <= bound:
        return list(records)
    if generator is None:
        order = np.argsort(secure_uniform(len(records))).tolist()
    else:
        order = torch.randperm(len(records), generator=generator).tolist()
    return sorted(records[i] for i in order[:bound])


def users_of(column: Sequence[Hashable]) -> list[list[int]]:
    """Records of each user, users in the order of their first record.

    Args:
        column: The user of each record.

    Returns:
        Record numbers, one list for each user.

    Raises:
        ValueError: If a record has no user; it would belong to nobody's protection.
    """
    found: dict[Hashable, list[int]] = {}
    for number, user in enumerate(column):
        if user is None:
            raise ValueError(
                f"record {number} has no user (None); every record must belong to one. Give each such record "
                "a user of its own, or drop it."
            )
        found.setdefault(user, []).append(number)
    return list(found.values())


def share_of(drawn: Sequence[int], rank: int, num_ranks: int) -> list[int]:
    """The drawn units that one rank works on: unit u belongs to rank ``u % num_ranks``, so no two ranks share
    one.

    Args:
        drawn: Numbers from `poisson_draw`.
        rank: Rank of this process.
        num_ranks: Number of processes.

    Returns:
        The rank's units, in order.
    """
    return [unit for unit in drawn if unit % num_ranks == rank]
