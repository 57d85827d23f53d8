"""Privacy accounting of the subsampled Gaussian mechanism: epsilon spent by a run, noise that a budget needs.

How records (or users) come into a step decides epsilon by factors of 2 to 300, so the sampling mode is
always named and one calculation never mixes two:

==========  =======================================================================  ==================
mode        each step uses                                                           adjacency
==========  =======================================================================  ==================
poisson     every record independently with probability ``sample_rate``              add or remove one
fixed       exactly ``batch_size`` of ``num_records``, drawn without replacement     replace one
shuffle     every record once an epoch, in whatever order (no amplification)         add or remove one
==========  =======================================================================  ==================

PLD (privacy loss distributions, dp-accounting) is what the suite reports; RDP and PRV are cross-checks.
``delta`` and ``epsilon`` are unitless; ``noise_multiplier`` is the standard deviation of the noise on the
*sum* of clipped contributions, in units of the clipping norm.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Sampling = Literal["poisson", "fixed", "shuffle"]
AccountantName = Literal["auto", "pld", "rdp", "prv"]

_INSTALL = "privacy accounting needs dp-accounting; run: pip install 'mmhf-plugins[hf]'"
# Largest noise multiplier that calibration tries before it calls a budget out of reach.
_LARGEST_NOISE = 1e5
# Grid of the privacy loss in PLD: what is reported, and the ten times cheaper one that calibration starts on.
# Both round towards more loss, so the coarse one never promises too little noise.
_FINE_GRID, _COARSE_GRID = 1e-4, 1e-3


@dataclass(kw_only=True, frozen=True)
class Release:
    """One kind of noisy step and how often it happened."""

    noise_multiplier: float
    """Noise standard deviation over the clipping norm; 0 is no privacy at all."""
    num_steps: int
    """Noisy sums that were released."""
    sampling: Sampling = "poisson"
    """How records come into a step."""
    sample_rate: float = 1.0
    """Probability of a record per step (poisson); one over the steps of an epoch (shuffle)."""
    batch_size: int = 0
    """Records in a step (fixed)."""
    num_records: int = 0
    """Records in all (fixed)."""

    def __post_init__(self) -> None:
        wrong = []
        if not math.isfinite(self.noise_multiplier) or self.noise_multiplier < 0:
            wrong.append(f"noise_multiplier must be a finite number >= 0; got {self.noise_multiplier}.")
        if self.num_steps < 0:
            wrong.append(f"num_steps must be >= 0; got {self.num_steps}.")
        if self.sampling not in get_args(Sampling):
            wrong.append(f"sampling must be one of {', '.join(get_args(Sampling))}; got {self.sampling!r}.")
        if self.sampling in ("poisson", "shuffle") and not 0 < self.sample_rate <= 1:
            wrong.append(
                f"sample_rate must lie in (0, 1]; got {self.sample_rate}. "
                "It is a share: expected batch size over number of records."
            )
        if self.sampling == "fixed" and not 0 < self.batch_size <= self.num_records:
            wrong.append(
                "fixed sampling needs 0 < batch_size <= num_records; got "
                f"batch_size={self.batch_size}, num_records={self.num_records}."
            )
        if wrong:
            raise ValueError(" | ".join(wrong))


def epsilon(
    *,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    sample_rate: float = 1.0,
    sampling: Sampling = "poisson",
    batch_size: int = 0,
    num_records: int = 0,
    accountant: AccountantName = "auto",
) -> float:
    """Epsilon after ``num_steps`` noisy steps of one kind.

    Args:
        noise_multiplier: Noise standard deviation over the clipping norm, >= 0.
        num_steps: Steps taken.
        delta: Failure probability, in (0, 1); below one over the number of records.
        sample_rate: Probability of a record per step (poisson), or one over the steps of an epoch (shuffle).
        sampling: How records come into a step; see the head of the module.
        batch_size: Records per step (fixed sampling).
        num_records: Records in all (fixed sampling).
        accountant: ``pld`` (tight), ``rdp`` (looser), ``prv`` (Opacus; an upper bound), or ``auto``: PLD,
            and RDP for fixed sampling, which PLD cannot analyse.

    Returns:
        Epsilon >= 0; infinity without noise.

    Raises:
        ValueError: If a number is out of range, or an accountant cannot analyse the sampling mode.
        ImportError: If dp-accounting (or Opacus for ``prv``) is missing.

    Source: Abadi et al. 2016 (the mechanism); Koskela et al. 2020, Doroshenko et al. 2022 (PLD);
    Mironov et al. 2019 (RDP); Gopi et al. 2021 (PRV).
    """
    release = Release(
        noise_multiplier=noise_multiplier,
        num_steps=num_steps,
        sampling=sampling,
        sample_rate=sample_rate,
        batch_size=batch_size,
        num_records=num_records,
    )
    return composed_epsilon([release], delta=delta, accountant=accountant)


def composed_epsilon(
    releases: Sequence[Release], *, delta: float, accountant: AccountantName = "auto"
) -> float:
    """Epsilon of several kinds of steps on the same records together.

    Args:
        releases: What was released; kinds whose adjacency differs cannot be added.
        delta: Failure probability, in (0, 1).
        accountant: As in `epsilon`.

    Returns:
        Epsilon >= 0; infinity if any release carries no noise.

    Raises:
        ValueError: If ``delta`` is out of range, fixed sampling stands next to another mode, or ``prv`` is
            asked about anything but poisson sampling.
        ImportError: If dp-accounting (or Opacus for ``prv``) is missing.
    """
    return _composed(releases, delta, accountant, _FINE_GRID)


def _composed(releases: Sequence[Release], delta: float, accountant: AccountantName, grid: float) -> float:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1); got {delta}. Take less than 1 / number of records.")
    if accountant not in get_args(AccountantName):
        known = ", ".join(get_args(AccountantName))
        raise ValueError(f"accountant must be one of {known}; got {accountant!r}.")
    taken = [release for release in releases if release.num_steps > 0]
    if not taken:
        return 0.0
    if any(release.noise_multiplier == 0 for release in taken):
        return math.inf
    modes = {release.sampling for release in taken}
    if "fixed" in modes and len(modes) > 1:
        raise ValueError(
            f"releases mix {', '.join(sorted(modes))} sampling: fixed counts neighbours that differ by "
            "replacing a record, the others by adding or removing one. Account for them with one mode."
        )
    if accountant == "prv":
        return _prv(taken, delta)
    if "fixed" in modes and accountant == "pld":
        raise ValueError(
            "fixed sampling is analysed by accountant='rdp' only (replace-one neighbours); "
            "pld has no bound for it."
        )
    if accountant == "rdp" or "fixed" in modes:
        return _rdp(taken, delta, replace="fixed" in modes)
    return _pld(taken, delta, grid=grid)


def noise_multiplier_for(
    *,
    target_epsilon: float,
    num_steps: int,
    delta: float,
    sample_rate: float = 1.0,
    sampling: Sampling = "poisson",
    batch_size: int = 0,
    num_records: int = 0,
    accountant: AccountantName = "auto",
    tolerance: float = 1e-3,
) -> float:
    """Smallest noise multiplier whose epsilon does not exceed a budget.

    Args:
        target_epsilon: Budget, > 0.
        num_steps: Steps that will be taken.
        delta: Failure probability, in (0, 1).
        sample_rate: As in `epsilon`.
        sampling: As in `epsilon`.
        batch_size: As in `epsilon`.
        num_records: As in `epsilon`.
        accountant: As in `epsilon`.
        tolerance: Width of the interval at which bisection stops, in units of the noise multiplier.

    Returns:
        Noise multiplier whose epsilon is at most the budget, within ``tolerance`` of the smallest such.

    Raises:
        ValueError: If the budget is not positive, or no noise multiplier up to 100,000 keeps it.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon must be a finite number > 0; got {target_epsilon}.")

    def spent(noise_multiplier: float, grid: float) -> float:
        release = Release(
            noise_multiplier=noise_multiplier,
            num_steps=num_steps,
            sampling=sampling,
            sample_rate=sample_rate,
            batch_size=batch_size,
            num_records=num_records,
        )
        return _composed([release], delta, accountant, grid)

    low, high = 0.0, 1.0
    while spent(high, _COARSE_GRID) > target_epsilon:
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise ValueError(
                f"no noise multiplier up to {_LARGEST_NOISE:g} keeps epsilon {target_epsilon} with delta "
                f"{delta} over {num_steps} steps. Take fewer steps, a smaller rate, or a larger budget."
            )
    while high - low > tolerance / 4:
        middle = (low + high) / 2
        # Below 0.2 the accountants need minutes and no run should go there.
        if middle < 0.2 or spent(middle, _COARSE_GRID) > target_epsilon:
            low = middle
        else:
            high = middle
    while high - tolerance >= 0.2 and spent(high - tolerance, _FINE_GRID) <= target_epsilon:
        high -= tolerance
    return high


class Ledger:
    """What one data set has paid so far: releases in order, equal ones counted together.

    The state is plain JSON, so a checkpoint can carry it and a resumed run goes on from the exact count.
    """

    def __init__(self) -> None:
        self._releases: list[Release] = []

    @property
    def releases(self) -> tuple[Release, ...]:
        """All releases in the order of their first step."""
        return tuple(self._releases)

    @property
    def num_steps(self) -> int:
        """Steps of all kinds."""
        return sum(release.num_steps for release in self._releases)

    def add(self, release: Release) -> None:
        """Record one release; one that differs from the last only in its count is added to it."""
        if self._releases:
            last = self._releases[-1]
            merged = Release(**{**asdict(release), "num_steps": last.num_steps + release.num_steps})
            if asdict(merged) | {"num_steps": 0} == asdict(last) | {"num_steps": 0}:
                self._releases[-1] = merged
                return
        self._releases.append(release)

    def epsilon(self, *, delta: float, accountant: AccountantName = "auto") -> float:
        """Epsilon of everything recorded; see `composed_epsilon`."""
        return _remembered(self.releases, delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, as plain JSON values."""
        return {"version": 1, "releases": [asdict(release) for release in self._releases]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by a saved one.

        Raises:
            ValueError: If the state is not one of this class or a number in it is out of range.
        """
        if state.get("version") != 1 or not isinstance(state.get("releases"), list):
            raise ValueError(
                f"this is no privacy ledger of version 1: keys {sorted(state)}. "
                "Without the count of past steps epsilon is unknown, so nothing is resumed."
            )
        self._releases = [Release(**release) for release in state["releases"]]


@functools.lru_cache(maxsize=1024)
def _remembered(releases: tuple[Release, ...], delta: float, accountant: AccountantName) -> float:
    # A composition takes about a second, and a run asks for the same one again: log, test, report.
    return composed_epsilon(releases, delta=delta, accountant=accountant)


@functools.lru_cache(maxsize=64)
def _step_pld(noise_multiplier: float, sample_rate: float, grid: float) -> Any:
    # Most of the time of an epsilon, and the same for every number of steps: a run asks again and again.
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=grid, sampling_prob=sample_rate
    )


def _pld(releases: Sequence[Release], delta: float, *, grid: float) -> float:
    """What dp-accounting's PLDAccountant gives, with the distribution of one step made once."""
    try:
        from dp_accounting.pld.privacy_loss_distribution import identity
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    whole = identity(value_discretization_interval=grid)
    for release in releases:
        if release.sampling == "poisson":
            step = _step_pld(release.noise_multiplier, release.sample_rate, grid)
            whole = whole.compose(step.self_compose(release.num_steps))
        else:
            # A record takes part once an epoch, so epochs compose and steps inside one do not.
            epochs = math.ceil(release.num_steps * release.sample_rate - 1e-9)
            whole = whole.compose(_step_pld(release.noise_multiplier / math.sqrt(epochs), 1.0, grid))
    return float(whole.get_epsilon_for_delta(delta))


def _rdp(releases: Sequence[Release], delta: float, *, replace: bool) -> float:
    try:
        from dp_accounting import dp_event
        from dp_accounting.privacy_accountant import NeighboringRelation
        from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    engine = RdpAccountant(
        neighboring_relation=NeighboringRelation.REPLACE_ONE
        if replace
        else NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    for release in releases:
        gaussian = dp_event.GaussianDpEvent(release.noise_multiplier)
        if release.sampling == "poisson":
            engine.compose(dp_event.PoissonSampledDpEvent(release.sample_rate, gaussian), release.num_steps)
        elif release.sampling == "fixed":
            event = dp_event.SampledWithoutReplacementDpEvent(
                release.num_records, release.batch_size, gaussian
            )
            engine.compose(event, release.num_steps)
        else:
            # As in PLD: epochs compose.
            engine.compose(gaussian, math.ceil(release.num_steps * release.sample_rate - 1e-9))
    return float(engine.get_epsilon(delta))


def _prv(releases: Sequence[Release], delta: float) -> float:
    try:
        from opacus.accountants import PRVAccountant
    except ImportError as error:
        raise ImportError("accountant='prv' needs opacus; run: pip install 'mmhf-plugins[hf]'") from error
    if any(release.sampling != "poisson" for release in releases):
        raise ValueError("accountant='prv' analyses poisson sampling only; take 'pld' or 'rdp'.")
    engine = PRVAccountant()
    engine.history = [
        (release.noise_multiplier, release.sample_rate, release.num_steps) for release in releases
    ]
    return float(engine.get_epsilon(delta))
