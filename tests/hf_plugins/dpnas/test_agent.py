"""The search: resumed equals uninterrupted, the account counts every release, and a cell without noise is no
secret.
"""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from hf_plugins.dpnas import agent
from hf_plugins.dpnas.agent import DPNASSearch, search
from hf_plugins.dpnas.config import DPNASSearchConfig
from hf_plugins.dpnas.genotypes import Genotype
from hf_plugins.dpnas.path_step import clipped_gradient_sum, poisson_batch


def data(num: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num, 1, 28, 28, generator=generator), torch.randint(10, (num,), generator=generator)


def options(**changed: object) -> DPNASSearchConfig:
    small = {
        "shape": "mnist",
        "num_steps": 4,
        "warmup_steps": 1,
        "sample_rate": 0.1,
        "reward_sample_rate": 0.2,
        "num_candidates": 2,
        "save_steps": 2,
        "delta": 1e-3,
    }
    return DPNASSearchConfig(**{**small, **changed})


def test_account_counts_every_release(tmp_path: Path) -> None:
    """4 weight steps; rewards at steps 2, 3, 4 over a fifth of the split, then two candidates over all of
    it.
    """
    result = search(options(), *data(), tmp_path)
    weights, reward = result.ledgers["weights"].releases, result.ledgers["reward"].releases
    assert [(r.noise_multiplier, r.sample_rate, r.num_steps) for r in weights] == [(0.8, 0.1, 4)]
    assert [(r.noise_multiplier, r.sample_rate, r.num_steps) for r in reward] == [
        (4.0, 0.2, 3),
        (4.0, 1.0, 2),
    ]
    assert result.epsilon == max(ledger.epsilon(delta=1e-3) for ledger in result.ledgers.values())
    assert result.private
    assert [entry["step"] for entry in result.journal] == [2, 3, 4]
    assert result.genotype == result.candidates[0][0]
    assert result.candidates[0][1] >= result.candidates[1][1]


def test_a_weight_step_divides_by_the_expected_batch() -> None:
    """Without noise, momentum and decay a step is ``- lr * clipped sum / (rate * records)`` = ``/ 2.4``,
    whatever number of records was drawn: that number is private.
    """
    task = DPNASSearch(
        options(noise_multiplier=0.0, momentum=0.0, weight_decay=0.0, learning_rate=1.0), *data()
    )
    copy = torch.Generator()
    copy.set_state(task.generator.get_state())
    cell = task.controller.propose(copy, uniform=True).genotype
    batch = poisson_batch(24, 0.1, copy)
    assert len(batch) > 0
    images, labels = task.weight_data
    total, _ = clipped_gradient_sum(
        task.supernet.network(cell), images[batch], labels[batch], max_grad_norm=1.0
    )
    before = {name: p.detach().clone() for name, p in task.supernet.network(cell).named_parameters()}
    task.train_weights()
    for name, parameter in task.supernet.network(cell).named_parameters():
        torch.testing.assert_close(parameter, before[name] - total[name] / 2.4, atol=1e-6, rtol=1e-5)


def test_a_reward_divides_by_the_expected_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 reward records at rate 0.2: right answers over 3.2, whatever number was drawn."""
    task = DPNASSearch(options(), *data())
    divisors: list[float] = []
    monkeypatch.setattr(
        agent, "noisy_accuracy", lambda *args, expected_size, **kwargs: divisors.append(expected_size) or 0.0
    )
    task.train_controller()
    task.train_controller()
    assert divisors == pytest.approx([3.2, 3.2])


def test_result_file_holds_the_cell_and_the_options(tmp_path: Path) -> None:
    result = search(options(), *data(), tmp_path)
    written = json.loads((tmp_path / "search.json").read_text())
    assert Genotype.from_triples(written["genotype"]) == result.genotype
    assert written["config"]["shape"] == "mnist"
    assert written["epsilon"] == pytest.approx(result.epsilon)
    assert not list(tmp_path.glob("*.part"))


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = search(options(), *data(), tmp_path / "whole")
    first = DPNASSearch(options(), *data())
    (tmp_path / "cut").mkdir()
    for _ in range(2):
        first.train_weights()
        first.step += 1
        if first.step > 1:
            first.train_controller()
    first.save(tmp_path / "cut")
    cut = search(options(), *data(), tmp_path / "cut")
    assert cut.candidates == whole.candidates
    assert cut.journal == whole.journal
    assert cut.ledgers["weights"].state_dict() == whole.ledgers["weights"].state_dict()
    states = [torch.load(tmp_path / name / "search_state.pt")["supernet"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_rewards_without_noise_are_called_not_private(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = search(options(reward_noise_multiplier=0.0), *data(), tmp_path)
    assert math.isinf(result.epsilon)
    assert not result.private
    assert "architecture not private: reward_noise_multiplier or noise_multiplier is 0" in caplog.text
    assert json.loads((tmp_path / "search.json").read_text())["epsilon"] is None


def test_random_strategy_reads_no_reward_until_the_end(tmp_path: Path) -> None:
    result = search(options(strategy="random"), *data(), tmp_path)
    assert result.journal == []
    assert [(r.sample_rate, r.num_steps) for r in result.ledgers["reward"].releases] == [(1.0, 2)]


def test_splits_are_disjoint_and_cover_the_data() -> None:
    images, labels = data()
    images[:, 0, 0, 0] = torch.arange(40)
    task = DPNASSearch(options(), images, labels)
    marks = [set(part[0][:, 0, 0, 0].tolist()) for part in (task.reward_data, task.weight_data)]
    assert len(marks[0]) == 16
    assert marks[0].isdisjoint(marks[1])
    assert marks[0] | marks[1] == set(range(40))


def test_released_search_budget() -> None:
    """The published search (rate .01, noise .8, 12,000 steps) costs 11.172 at delta 1e-5 by PLD."""
    task = DPNASSearch(options(sample_rate=0.01, delta=1e-5), *data())
    for _ in range(12000):
        task.ledgers["weights"].add(task_release())
    assert task.ledgers["weights"].epsilon(delta=1e-5) == pytest.approx(11.172211, abs=1e-4)


def task_release() -> object:
    from hf_plugins.accounting import Release

    return Release(noise_multiplier=0.8, num_steps=1, sample_rate=0.01)


def test_bad_input_is_refused_before_work(tmp_path: Path) -> None:
    images, labels = data()
    with pytest.raises(
        ValueError, match="shape='cifar10'.* takes images of .* and one label each; got images"
    ):
        search(options(shape="cifar10"), images, labels, tmp_path)
    with pytest.raises(ValueError, match="1.* images cannot be split with reward_split=.*0.4"):
        search(options(), images[:1], labels[:1], tmp_path)
    search(options(), images, labels, tmp_path)
    with pytest.raises(ValueError, match="holds a search with other options .*seed.* differ"):
        search(options(seed=1), images, labels, tmp_path)
