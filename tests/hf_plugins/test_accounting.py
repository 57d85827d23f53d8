"""Epsilon against published goldens of three libraries, closed forms, and the rules that keep modes apart."""

import json
import math

import pytest

from hf_plugins.accounting import Ledger, Release, composed_epsilon, epsilon, noise_multiplier_for

pytest.importorskip("dp_accounting", reason="privacy accounting needs the extra hf")

# sample_rate, noise_multiplier, num_steps, delta, RDP, PLD (dp-accounting 0.6.0), PRV (Opacus 1.6.0).
GOLDEN = {
    "A": (256 / 60000, 1.1, 14063, 1e-5, 2.596656, 2.381779, 2.391837),
    "B": (2048 / 60000, 2.15, 1160, 1e-5, 2.591037, 2.376105, 2.386245),
    "C": (2048 / 50000, 2.0664, 720, 1e-5, 2.582842, 2.364671, 2.374814),
    "D": (300 / 30000, 0.8, 12000, 1e-5, 12.135587, 11.172211, 11.182737),
    "E": (0.1, 0.95, 200, 2e-3, 8.578643, 7.301241, 7.312040),
    "F": (0.1, 0.95, 300, 2e-3, 10.833829, 9.372459, 9.383396),
    "G": (0.01, 1.0, 1000, 1e-5, 2.101367, 1.828244, 1.838372),
    "H": (1.0, 10.0, 100, 1e-5, 4.728507, 4.377178, 4.387413),
    "I": (0.05, 1.5, 100, 1e-3, 1.251956, 1.048860, 1.059016),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_poisson_goldens(name: str, accountant: str) -> None:
    rate, noise, steps, delta, rdp, pld, _ = GOLDEN[name]
    value = epsilon(
        sample_rate=rate, noise_multiplier=noise, num_steps=steps, delta=delta, accountant=accountant
    )
    assert value == pytest.approx({"rdp": rdp, "pld": pld}[accountant], abs=2e-6)


@pytest.mark.parametrize("name", ["G", "H", "I"])
def test_prv_is_opacus_and_stands_just_above_pld(name: str) -> None:
    pytest.importorskip("opacus")
    rate, noise, steps, delta, _, pld, prv = GOLDEN[name]
    value = epsilon(sample_rate=rate, noise_multiplier=noise, num_steps=steps, delta=delta, accountant="prv")
    assert value == pytest.approx(prv, abs=2e-6)
    assert 0 < value - pld < 0.02


def analytic_gaussian(mu: float, delta: float) -> float:
    """Epsilon that solves delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 500.0
    for _ in range(200):
        middle = (low + high) / 2
        spent = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (10.0, 100), (4.0, 3)])
def test_everyone_in_every_step_is_the_analytic_gaussian(noise: float, steps: int) -> None:
    """T steps with noise z are one Gaussian with mu = sqrt(T)/z; mu = 1, delta = 1e-5 give 4.377178."""
    exact = analytic_gaussian(math.sqrt(steps) / noise, 1e-5)
    for sampling in ("poisson", "shuffle"):
        value = epsilon(noise_multiplier=noise, num_steps=steps, delta=1e-5, sampling=sampling)
        assert value == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize(
    ("num_records", "batch_size", "noise", "steps", "delta", "golden"),
    [
        (500, 50, 0.95, 200, 2e-3, 16.589223),
        (500, 50, 0.95, 300, 2e-3, 22.469678),
        (1000, 10, 1.0, 1000, 1e-5, 3.576111),
    ],
)
def test_fixed_batches_replace_one(
    num_records: int, batch_size: int, noise: float, steps: int, delta: float, golden: float
) -> None:
    for accountant in ("rdp", "auto"):
        value = epsilon(
            sampling="fixed",
            num_records=num_records,
            batch_size=batch_size,
            noise_multiplier=noise,
            num_steps=steps,
            delta=delta,
            accountant=accountant,
        )
        assert value == pytest.approx(golden, abs=2e-6)


def test_shuffled_batches_get_no_amplification() -> None:
    """40 epochs with noise 2.15 are 40 Gaussians, mu = sqrt(40)/2.15 = 2.94."""
    mnist = epsilon(sampling="shuffle", sample_rate=1 / 29, noise_multiplier=2.15, num_steps=1160, delta=1e-5)
    assert mnist == pytest.approx(analytic_gaussian(math.sqrt(40) / 2.15, 1e-5), abs=1e-4)
    assert mnist == pytest.approx(16.26, abs=0.01)
    cifar = epsilon(
        sampling="shuffle", sample_rate=1 / 24, noise_multiplier=2.0664, num_steps=720, delta=1e-5
    )
    assert cifar == pytest.approx(14.22, abs=0.01)


@pytest.mark.parametrize(
    ("budget", "noise", "accountant"), [(1, 4.4408, "pld"), (3, 1.8007, "pld"), (3, 1.9206, "rdp")]
)
def test_calibrated_noise_of_the_published_mnist_run(budget: float, noise: float, accountant: str) -> None:
    found = noise_multiplier_for(
        target_epsilon=budget,
        sample_rate=2048 / 60000,
        num_steps=1160,
        delta=1e-5,
        accountant=accountant,
    )
    assert noise - 1e-4 < found < noise + 1.1e-3
    spent = epsilon(
        sample_rate=2048 / 60000, noise_multiplier=found, num_steps=1160, delta=1e-5, accountant=accountant
    )
    assert spent <= budget


def test_no_noise_is_no_privacy_and_no_step_costs_nothing() -> None:
    assert epsilon(noise_multiplier=0, num_steps=1, delta=1e-5) == math.inf
    assert epsilon(noise_multiplier=1, num_steps=0, delta=1e-5) == 0


def test_ledger_composes_and_survives_json() -> None:
    """Two uses of the same records add up: Gaussians of mu 1 and 1/2 are one of mu sqrt(1.25)."""
    ledger = Ledger()
    for _ in range(4):
        ledger.add(Release(noise_multiplier=2.0, num_steps=1))
    ledger.add(Release(noise_multiplier=4.0, num_steps=4))
    assert len(ledger.releases) == 2
    assert ledger.num_steps == 8
    other = Ledger()
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert other.releases == ledger.releases
    assert other.epsilon(delta=1e-5) == pytest.approx(analytic_gaussian(math.sqrt(1.25), 1e-5), abs=1e-4)


def test_order_of_releases_is_kept_and_does_not_matter() -> None:
    first, second = Release(noise_multiplier=2.0, num_steps=3), Release(noise_multiplier=3.0, num_steps=5)
    there = composed_epsilon([first, second], delta=1e-5)
    assert there == pytest.approx(composed_epsilon([second, first], delta=1e-5), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": -1}, "noise_multiplier must be a finite number >= 0; got -1"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be a finite number >= 0; got nan"),
        ({"num_steps": -1}, "num_steps must be >= 0; got -1"),
        ({"sample_rate": 0}, "sample_rate must lie in .0, 1.; got 0"),
        ({"sample_rate": 32}, "It is a share: expected batch size over number of records"),
        ({"sampling": "uniform"}, "sampling must be one of poisson, fixed, shuffle; got 'uniform'"),
        ({"sampling": "fixed", "batch_size": 9, "num_records": 5}, "0 < batch_size <= num_records"),
        ({"delta": 0}, "delta must lie in .0, 1.; got 0"),
        ({"accountant": "gdp"}, "accountant must be one of auto, pld, rdp, prv; got 'gdp'"),
        (
            {"sampling": "fixed", "batch_size": 1, "num_records": 5, "accountant": "pld"},
            "fixed sampling is analysed by accountant='rdp' only",
        ),
        ({"sampling": "shuffle", "accountant": "prv"}, "accountant='prv' analyses poisson sampling only"),
    ],
)
def test_bad_input_says_what_is_needed(options: dict, message: str) -> None:
    good = {"noise_multiplier": 1.0, "num_steps": 10, "delta": 1e-5, "sample_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        epsilon(**{**good, **options})


def test_modes_are_never_mixed() -> None:
    poisson = Release(noise_multiplier=1.0, num_steps=1, sample_rate=0.1)
    fixed = Release(noise_multiplier=1.0, num_steps=1, sampling="fixed", batch_size=1, num_records=10)
    with pytest.raises(ValueError, match="releases mix fixed, poisson sampling"):
        composed_epsilon([poisson, fixed], delta=1e-5)


def test_budgets_out_of_reach_and_foreign_states_are_refused() -> None:
    with pytest.raises(ValueError, match="target_epsilon must be a finite number > 0; got 0"):
        noise_multiplier_for(target_epsilon=0, num_steps=1, delta=1e-5)
    with pytest.raises(ValueError, match="no noise multiplier up to 100000 keeps epsilon"):
        noise_multiplier_for(target_epsilon=1e-6, num_steps=10**6, delta=1e-5, accountant="rdp")
    with pytest.raises(ValueError, match="this is no privacy ledger of version 1"):
        Ledger().load_state_dict({"history": []})


def test_missing_libraries_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dp_accounting", "dp_accounting.pld.privacy_loss_distribution"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match="privacy accounting needs dp-accounting; run: pip install"):
        epsilon(noise_multiplier=1, num_steps=1, delta=1e-5)
    with pytest.raises(ImportError, match="accountant='prv' needs opacus; run: pip install"):
        epsilon(noise_multiplier=1, num_steps=1, delta=1e-5, accountant="prv")


def test_pld_is_what_the_librarys_accountant_gives() -> None:
    """The distribution of a step is kept here; the figures are those of PLDAccountant."""
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    theirs = PLDAccountant()
    ledger = Ledger()
    for noise, rate, steps in ((0.9, 0.02, 7), (1.3, 0.1, 3), (0.9, 0.02, 5)):
        event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
        theirs.compose(event, steps)
        ledger.add(Release(noise_multiplier=noise, num_steps=steps, sample_rate=rate, sampling="poisson"))
    # A pass over all records in three shuffled steps is one release.
    theirs.compose(dp_event.GaussianDpEvent(4.0), 2)
    ledger.add(Release(noise_multiplier=4.0, num_steps=6, sample_rate=1 / 3, sampling="shuffle"))
    for delta in (1e-5, 1e-3):
        assert ledger.epsilon(delta=delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-12)
