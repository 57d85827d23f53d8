"""Anchor, search and deploy on the real round engine: resume, faults, privacy, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_plugins.hpn.agent import HPN, make_searcher
from hf_plugins.hpn.client import APPLIED, HPNClient
from hf_plugins.hpn.gaussian import gaussian_epsilon
from hf_plugins.hpn.server import Federation, HPNRun, signed, summary
from hf_plugins.hpn.space import Categorical, Space
from hf_plugins.rounds import ClientFailed, InProcess
from tests.hf_plugins.hpn import tiny


def _run(folder: Path, federation: Federation | None = None, **options: Any) -> HPNRun:
    config = tiny.config(**options)
    return HPNRun(federation or tiny.federation(config), tiny.SPACE, config, folder, progress=False)


@pytest.mark.parametrize("method", ["hpn", "released", "uniform", "fedex", "random", "default"])
def test_every_method_searches_and_deploys(tmp_path: Path, method: str) -> None:
    run = _run(tmp_path, method=method)
    found = run.search()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(set(config) == set(tiny.SPACE.names) for config in found.values())
    if method in ("fedex", "random", "default"):
        assert len({json.dumps(config) for config in found.values()}) == 1
    written = json.loads((tmp_path / "search.json").read_text())
    assert {int(k): v for k, v in written["configs"].items()} == found
    # Equal budgets: anchor 4 + search 6 = 10 rounds; two whole runs of 4 fit into 10.
    assert written["rounds_used"] == {"random": 8, "default": 0}.get(method, 10)
    result = run.deploy(found)
    assert result["records"] == "test"
    assert 0.3 < result["personal"]["mean"] <= 1.0
    assert result["global"]["bottom_decile"] == min(c["global"] for c in result["clients"].values())
    assert {"config", "seed", "versions", "hardware"} <= set(
        json.loads((tmp_path / "deploy.json").read_text())
    )


def test_configs_in_force_equal_configs_sent_in_every_round(tmp_path: Path) -> None:
    run = _run(tmp_path)
    seen = []
    judge = run.judge

    def spy(plan: Any, outcome: Any) -> Any:
        seen.append((plan, outcome.context.updates))
        return judge(plan, outcome)

    run.judge = spy
    run.search()
    assert len(seen) == 6
    for plan, updates in seen:
        for client, config in plan.configs.items():
            applied = {
                k.removeprefix(APPLIED): v for k, v in updates[client].items() if k.startswith(APPLIED)
            }
            assert applied == config


def test_search_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole").search()
    stopped = _run(tmp_path / "stopped")

    def stop(row: dict[str, float]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    stopped.on_step = [stop]
    with pytest.raises(KeyboardInterrupt):
        stopped.search()
    again = _run(tmp_path / "stopped")
    assert again.search() == whole
    assert [row["step"] for row in again.history] == [1, 2, 3, 4, 5, 6]
    states = [torch.load(tmp_path / name / "search.pt") for name in ("whole", "stopped")]
    first, second = (state["searcher"]["policy"] for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_anchor_lost_between_checkpoint_and_file_is_written_again(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.anchor()
    last = tmp_path / "anchors" / "anchor_000004.pt"
    kept = run.anchors.get(4)
    last.unlink()
    again = _run(tmp_path)
    again.anchor()
    assert torch.equal(again.anchors.get(4), kept)


def test_anchor_indices(tmp_path: Path) -> None:
    """Anchor r is the model after r aggregations; its figures are the evaluation of that model, and the
    default config's round from it leads to anchor r + 1. Off by one is the classic porting fault."""
    run = _run(tmp_path)
    run.anchor()
    assert torch.equal(run.anchors.get(0), run.federation.initial_D)
    assert sorted(run.anchors.aggregate) == [0, 1, 2, 3, 4]
    assert sorted(run.anchors.local) == [0, 1, 2, 3]
    for r in range(4):
        assert run._figures(run._stepper.evaluate_clients(run.anchors.get(r))) == run.anchors.aggregate[r]


def test_paired_default_gains_nothing(tmp_path: Path) -> None:
    """The default config from anchor r on the round's own batches is the anchor run's next round, bit for
    bit, so its paired gain is exactly 0 for every client; both judged ways."""
    for judged in ("local", "aggregate"):
        run = _run(tmp_path / judged, judged=judged)
        run.anchor()
        searcher_row = dict.fromkeys(range(4))

        class _Default:
            row = searcher_row

            def ask(self, ids: list[int], **_: Any) -> torch.Tensor:
                return torch.zeros(len(ids), 4)

            def configs(self, ids: list[int], actions: torch.Tensor) -> dict:
                return {k: tiny.SPACE.default() for k in ids}

        for step in range(3):
            trial = run.run_step(run.begin(_Default(), step))
            assert trial.gains == dict.fromkeys(range(4), 0.0)


def test_released_reward_sees_all_clients_and_the_anchor(tmp_path: Path) -> None:
    run = _run(tmp_path, method="released")
    run.anchor()
    searcher = make_searcher(tiny.SPACE, run.config)
    searcher.enrol(run.encodings())
    plan = run.begin(searcher, 0)
    assert plan.start >= 1
    trial = run.run_step(plan)
    figures = run.anchors.aggregate[plan.start]
    assert trial.anchor == pytest.approx(
        sum(v * n for v, n in figures.values()) / sum(n for _, n in figures.values())
    )
    assert 0 < trial.end <= 1


class _Broken(HPNClient):
    """Dies in odd rounds, or returns NaN."""

    def __init__(self, inner: HPNClient, how: str) -> None:
        self.__dict__.update(inner.__dict__)
        self.how = how

    def train(self, weights: Any, job: Any) -> Any:
        if self.how == "dies" and job.config["learning_rate"] == 1.0:
            raise ClientFailed("out of battery")
        update = super().train(weights, job)
        if self.how == "nan" and job.config["learning_rate"] == 1.0:
            update.vector_D = update.vector_D * math.nan
        return update


@pytest.mark.parametrize("how", ["dies", "nan"])
def test_a_client_that_fails_drops_out_and_one_that_diverges_pays(tmp_path: Path, how: str) -> None:
    config = tiny.config(cohort_size=3)
    federation = tiny.federation(config)
    transport = federation.transport
    assert isinstance(transport, InProcess)
    transport.clients[2] = _Broken(transport.clients[2], how)
    run = HPNRun(federation, tiny.SPACE, config, tmp_path, progress=False)
    trials = []
    judge = run.judge
    run.judge = lambda plan, outcome: trials.append((plan, judge(plan, outcome))) or trials[-1][1]
    run.search()
    hit = [(p, t) for p, t in trials if 2 in p.configs and p.configs[2]["learning_rate"] == 1.0]
    assert hit
    for plan, trial in hit:
        assert len(plan.client_ids) == 3
        if how == "dies":
            assert sorted(trial.gains) == sorted(set(plan.client_ids) - {2})
        else:
            assert trial.gains[2] == -abs(run.anchors.local[plan.start][2][0])


def test_store_every_n_starts_only_there(tmp_path: Path) -> None:
    run = _run(tmp_path, store="every_n", store_every=2)
    run.search()
    assert sorted(p.name for p in (tmp_path / "anchors").glob("*")) == [
        f"anchor_{r:06d}.pt" for r in (0, 2, 4)
    ]
    starts = {run.begin(_AskNothing(), step).start for step in range(40)}
    assert starts == {0, 2}


class _AskNothing:
    row = dict.fromkeys(range(4))

    def ask(self, ids: list[int], **_: Any) -> None:
        return None

    def configs(self, ids: list[int], actions: None) -> dict:
        return {}


def test_search_stops_when_its_answer_is_stable(tmp_path: Path) -> None:
    run = _run(tmp_path, patience=2, num_steps=50, learning_rate=1e-9)
    run.search()
    assert len(run.history) == 3  # the first step sets the answer, two confirm it
    assert json.loads((tmp_path / "search.json").read_text())["rounds_used"] == 4 + 3


def test_deployment_is_a_function_of_the_saved_state(tmp_path: Path) -> None:
    found = _run(tmp_path / "a").search()
    first = _run(tmp_path / "b").deploy(found)
    second = _run(tmp_path / "c").deploy(found)
    assert first == second
    state = torch.load(tmp_path / "a" / "search.pt")["searcher"]
    copy = HPN(tiny.SPACE, tiny.config())
    copy.load_state_dict(state)
    assert copy.best() == found


def test_privacy_of_what_leaves(tmp_path: Path) -> None:
    """Encoding at epsilon 3. Values: 1 + 2 * 4 + 6 = 15 at multiplier 30 equal one at 30 / sqrt(15)."""
    run = _run(tmp_path, reward_noise_multiplier=30.0)
    run.search()
    privacy = json.loads((tmp_path / "search.json").read_text())["privacy"]
    assert privacy["epsilon_encoding"] == pytest.approx(3.0, abs=1e-6)
    assert privacy["num_values"] == 15
    assert privacy["epsilon_values"] == pytest.approx(gaussian_epsilon(30 / 15**0.5, delta=1e-5))
    assert _run(tmp_path / "plain")._privacy(6)["epsilon_values"] == "inf"


def test_small_summaries_by_hand() -> None:
    """Eleven clients: the worst tenth is two of them."""
    figures = {k: (k / 10, 5) for k in range(11)}
    assert summary(figures) == {"mean": pytest.approx(0.5), "bottom_decile": pytest.approx(0.05)}
    assert math.isnan(summary({})["mean"])
    assert signed(2.0, "loss") == -2.0
    assert signed(2.0, "accuracy") == 2.0


def test_what_is_refused(tmp_path: Path) -> None:
    config = tiny.config()
    colour = Space({"colour": Categorical(choices=(1,))})
    with pytest.raises(ValueError, match="no applier for colour"):
        HPNRun(tiny.federation(config), colour, config, tmp_path)
    records = tiny.parts(3)
    records[1] = (records[1][0], (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)), records[1][2])
    config = tiny.config()
    bare = HPNRun(
        tiny.federation(config, records=records), tiny.SPACE, config, tmp_path / "x", progress=False
    )
    with pytest.raises(
        ValueError, match=r"clients \[1\] have no validation records.*give\s+each client some"
    ):
        bare.search()
    _run(tmp_path / "y").search()
    with pytest.raises(ValueError, match="holds a run with other settings .*learning_rate"):
        _run(tmp_path / "y", learning_rate=0.5).search()


def test_tpe_needs_optuna_and_repeats_itself(tmp_path: Path) -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="method='tpe' needs optuna; run: pip install optuna"):
            _run(tmp_path, method="tpe").search()
        return
    assert _run(tmp_path / "a", method="tpe").search() == _run(tmp_path / "b", method="tpe").search()
