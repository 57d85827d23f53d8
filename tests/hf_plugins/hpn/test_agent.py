"""Searchers driven by hand-made rewards: who learns what, and that their states are complete."""

import math

import pytest
import torch

from hf_plugins.hpn.agent import HPN, FedExSearch, ReleasedSearch, Trial, UniformSearch, make_searcher
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.space import Categorical, Float, Space, When

SIZES = (5, 6, 6)
SPACE = Space(
    {name: Categorical(choices=tuple(range(size))) for name, size in zip("abc", SIZES, strict=True)}
)


def _encodings(num: int = 10, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.02 * torch.randn(60, generator=generator, dtype=torch.float64) for k in range(num)}


def _optima(num: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randint(size, (num,), generator=generator) for size in SIZES], dim=1)


def _drive(searcher, num_steps: int, best: torch.Tensor, *, first: int = 0, cohort: int = 10) -> None:  # noqa: ANN001
    """Reward: 1 less the mean distance to the client's optimum, with Gaussian noise of 0.1."""
    for step in range(first, num_steps):
        generator = torch.Generator().manual_seed(step)
        ids = sorted(torch.randperm(len(best), generator=generator)[:cohort].tolist())
        actions = searcher.ask(ids, step=step, generator=generator)
        loss = ((actions - best[ids]).abs() / torch.tensor(SIZES)).sum(dim=1) / 3
        gains = 1 - loss + 0.1 * torch.randn(len(ids), generator=generator)
        start = int(torch.randint(searcher.config.num_rounds, (), generator=generator))
        mean = float(gains.mean())
        searcher.tell(
            Trial(
                step=step,
                start=start,
                client_ids=ids,
                actions_KP=actions,
                gains=dict(zip(ids, gains.tolist(), strict=True)),
                end=0.5 + 0.1 * mean,
                anchor=0.5,
            )
        )


def _right(found: dict, best: torch.Tensor) -> int:
    return sum(list(found[k].values()) == best[k].tolist() for k in found)


def test_reinforce_finds_personal_optima() -> None:
    """Dossier: K = 10, 5 x 6 x 6 choices, noisy rewards: at least 9 of 10 within 4,000 steps; here 600."""
    config = HPNConfig(num_steps=600, num_rounds=100, surrogate=False, encoding_epsilon=None)
    searcher = HPN(SPACE, config)
    searcher.enrol(_encodings())
    _drive(searcher, 600, _optima())
    assert _right(searcher.best(), _optima()) >= 9


def test_regression_needs_a_third_of_the_steps_and_one_config_falls_behind() -> None:
    """With personal optima FedEx can please few: its one config is right for at most two of ten."""
    best = _optima()
    uniform = UniformSearch(SPACE, HPNConfig(method="uniform", num_steps=300, num_rounds=100))
    uniform.enrol(_encodings())
    _drive(uniform, 300, best)
    assert _right(uniform.best(), best) >= 9
    fedex = FedExSearch(SPACE, HPNConfig(method="fedex", num_steps=300, num_rounds=100))
    fedex.enrol(_encodings())
    _drive(fedex, 300, best)
    assert _right(fedex.best(), best) <= 2


def test_released_policy_is_uniform_after_its_search() -> None:
    """Bug 1 of the release, kept on purpose in this mode: p within 0.2013 for 5 choices."""
    searcher = ReleasedSearch(SPACE, HPNConfig(method="released", num_steps=80, num_rounds=100))
    searcher.enrol(_encodings())
    before = [p.clone() for p in searcher.policy.heads.parameters()]
    _drive(searcher, 80, _optima())
    probabilities = searcher.output().probabilities()[0]
    assert 0.19 < float(probabilities.min()) <= float(probabilities.max()) < 0.21
    assert all(torch.equal(a, b) for a, b in zip(before, searcher.policy.heads.parameters(), strict=True))
    assert searcher.best() == searcher.best()  # reading changes nothing


def test_released_continuous_mode_deploys_its_mean() -> None:
    space = Space({"lr": Float(lower=1e-3, upper=1e-1, log=True)})
    searcher = ReleasedSearch(space, HPNConfig(method="released", policy="beta", num_steps=20, num_rounds=10))
    searcher.enrol(_encodings(4))
    for step in range(20):
        ids = [0, 2]
        actions = searcher.ask(ids, step=step, generator=torch.Generator().manual_seed(step))
        assert actions.shape == (2, 1)
        gains = dict.fromkeys(ids, 0.1)
        row = searcher.tell(
            Trial(step=step, start=1, client_ids=ids, actions_KP=actions, gains=gains, end=0.6, anchor=0.5)
        )
        assert row["hpn/reward"] == pytest.approx(0.1)
    copy = ReleasedSearch(space, searcher.config)
    copy.load_state_dict(searcher.state_dict())
    assert copy.best() == searcher.best()
    assert all(1e-3 <= config["lr"] <= 1e-1 for config in copy.best().values())


def _two_phase(start: int, action: float) -> float:
    """The large rate (1) gains most in the first tenth of 100 rounds and harms later."""
    return (0.3 if start < 10 else -0.1) if action == 1 else 0.05


@pytest.mark.parametrize(("anchored", "expected"), [(True, "small"), (False, "large")])
@pytest.mark.parametrize("surrogate", [True, False])
def test_starting_along_the_trajectory_removes_the_bias(
    anchored: bool, expected: str, surrogate: bool
) -> None:
    """Dossier: one-round search from scratch picks the large rate, anchored search the right one."""
    space = Space({"rate": Categorical(choices=("small", "large"))})
    searcher = HPN(space, HPNConfig(num_rounds=100, num_steps=150, surrogate=surrogate, learning_rate=0.01))
    searcher.enrol(_encodings(4))
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        start = int(torch.randint(100, (), generator=generator)) if anchored else 0
        actions = searcher.ask([0, 1, 2, 3], step=step, generator=generator)
        gains = {k: _two_phase(start, float(actions[k, 0])) for k in range(4)}
        searcher.tell(Trial(step=step, start=start, client_ids=[0, 1, 2, 3], actions_KP=actions, gains=gains))
    assert {config["rate"] for config in searcher.best().values()} == {expected}


@pytest.mark.parametrize("method", ["hpn", "released", "uniform", "fedex"])
def test_one_client_of_a_hundred_and_clients_that_fail(method: str) -> None:
    """Bug 4 of the release: absent clients crashed it. Here their terms drop out."""
    searcher = make_searcher(SPACE, HPNConfig(method=method, num_rounds=10, num_steps=10))
    searcher.enrol(_encodings(100))
    _drive(searcher, 3, _optima(100), cohort=1)
    ids = [3, 4, 5]
    actions = searcher.ask(ids, step=3, generator=torch.Generator().manual_seed(0))
    partial = Trial(
        step=3,
        start=0,
        client_ids=ids,
        actions_KP=actions,
        gains={4: 0.1},
        weights={4: 9.0},
        end=0.6,
        anchor=0.5,
    )
    assert searcher.tell(partial)["hpn/participants"] == 1.0
    nobody = Trial(step=4, start=0, client_ids=ids, actions_KP=actions, gains={})
    assert searcher.tell(nobody)["hpn/participants"] == 0.0
    assert len(searcher.best()) == 100


def test_a_failed_client_has_no_part_in_the_update() -> None:
    """Three asked and one counted equals one asked: the log-probabilities of the others are dropped and the
    denominator is the number of participants."""
    states = []
    for ids in ([3, 4, 5], [4]):
        searcher = HPN(SPACE, HPNConfig(baseline="none"))
        searcher.enrol(_encodings())
        actions = torch.tensor([[1.0, 2.0, 3.0]] * len(ids), dtype=torch.float64)
        searcher.tell(Trial(step=0, start=0, client_ids=ids, actions_KP=actions, gains={4: 0.7}))
        states.append(searcher.policy.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("method", ["hpn", "released", "uniform", "fedex"])
def test_resumed_equals_uninterrupted(method: str) -> None:
    config = HPNConfig(method=method, num_rounds=20, num_steps=30)
    whole = make_searcher(SPACE, config)
    whole.enrol(_encodings())
    _drive(whole, 30, _optima())
    first = make_searcher(SPACE, config)
    first.enrol(_encodings())
    _drive(first, 13, _optima())
    second = make_searcher(SPACE, config)
    second.load_state_dict(first.state_dict())
    _drive(second, 30, _optima(), first=13)
    assert second.best() == whole.best()
    draw = [s.ask([0, 1], step=30, generator=torch.Generator().manual_seed(1)) for s in (whole, second)]
    assert torch.equal(*draw)


def test_global_reward_gives_everyone_the_same_advantage() -> None:
    """One client gains 1, the other -1, weights 3 and 1: both are told (3 - 1) / 4 = 0.5."""
    seen = []
    searcher = HPN(SPACE, HPNConfig(reward="global"))
    searcher.enrol(_encodings(2))
    searcher.baseline.advantage = lambda start, rewards: seen.append(dict(rewards)) or rewards
    actions = torch.zeros(2, 3, dtype=torch.float64)
    trial = Trial(
        step=0, start=0, client_ids=[0, 1], actions_KP=actions, gains={0: 1.0, 1: -1.0}, weights={0: 3, 1: 1}
    )
    searcher.tell(trial)
    assert seen == [{"0": 0.5, "1": 0.5}]


def test_beta_policy_finds_a_place_in_a_range() -> None:
    """Two clients with optima at 0.2 and 0.8 of the range."""
    space = Space({"x": Float(lower=0.0, upper=1.0)})
    searcher = HPN(space, HPNConfig(policy="beta", num_rounds=10, num_steps=120, entropy_weight=0.1))
    searcher.enrol(_encodings(2))
    for step in range(120):
        generator = torch.Generator().manual_seed(step)
        actions = searcher.ask([0, 1], step=step, generator=generator)
        gains = {k: -float((actions[k, 0] - place) ** 2) for k, place in ((0, 0.2), (1, 0.8))}
        searcher.tell(Trial(step=step, start=0, client_ids=[0, 1], actions_KP=actions, gains=gains))
    found = searcher.best()
    assert found[0]["x"] == pytest.approx(0.2, abs=0.1)
    assert found[1]["x"] == pytest.approx(0.8, abs=0.1)


def test_an_unseen_client_gets_what_similar_clients_get() -> None:
    """Two kinds of encodings with optima 0 and 1; a fresh one of the second kind."""
    space = Space({"x": Categorical(choices=("first", "second"))})
    searcher = HPN(space, HPNConfig(num_rounds=10, num_steps=150))
    kinds = [k % 2 for k in range(8)]
    generator = torch.Generator().manual_seed(0)
    encodings = {
        k: torch.tensor([1.0, -1.0]) * (2 * kinds[k] - 1) + 0.1 * torch.randn(2, generator=generator)
        for k in range(8)
    }
    searcher.enrol(encodings)
    for step in range(150):
        ids = list(range(8))
        actions = searcher.ask(ids, step=step, generator=torch.Generator().manual_seed(step))
        gains = {k: float(actions[k, 0] == kinds[k]) for k in ids}
        searcher.tell(Trial(step=step, start=0, client_ids=ids, actions_KP=actions, gains=gains))
    assert searcher.best_for(torch.tensor([1.0, -1.0])) == {"x": "second"}
    assert searcher.best_for(torch.tensor([-1.0, 1.0])) == {"x": "first"}
    assert searcher.unchanged > 0


def test_idle_parameters_get_no_gradient() -> None:
    space = Space(
        {
            "optimizer": Categorical(choices=("sgd", "adamw")),
            "momentum": Categorical(choices=(0.0, 0.9), when=When(name="optimizer", values=("sgd",))),
        }
    )
    searcher = HPN(space, HPNConfig(baseline="none", weight_decay=0.0))
    searcher.enrol(_encodings(1))
    actions = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    searcher.tell(Trial(step=0, start=0, client_ids=[0], actions_KP=actions, gains={0: 1.0}))
    assert float(searcher.policy.heads[1].bias.detach().abs().max()) == 0.0
    assert float(searcher.policy.heads[0].bias.detach().abs().max()) > 0.0


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    searcher = HPN(SPACE)
    searcher.enrol(_encodings(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_refused() -> None:
    searcher = HPN(SPACE)
    with pytest.raises(ValueError, match="no client has sent an encoding; the search needs at least one"):
        searcher.enrol({})
    with pytest.raises(ValueError, match=r"encodings must have one length; got .*\[2, 3\]. Give all clients"):
        searcher.enrol({0: torch.zeros(2), 1: torch.zeros(3)})
    with pytest.raises(
        ValueError, match=r"the encodings of clients .*1.* hold NaN or infinity; encode them again"
    ):
        searcher.enrol({0: torch.zeros(2), 1: torch.tensor([0.0, math.nan])})
    searcher.enrol({0: torch.zeros(2)})
    with pytest.raises(ValueError, match=r"clients .*5.* have sent no encoding; enrol them before"):
        searcher.ask([0, 5], step=0, generator=torch.Generator())
    with pytest.raises(ValueError, match="method='random'.* does not search step by step; these do: .*hpn"):
        make_searcher(SPACE, HPNConfig(method="random"))
