"""The private aggregator and its engine: identities, law, faults, account, resume."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_plugins.accounting import epsilon, noise_multiplier_for
from hf_plugins.dp_fedavg import PrivateMean, RunConfig, private_engine
from hf_plugins.dp_fedavg.trainer import build_task, finish_run, finite, recipe_engine, secret_seed
from hf_plugins.rounds import Job, RoundContext, TrainableVector, Update, plain_mean
from tests.hf_plugins.dp_fedavg import reference
from tests.hf_plugins.dp_fedavg.tiny import DATA, ROOT, config, engine
from tests.hf_plugins.rounds import tiny

NO_LIMITS = {"noise_multiplier": 0.0, "clipping_norm": math.inf, "sample_rate": 1.0}


def test_without_privacy_it_is_fedavg() -> None:
    """lambda 0, keep 1, sigma 0, S infinite, q 1, equal sizes: the weights of plain FedAvg."""
    private = engine(config(**NO_LIMITS))
    private.run(3)
    plain = tiny.engine(num_clients=8, aggregate=plain_mean)
    plain.run(3)
    torch.testing.assert_close(private.vector_D, plain.vector_D, atol=1e-6, rtol=0)


def test_blur_and_lus_change_local_training_and_no_epsilon() -> None:
    plain = engine(config())
    full = engine(config(blur=4.0, keep_ratio=0.3))
    plain.run(2), full.run(2)
    assert not torch.equal(plain.vector_D, full.vector_D)
    assert full.history[-1]["clients/norm"] < plain.history[-1]["clients/norm"]
    assert full.aggregate.epsilon() == plain.aggregate.epsilon()


def context(cohort: list[int], size: int = 4, num_clients: int = 100) -> RoundContext:
    return RoundContext(
        round_index=0, seed=0, num_clients=num_clients, cohort=cohort, start_D=torch.zeros(size)
    )


def users(vectors: list[torch.Tensor], **metrics: float) -> list[Update]:
    return [
        Update(client_id=i, round_index=0, vector_D=v, metrics=dict(metrics)) for i, v in enumerate(vectors)
    ]


def test_server_clips_again() -> None:
    """A user that lies about its clipping counts for S = 0.05, not for 1000; the denominator is q K = 50."""
    mean = PrivateMean(config(noise_multiplier=0.0), num_clients=100, num_rounds=1)
    done = mean(users([torch.tensor([1000.0, 0.0, 0.0, 0.0])]), context([0]))
    assert float(done.step_D[0]) == pytest.approx(0.05 / 50, rel=1e-5)


def test_denominator_does_not_follow_the_cohort() -> None:
    mean = PrivateMean(config(noise_multiplier=0.0), num_clients=100, num_rounds=9)
    one = torch.tensor([0.01, 0.0, 0.0, 0.0])
    steps = [mean(users([one] * n), context(list(range(n)))).step_D[0] for n in (1, 2, 4)]
    assert [float(s) for s in steps] == pytest.approx([0.01 / 50, 0.02 / 50, 0.04 / 50])
    weighted = users([one])
    weighted[0].num_examples = 10**9
    assert float(mean(weighted, context([0])).step_D[0]) == pytest.approx(0.01 / 50)


def test_noise_of_the_average_and_on_masked_coordinates() -> None:
    """m = 50, S = 0.2, sigma = 0.95: 0.0038 a coordinate within 1 % (six standard errors at D = 2e5)."""
    options = config(noise_multiplier=0.95, clipping_norm=0.2, sample_rate=0.1)
    size = 200_000
    mean = PrivateMean(options, num_clients=500, num_rounds=1)
    done = mean(users([torch.zeros(size)]), context([0], size, 500))
    assert float(done.step_D.std()) == pytest.approx(0.0038, rel=0.01)
    assert int((done.step_D == 0).sum()) == 0
    shares = PrivateMean(
        config(noise_multiplier=0.95, clipping_norm=0.2, sample_rate=0.1, noise_mode="shares"),
        num_clients=500,
        num_rounds=1,
    )
    std = 0.95 * 0.2 / math.sqrt(50)
    sent = (torch.randn(size, generator=torch.Generator().manual_seed(k)) * std for k in range(30))
    done = shares(users(list(sent)), context(list(range(30)), size, 500))
    assert float(done.step_D.std()) == pytest.approx(0.0038, rel=0.01), "20 missing shares are made up for"


def test_missing_shares_can_stop_the_run() -> None:
    options = config(
        noise_mode="shares", sampling="fixed", cohort_size=2, missing_shares="stop", noise_multiplier=1.0
    )
    mean = PrivateMean(options, num_clients=10, num_rounds=2)
    with pytest.raises(RuntimeError, match="noise shares came, so the sum is under-noised"):
        mean(users([torch.zeros(4)]), context([0, 1], 4, 10))
    assert mean.ledger.num_steps == 1, "looked at or not, the round is paid"
    mean(users([torch.zeros(4)] * 2), context([0, 1], 4, 10))


def test_empty_cohort_is_a_paid_round_of_noise() -> None:
    mean = PrivateMean(config(), num_clients=100, num_rounds=1)
    done = mean([], context([]))
    assert done.step_D.abs().min() > 0
    assert mean.ledger.num_steps == 1


def test_account() -> None:
    """Epsilon is that of the accountant for the same rounds, by PLD; fixed cohorts never get Poisson's."""
    mean = PrivateMean(
        config(noise_multiplier=1.0, sample_rate=0.1, delta=1e-3), num_clients=100, num_rounds=5
    )
    for _ in range(5):
        mean.pay()
    same = epsilon(noise_multiplier=1.0, num_steps=5, sample_rate=0.1, delta=1e-3)
    assert mean.epsilon() == pytest.approx(same, abs=1e-12)
    fixed = PrivateMean(
        config(noise_multiplier=1.0, sampling="fixed", cohort_size=10, delta=1e-3),
        num_clients=100,
        num_rounds=5,
    )
    for _ in range(5):
        fixed.pay()
    assert fixed.epsilon() > 1.5 * mean.epsilon()
    assert fixed.report()["neighbours"] == "replace one user"
    assert mean.report()["neighbours"] == "add or remove one user"
    assert finite(math.inf) == sys.float_info.max
    faint = PrivateMean(config(noise_multiplier=0.1, delta=1e-3), num_clients=100, num_rounds=1)
    faint.pay()
    assert (faint.report()["accountant"], mean.report()["accountant"]) == ("rdp", "pld")
    assert 50 < faint.epsilon() < 1000
    free = PrivateMean(config(noise_multiplier=0.0), num_clients=100, num_rounds=1)
    free.pay()
    free.pay()
    assert free.epsilon() == math.inf


def test_integer_order_rdp_is_the_binomial_sum() -> None:
    """dp-accounting at orders 2, 5 and 20 for q = 0.1, sigma = 0.95, to 1e-9."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    accountant = rdp.RdpAccountant(orders=[2, 5, 20])
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(0.95)))
    for order, value in zip([2, 5, 20], accountant._rdp, strict=True):
        assert value == pytest.approx(reference.rdp_of_sampled_gaussian(order, 0.1, 0.95), rel=1e-9)


@pytest.mark.slow
def test_calibration() -> None:
    """|PLD(sigma) - target| <= 1e-3 from below, and less noise than the closed sufficient condition."""
    mean = PrivateMean(
        config(noise_multiplier=None, target_epsilon=8.0, sample_rate=0.1, delta=2e-3),
        num_clients=500,
        num_rounds=200,
    )
    spent = epsilon(noise_multiplier=mean.noise_multiplier, num_steps=200, sample_rate=0.1, delta=2e-3)
    # The step of calibration is 1e-3 in sigma, where epsilon falls by about 12 for each unit.
    assert 8.0 - 15e-3 <= spent <= 8.0
    closed = math.sqrt(7 * 0.1**2 * 200 * (8 + 2 * math.log(1 / 2e-3)) / 8**2)
    assert mean.noise_multiplier < closed
    fine = noise_multiplier_for(
        target_epsilon=8.0, num_steps=200, sample_rate=0.1, delta=2e-3, tolerance=5e-5
    )
    fine_spent = epsilon(noise_multiplier=fine, num_steps=200, sample_rate=0.1, delta=2e-3)
    assert abs(fine_spent - 8.0) <= 1e-3


def test_epsilon_is_monotone() -> None:
    def spent(rounds: int = 20, rate: float = 0.1, noise: float = 4.0) -> float:
        return epsilon(noise_multiplier=noise, num_steps=rounds, sample_rate=rate, delta=1e-3)

    assert spent() < spent(rounds=40) < spent(rounds=40, rate=0.2) < spent(rounds=40, rate=0.2, noise=3.0)


def test_budget_is_not_exceeded(tmp_path: Path) -> None:
    engine(num_rounds=2, folder=tmp_path).run(2)
    run = engine(num_rounds=2, folder=tmp_path)
    with pytest.raises(RuntimeError, match="all of them are spent; plan a new run"):
        run.run(3)
    assert run.round_index == 2


def test_large_delta_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        PrivateMean(config(delta=0.5), num_clients=10, num_rounds=1)
    assert "Take a smaller one, or leave it out" in caplog.text
    caplog.clear()
    PrivateMean(config(), num_clients=10, num_rounds=1)
    assert caplog.text == ""


def test_quantile_follows_the_norms() -> None:
    """Users of norm 10, S from 0.1: S grows to about 10 although the count is noisy; the cost stays sigma."""
    options = config(
        noise_multiplier=1.0,
        clipping_norm=0.1,
        quantile=0.5,
        quantile_lr=0.3,
        count_noise_std=5.0,
        sample_rate=0.5,
    )
    mean = PrivateMean(options, num_clients=200, num_rounds=200)
    assert mean.update_multiplier == pytest.approx(1.005038, abs=1e-6)
    bounds = []
    for number in range(60):
        bound = mean.clipping_norm
        ctx = context(list(range(100)), 4, 200)
        ctx.round_index = number
        sent = users([torch.ones(4)] * 100, norm=10.0)
        ctx.updates = {u.client_id: u.metrics for u in sent}
        mean(sent, ctx)
        bounds.append(bound)
    assert bounds[0] == 0.1
    assert 8 < sum(bounds[-10:]) / 10 < 12.5
    assert mean.configure(ctx, 0)["dp_fedavg.clipping_norm"] == mean.clipping_norm
    other = PrivateMean(options, num_clients=200, num_rounds=200)
    other.load_state_dict(json.loads(json.dumps(mean.state_dict())))
    assert other.clipping_norm == mean.clipping_norm
    assert other.epsilon() == mean.epsilon()


class Lying(type(tiny.client(0))):
    """Answers with something else than it trained."""

    def __init__(self, client_id: int, change: object) -> None:
        super().__init__(client_id, tiny.records(client_id), loss=tiny.loss)
        self.change = change

    def train(self, weights: TrainableVector, job: Job) -> Update:
        update = super().train(weights, job)
        self.change(update)
        return update


def test_faults_leave_the_account_right(caplog: pytest.LogCaptureFixture) -> None:
    """NaN, wrong shape, stale and dead users: counted, denominator and epsilon as without faults."""

    def nan(update: Update) -> None:
        update.vector_D[0] = math.nan

    def stale(update: Update) -> None:
        update.round_index = -7

    def huge(update: Update) -> None:
        update.vector_D *= 1e20
        update.num_examples = 10**12

    clients = [tiny.client(0), Lying(1, nan), Lying(2, stale), Lying(3, huge)]
    options = config(noise_multiplier=0.0, sample_rate=1.0)
    run = engine(options, clients=clients)
    with caplog.at_level(logging.WARNING):
        outcome = run.step(run.vector_D, 0)
    assert {d.client_id: d.reason for d in outcome.context.dropped} == {1: "not finite", 2: "out of date"}
    assert "client 1 does not count (not finite" in caplog.text
    step = outcome.vector_D - run.vector_D
    assert float(step.norm()) <= 2 * 0.05 / 4 * (1 + 1e-6), "two users of norm S at most, over m = 4"
    assert run.aggregate.ledger.num_steps == 1


def test_statistics_are_hidden_unless_asked_for() -> None:
    row = engine(config(log_private_statistics=False)).run(1)[0]
    assert set(row) == {"round", "dp_fedavg/clipping_norm", "dp_fedavg/noise_std", "dp_fedavg/epsilon"}
    open_row = engine().run(1)[0]
    assert {"rounds/cohort", "clients/loss", "dp_fedavg/private/clipped_ratio"} <= set(open_row)


def test_secret_seed_is_kept_and_never_written_elsewhere(tmp_path: Path) -> None:
    one = engine(config(seed=None), folder=tmp_path)
    one.run(2)
    assert secret_seed(tmp_path) == one.seed
    assert (tmp_path / "secret.json").stat().st_mode & 0o77 == 0
    resumed = engine(config(seed=None), folder=tmp_path)
    resumed.run(4)
    whole = engine(config(seed=one.seed))
    whole.run(4)
    assert torch.equal(resumed.vector_D, whole.vector_D)
    other = engine(config(seed=None))
    assert other.seed != engine(config(seed=None)).seed


KILLED = """
import sys, time
from pathlib import Path
from tests.hf_plugins.dp_fedavg.tiny import config, engine
run = engine(config(quantile=0.5, count_noise_std=3.0), num_rounds=10, folder=Path(sys.argv[1]))
run.on_round.append(lambda row: (print(row["round"], flush=True), time.sleep(0.05)))
run.run(10)
"""


@pytest.mark.host
def test_killed_server_restarts_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """SIGKILL in the middle: weights, account and clipping norm equal those of an uninterrupted run."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    options = config(quantile=0.5, count_noise_std=3.0)
    resumed = engine(options, num_rounds=10, folder=tmp_path)
    resumed.run(10)
    whole = engine(options, num_rounds=10)
    whole.run(10)
    assert torch.equal(resumed.vector_D, whole.vector_D)
    assert resumed.aggregate.state_dict() == whole.aggregate.state_dict()
    assert resumed.aggregate.ledger.num_steps == 10


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Replace it by GroupNorm or LayerNorm"):
        engine(model=nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="secure=True needs save_every=1"):
        engine(config(secure=True), save_every=2)
    with pytest.raises(ValueError, match=" users a round, but there are "):
        engine(config(sampling="fixed", cohort_size=9))


def test_secure_run_uses_no_seed() -> None:
    runs = [engine(config(secure=True)) for _ in range(2)]
    for run in runs:
        run.run(2)
    assert not torch.equal(runs[0].vector_D, runs[1].vector_D)


def test_groups_equal_one_by_one() -> None:
    one, many = engine(config(blur=2.0)), engine(config(blur=2.0), group_size=3)
    one.run(3), many.run(3)
    torch.testing.assert_close(many.vector_D, one.vector_D, atol=2e-6, rtol=0)


@pytest.mark.real
def test_recipe_on_real_images(tmp_path: Path) -> None:
    """Twenty users of ten garments each, no noise: well above chance after twelve rounds, not perfect."""
    run = RunConfig(
        task="images",
        data=str(DATA),
        output_dir=str(tmp_path),
        num_rounds=12,
        num_clients=20,
        alpha=10.0,
        model="mlp",
        group_size=10,
    )
    local = {"learning_rate": 0.05, "num_epochs": 2, "batch_size": 5}
    task = build_task(run, local)
    dp = config(noise_multiplier=0.0, clipping_norm=2.0, blur=0.4, keep_ratio=0.5, sample_rate=1.0)
    run_engine = recipe_engine(task, run, dp, progress=False)
    run_engine.run(12)
    report = finish_run(run_engine, task.model, run)
    assert 0.5 < report["test/accuracy"] < 0.9
    assert json.loads((tmp_path / "report.json").read_text()) == report
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(TrainableVector(task.model).flatten(saved), run_engine.vector_D)


def test_local_options_of_a_recipe_are_checked(tmp_path: Path) -> None:
    run = RunConfig(task="images", data=str(DATA), output_dir=str(tmp_path), num_rounds=1, num_clients=5)
    with pytest.raises(ValueError, match="is no option of local training"):
        build_task(run, {"lr": 0.1})
    assert private_engine is not None
