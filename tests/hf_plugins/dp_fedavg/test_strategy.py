"""UserLevelDP: equal to the engine in process, over Flower's own simulation too; refusals; resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import ConfigRecord, MetricRecord  # noqa: E402

from hf_plugins.dp_fedavg import UserLevelDP, gradient_term  # noqa: E402
from hf_plugins.dp_fedavg.client import user_level_mod  # noqa: E402
from hf_plugins.rounds import InProcess  # noqa: E402
from hf_plugins.rounds.flower import Population, from_arrays, round_client_app, to_arrays  # noqa: E402
from tests.hf_plugins.dp_fedavg.tiny import config, engine  # noqa: E402
from tests.hf_plugins.rounds import tiny  # noqa: E402
from tests.hf_plugins.rounds.test_flower import Node, broken  # noqa: E402

pytestmark = pytest.mark.host
FULL = {"blur": 2.0, "keep_ratio": 0.5}


def app(hosted: list[int]) -> Any:
    clients = [tiny.client(i, terms=[gradient_term]) for i in range(8)]
    return round_client_app(
        lambda context: Population(transport=InProcess(tiny.model(), clients), hosted=hosted),
        mods=[user_level_mod],
    )


def grid(change: Any = None) -> Node:
    return Node({11: app([0, 2, 4, 6]), 22: app([1, 3, 5, 7])}, change)


def strategy(dp: Any = None, **options: Any) -> UserLevelDP:
    given = {"num_clients": 8, "num_rounds": 4, "progress": False, "evaluate_every": 100, **options}
    return UserLevelDP(tiny.model(), dp or config(**FULL), **given)


def test_federated_equals_in_process() -> None:
    """Same seed: the same cohorts, batches, masks, clips and noise, bit by bit."""
    federated, local = strategy(), engine(config(**FULL))
    result = federated.start(grid())
    local.run(4)
    assert torch.equal(federated.engine.vector_D, local.vector_D)
    assert torch.equal(from_arrays(federated.weights, result.arrays), local.vector_D)
    assert federated.private.ledger.state_dict() == local.aggregate.ledger.state_dict()
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]


def test_flowers_own_loop_gives_the_same() -> None:
    """configure_train and aggregate_train, as Flower's loop calls them."""
    federated, local, nodes = strategy(), engine(config(**FULL)), grid()
    arrays = to_arrays(federated.weights, federated.engine.vector_D)
    for server_round in (1, 2):
        messages = federated.configure_train(server_round, arrays, ConfigRecord(), nodes)
        arrays, metrics = federated.aggregate_train(server_round, nodes.send_and_receive(messages, timeout=1))
        assert metrics is not None
        assert federated.configure_evaluate(server_round, arrays, ConfigRecord(), nodes) == []
        assert federated.aggregate_evaluate(server_round, []) is None
    local.run(2)
    assert torch.equal(from_arrays(federated.weights, arrays), local.vector_D)
    with pytest.raises(RuntimeError, match="was not configured by this strategy"):
        federated.aggregate_train(9, [])


@pytest.mark.parametrize("kind", ["no answer", "died", "not finite", "out of date", "wrong shape"])
def test_faults_cost_no_more_and_no_less(kind: str) -> None:
    """Nobody's update counts: noise over m = q K is released and paid, as many rounds as planned."""
    federated = strategy(num_rounds=2)
    federated.start(grid(broken(kind)))
    assert federated.private.ledger.num_steps == 2
    assert (
        federated.engine.history[-1][f"rounds/dropped/{kind}"]
        == federated.engine.history[-1]["rounds/cohort"]
    )


def test_server_restart(tmp_path: Path) -> None:
    strategy(folder=tmp_path).start(grid(), num_rounds=2)
    second = strategy(folder=tmp_path)
    second.start(grid(), evaluate_fn=lambda number, arrays: MetricRecord({"n": float(number)}))
    whole = strategy()
    whole.start(grid(), to_arrays(whole.weights, whole.engine.vector_D), timeout=60)
    assert torch.equal(second.engine.vector_D, whole.engine.vector_D)
    assert second.private.ledger.num_steps == 4
    second.summary()


def test_train_config_reaches_every_client() -> None:
    slow = strategy(config(noise_multiplier=0.0))
    slow.start(grid(), num_rounds=1, train_config=ConfigRecord({"learning_rate": 1e-8}))
    assert float((slow.engine.vector_D - strategy().engine.vector_D).abs().max()) < 1e-6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="but noise and budget were planned for 4"):
        strategy().start(grid(), num_rounds=5)
    with pytest.raises(ValueError, match="asks clients for figures that no noise covers"):
        strategy().start(grid(), evaluate_config=ConfigRecord({"x": 1}))
