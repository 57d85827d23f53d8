"""HPN as a searcher: ask for configs, tell what they gained, read the best; and its rivals in the same form.

Nothing here knows how a round is run, so the in-process engine, Flower and a test can all drive it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.exponentiated import FedEx
from hf_plugins.hpn.policy import (
    Output,
    Policy,
    ReleasedGaussianPolicy,
    ReleasedPolicy,
    annealed_variance,
    clamped_gaussian,
    entropies,
    log_probabilities,
    mode,
    sample,
)
from hf_plugins.hpn.rewards import (
    BucketBaseline,
    linear_schedule,
    reinforce_loss,
    released_loss,
    released_reward,
)
from hf_plugins.hpn.space import Config, Space
from hf_plugins.hpn.surrogate import Surrogate, normalised_gains


@dataclass(kw_only=True)
class Trial:
    """One step of a search, done."""

    step: int
    """Steps before it."""
    start: int
    """Round of the anchor that it started from."""
    client_ids: list[int]
    """Clients that were asked, in the order of ``actions_KP``."""
    actions_KP: Tensor
    """What they were given."""
    gains: dict[int, float]
    """Gain of each client whose round and evaluation counted; the others drop out of the update."""
    weights: dict[int, float] = field(default_factory=dict)
    """Records behind each gain."""
    end: float = 0.0
    """Weighted mean accuracy of all clients after the step's round; the release's reward reads it."""
    anchor: float = 0.0
    """The same of the anchor that the step started from."""


class Searcher(Protocol):
    """What a run needs of a method."""

    def enrol(self, encodings: Mapping[int, Tensor]) -> None:
        """Take in the clients' encodings; once, before anything else."""
        ...

    def ask(self, client_ids: Sequence[int], *, step: int, generator: torch.Generator) -> Tensor:
        """Actions for these clients, (K, P)."""
        ...

    def tell(self, trial: Trial) -> dict[str, float]:
        """Learn from a step; figures for the log."""
        ...

    def best(self) -> dict[int, Config]:
        """Config of each client for deployment, a function of the state alone."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        ...


class _Log:
    """All trials as flat tensors, so that a state file stays small and quick."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, trial: Trial, row: Mapping[int, int]) -> None:
        counted = [i for i, client in enumerate(trial.client_ids) if client in trial.gains]
        ids = [trial.client_ids[i] for i in counted]
        self.parts.append(
            (
                torch.tensor([row[client] for client in ids], dtype=torch.long),
                torch.full((len(ids),), trial.start, dtype=torch.long),
                trial.actions_KP[counted].float(),
                torch.tensor([trial.gains[client] for client in ids], dtype=torch.float64),
            )
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of clients, start rounds, actions, gains."""
        clients, starts, actions, gains = zip(*self.parts, strict=True)
        return torch.cat(clients), torch.cat(starts), torch.cat(actions), torch.cat(gains)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": list(self.tensors())} if self.parts else {"parts": []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.parts = [tuple(state["parts"])] if state["parts"] else []


class _Enrolled:
    """What all searchers share: clients in a fixed order, the space's sizes, the log."""

    unchanged = 0
    """Steps for which the best guess has not changed; 0 for searchers that cannot tell."""

    def __init__(self, space: Space, config: HPNConfig) -> None:
        self.space, self.config = space, config
        on_grid = config.policy == "categorical"
        self.sizes = tuple(
            len(grid) if on_grid or hasattr(dimension, "choices") else 0
            for grid, dimension in zip(space.grids(), space.dimensions.values(), strict=True)
        )
        self.log = _Log()
        self.row: dict[int, int] = {}
        self.encodings_KE = torch.zeros(0, 0)

    def enrol(self, encodings: Mapping[int, Tensor]) -> None:
        """Take in the clients' encodings; once, before anything else.

        Raises:
            ValueError: If there is no client, or their encodings differ in length or are not finite.
        """
        if not encodings:
            raise ValueError("no client has sent an encoding; the search needs at least one.")
        lengths = {len(vector) for vector in encodings.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"encodings must have one length; got {sorted(lengths)}. Give all clients one Encoder."
            )
        ids = sorted(encodings)
        self.row = {client: number for number, client in enumerate(ids)}
        self.encodings_KE = torch.stack([encodings[client].double() for client in ids])
        if not torch.isfinite(self.encodings_KE).all():
            wrong = [i for i in ids if not torch.isfinite(encodings[i]).all()]
            raise ValueError(f"the encodings of clients {wrong} hold NaN or infinity; encode them again.")
        self._enrolled()

    def _enrolled(self) -> None:
        """Build what needs the encodings."""

    def configs(self, client_ids: Sequence[int], actions_KP: Tensor) -> dict[int, Config]:
        """The configs that actions stand for."""
        on_grid = self.config.policy == "categorical"
        return {
            client: self.space.config(actions.tolist(), on_grid=on_grid)
            for client, actions in zip(client_ids, actions_KP, strict=True)
        }

    def _rows(self, client_ids: Sequence[int]) -> Tensor:
        unknown = [client for client in client_ids if client not in self.row]
        if unknown:
            raise ValueError(f"clients {unknown} have sent no encoding; enrol them before the search.")
        return self.encodings_KE[[self.row[client] for client in client_ids]]

    def _for_all(self, actions_KP: Tensor) -> dict[int, Config]:
        return self.configs(list(self.row), actions_KP)

    def _surrogate_best(self) -> Tensor:
        clients, starts, actions, gains = self.log.tensors()
        c = self.config
        surrogate = Surrogate(self.encodings_KE, self.sizes, ridge=c.ridge)
        surrogate.fit(clients, actions, normalised_gains(gains, clients, starts, c.num_rounds, c.num_buckets))
        return surrogate.best(generator=torch.Generator().manual_seed(c.seed))


class HPN(_Enrolled):
    """The hyper-network: a policy from encodings to configs, trained by what one round from an anchor gained.

    Use it with any engine: `enrol` the encodings, then `ask` and `tell` step by step, then `best`.
    """

    def __init__(self, space: Space, config: HPNConfig | None = None) -> None:
        """Args:
        space: What is searched.
        config: Options; None: the defaults.
        """
        super().__init__(space, config or HPNConfig())
        self.baseline = BucketBaseline(self.config.num_rounds, self.config.num_buckets)
        self.unchanged = 0
        self._mode_KP: Tensor | None = None

    def _enrolled(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.policy = Policy(self.encodings_KE, self.sizes)
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )

    @torch.no_grad()
    def ask(self, client_ids: Sequence[int], *, step: int, generator: torch.Generator) -> Tensor:
        """Draw a config for each client from the policy.

        Args:
            client_ids: Clients of this step.
            step: Steps done before.
            generator: Source of the draws.

        Returns:
            (K, P) actions; `configs` turns them into configs.

        Raises:
            ValueError: If a client is not enrolled.
        """
        return sample(self.policy(self._rows(client_ids)), generator=generator)

    def tell(self, trial: Trial) -> dict[str, float]:
        """One REINFORCE update over the clients whose gain counted.

        Args:
            trial: The step.

        Returns:
            Figures for the log.
        """
        self.log.add(trial, self.row)
        counted = [i for i, client in enumerate(trial.client_ids) if client in trial.gains]
        if not counted:
            return {"hpn/participants": 0.0}
        ids = [trial.client_ids[i] for i in counted]
        rewards = {str(client): trial.gains[client] for client in ids}
        if self.config.reward == "global":
            total = sum(trial.weights.get(client, 1.0) for client in ids)
            mean = sum(trial.weights.get(client, 1.0) * trial.gains[client] for client in ids) / total
            rewards = dict.fromkeys(rewards, mean)
        advantage = rewards
        if self.config.baseline == "ema":
            advantage = self.baseline.advantage(trial.start, rewards)
            self.baseline.update(trial.start, rewards)
        loss, entropy = self._update(trial, counted, torch.tensor([advantage[str(i)] for i in ids]))
        self._watch_mode()
        return {
            "hpn/participants": float(len(ids)),
            "hpn/gain": sum(trial.gains.values()) / len(trial.gains),
            "hpn/loss": loss,
            "hpn/entropy": entropy,
        }

    def _update(self, trial: Trial, counted: list[int], advantage_K: Tensor) -> tuple[float, float]:
        ids = [trial.client_ids[i] for i in counted]
        actions_KP = trial.actions_KP[counted]
        active = [self.space.active(config) for config in self.configs(ids, actions_KP).values()]
        output = self.policy(self._rows(ids))
        entropy_KP = entropies(output)
        c = self.config
        loss = reinforce_loss(
            advantage_K,
            log_probabilities(output, actions_KP),
            entropy_KP,
            torch.tensor(active),
            entropy_weight=linear_schedule(c.entropy_weight, c.final_entropy_weight, trial.step, c.num_steps),
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), c.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach()), float(entropy_KP.detach().sum(dim=1).mean())

    @torch.no_grad()
    def _watch_mode(self) -> None:
        now = mode(self.policy(self.encodings_KE))
        # Places in a range always move a little; what counts is whether they move by a hundredth.
        same = self._mode_KP is not None and bool(((now - self._mode_KP).abs() < 0.01).all())
        self.unchanged = self.unchanged + 1 if same else 0
        if not same:
            self._mode_KP = now

    @torch.no_grad()
    def output(self) -> Output:
        """Distributions for all enrolled clients."""
        return self.policy(self.encodings_KE)

    @torch.no_grad()
    def best(self) -> dict[int, Config]:
        """Config of each enrolled client, a function of the state alone.

        Returns:
            The regression's choice over all trials with ``surrogate=True``, else the policy's mode.
        """
        if self.config.surrogate and self.log.parts:
            return self._for_all(self._surrogate_best())
        return self._for_all(mode(self.output()))

    @torch.no_grad()
    def best_for(self, encoding_E: Tensor) -> Config:
        """Config of a client that the search has not seen: the policy's mode at its encoding.

        Args:
            encoding_E: From the same `Encoder`.

        Returns:
            The config.
        """
        return self.configs([0], mode(self.policy(encoding_E[None].double())))[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs; tensors and plain values."""
        return {
            "encodings": {client: self.encodings_KE[number] for client, number in self.row.items()},
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "baseline": self.baseline.state_dict(),
            "unchanged": self.unchanged,
            "mode": self._mode_KP,
            "log": self.log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        self.enrol(state["encodings"])
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline.load_state_dict(state["baseline"])
        self.unchanged, self._mode_KP = state["unchanged"], state["mode"]
        self.log.load_state_dict(state["log"])


class ReleasedSearch(_Enrolled):
    """The authors' code, behaviour for behaviour: policy, global reward, loss, what is and is not trained.

    Its discrete policy stays uniform; `best` is the argmax of scores that differ in the fourth digit. Two of
    its faults are not repeated: the crash when not all clients take part, and the lost mean of the
    continuous mode.
    """

    def _enrolled(self) -> None:
        self.discrete = self.config.policy == "categorical"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.policy: ReleasedPolicy | ReleasedGaussianPolicy = (
                ReleasedPolicy(self.encodings_KE, self.sizes)
                if self.discrete
                else ReleasedGaussianPolicy(self.encodings_KE, len(self.sizes))
            )
        # The released optimizer holds the trunk alone; frozen heads have no gradient either way.
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=1e-4)

    def ask(self, client_ids: Sequence[int], *, step: int, generator: torch.Generator) -> Tensor:
        """Draw as the release does."""
        rows = [self.row[client] for client in client_ids]
        with torch.no_grad():
            if self.discrete:
                return sample(self.policy(self.encodings_KE[rows]), generator=generator)
            mean_KP = self.policy(self.encodings_KE)
        variance = annealed_variance(step, self.config.num_steps)
        return clamped_gaussian(mean_KP, variance, generator=generator)[0][rows]

    def tell(self, trial: Trial) -> dict[str, float]:
        """One update by the release's loss."""
        self.log.add(trial, self.row)
        counted = [i for i, client in enumerate(trial.client_ids) if client in trial.gains]
        reward = released_reward(trial.end, trial.anchor, weighted=self.discrete)
        if not counted:
            return {"hpn/participants": 0.0}
        rows = [self.row[trial.client_ids[i]] for i in counted]
        actions_KP = trial.actions_KP[counted]
        if self.discrete:
            logp_KP = log_probabilities(self.policy(self.encodings_KE[rows]), actions_KP)
        else:
            mean_KP = self.policy(self.encodings_KE)
            spread = annealed_variance(trial.step, self.config.num_steps) ** 0.5
            logp_KP = torch.distributions.Normal(mean_KP[rows], spread).log_prob(actions_KP.float())
        loss = released_loss(reward, logp_KP, discrete=self.discrete)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if not self.discrete:
            self.policy.remember(mean_KP)
        return {"hpn/participants": float(len(rows)), "hpn/reward": reward, "hpn/loss": float(loss.detach())}

    @torch.no_grad()
    def best(self) -> dict[int, Config]:
        """Argmax of the near-uniform probabilities, or the continuous mean."""
        # Spectral normalisation iterates in training mode: a read must not change the state.
        self.policy.eval()
        found = self.policy(self.encodings_KE)
        actions_KP = mode(found) if self.discrete else found.double()
        self.policy.train()
        return self._for_all(actions_KP)

    @torch.no_grad()
    def output(self) -> Output:
        """Distributions for all enrolled clients (discrete mode)."""
        self.policy.eval()
        found = self.policy(self.encodings_KE)
        self.policy.train()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return {
            "encodings": {client: self.encodings_KE[number] for client, number in self.row.items()},
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        self.enrol(state["encodings"])
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log.load_state_dict(state["log"])


class UniformSearch(_Enrolled):
    """Uniform draws, then the regression's choice: what a search is worth without a policy."""

    def ask(self, client_ids: Sequence[int], *, step: int, generator: torch.Generator) -> Tensor:
        """Draw uniformly."""
        columns = [
            torch.randint(size, (len(client_ids),), generator=generator).double() for size in self.sizes
        ]
        return torch.stack(columns, dim=1)

    def tell(self, trial: Trial) -> dict[str, float]:
        """Write it down."""
        self.log.add(trial, self.row)
        return {"hpn/participants": float(len(trial.gains))}

    def best(self) -> dict[int, Config]:
        """The regression's choice; the default before any trial."""
        if not self.log.parts:
            return {client: self.space.default() for client in self.row}
        return self._for_all(self._surrogate_best())

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        encodings = {client: self.encodings_KE[number] for client, number in self.row.items()}
        return {"encodings": encodings, "log": self.log.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        self.enrol(state["encodings"])
        self.log.load_state_dict(state["log"])


class FedExSearch(_Enrolled):
    """FedEx over the whole grid (or 200 configs of a larger one): one distribution for all clients."""

    num_arms = 200

    def _enrolled(self) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        arms_AP = Surrogate(self.encodings_KE, self.sizes).candidates(self.num_arms, generator)
        self.fedex = FedEx(torch.unique(arms_AP, dim=0))

    def ask(self, client_ids: Sequence[int], *, step: int, generator: torch.Generator) -> Tensor:
        """Draw an arm for each client."""
        return self.fedex.arms_AP[self.fedex.sample(len(client_ids), generator=generator)]

    def tell(self, trial: Trial) -> dict[str, float]:
        """One exponentiated-gradient update; a client's loss is its gain with the sign turned."""
        counted = [i for i, client in enumerate(trial.client_ids) if client in trial.gains]
        if counted:
            ids = [trial.client_ids[i] for i in counted]
            same = (trial.actions_KP[counted][:, None] == self.fedex.arms_AP[None]).all(dim=2)
            losses_K = torch.tensor([-trial.gains[client] for client in ids])
            self.fedex.update(
                same.int().argmax(dim=1), losses_K, torch.tensor([trial.weights.get(i, 1.0) for i in ids])
            )
        return {"hpn/participants": float(len(counted)), "hpn/top": float(self.fedex.theta_A.max())}

    def best(self) -> dict[int, Config]:
        """The most probable arm, for everyone."""
        return self._for_all(self.fedex.best().expand(len(self.row), -1))

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        encodings = {client: self.encodings_KE[number] for client, number in self.row.items()}
        return {"encodings": encodings, "fedex": self.fedex.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        self.enrol(state["encodings"])
        self.fedex.load_state_dict(state["fedex"])


_SEARCHERS = {"hpn": HPN, "released": ReleasedSearch, "uniform": UniformSearch, "fedex": FedExSearch}


def make_searcher(space: Space, config: HPNConfig) -> HPN | ReleasedSearch | UniformSearch | FedExSearch:
    """The searcher of ``config.method``.

    Raises:
        ValueError: If the method does not search step by step from anchors.
    """
    if config.method not in _SEARCHERS:
        raise ValueError(
            f"method={config.method!r} does not search step by step; these do: {', '.join(_SEARCHERS)}."
        )
    return _SEARCHERS[config.method](space, config)
