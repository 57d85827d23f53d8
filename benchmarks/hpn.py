"""HPN against its rivals at equal total rounds: a synthetic task with known personal optima, and real digits.

``python -m benchmarks.hpn`` measures all seeds and writes two tables; a finished run of one method and seed
is kept in ``work_dirs/hpn_benchmark`` and not repeated. ``--short`` runs one seed with few steps and writes
nothing. ``--cost`` measures what a step costs on top of the round engine's own round.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import spread, write_result
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.dataset import images, synthetic
from hf_plugins.hpn.server import Federation, HPNRun
from hf_plugins.hpn.space import space_from
from hf_plugins.rounds import InProcess, RoundEngine
from tools.real_data import data_set

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "work_dirs" / "hpn_benchmark"
SEEDS = (0, 1, 2)

METHODS: dict[str, dict[str, Any]] = {
    "default config": {"method": "default"},
    "random search": {"method": "random"},
    "Optuna TPE": {"method": "tpe"},
    "FedEx, from anchors": {"method": "fedex"},
    "HPN as released": {"method": "released"},
    "uniform search + regression": {"method": "uniform"},
    "HPN, policy's mode": {"method": "hpn", "surrogate": False},
    "HPN": {"method": "hpn"},
}
_choices = {"type": "categorical"}
TASKS: dict[str, dict[str, Any]] = {
    "synthetic": {
        "make": synthetic,
        "args": {"num_clients": 10},
        "space": {
            "learning_rate": {**_choices, "choices": [0.25, 0.5, 1.0, 2.0, 4.0], "default": 0.25},
            "weight_decay": {**_choices, "choices": [0.0, 0.1, 0.3]},
        },
        "options": {"num_rounds": 10, "num_steps": 200, "encoding_epsilon": 3.0},
    },
    "digits": {
        "make": images,
        "args": {
            "num_clients": 10,
            "alpha": 0.5,
            "limit": 2000,
            "contrast": (0.3, 1.0, 3.0),
            "label_noise": 0.6,
            "noisy_share": 0.3,
        },
        "space": {
            "learning_rate": {**_choices, "choices": [0.01, 0.03, 0.1, 0.3, 1.0], "default": 0.1},
            "num_steps": {**_choices, "choices": [1, 4, 16], "default": 4},
            "dropout": {**_choices, "choices": [0.0, 0.2, 0.5]},
            "weight_decay": {**_choices, "choices": [0.0, 0.001, 0.03]},
        },
        "options": {
            "num_rounds": 10,
            "num_steps": 100,
            "encoder": "rff-median",
            "num_features": 8,
            "encoding_epsilon": 3.0,
        },
    },
}


def _federation(task: str, config: HPNConfig) -> Federation:
    args = dict(TASKS[task]["args"])
    if task == "digits":
        args["folder"] = str(data_set("mnist"))
    return TASKS[task]["make"](config=config, **args)


def run_one(task: str, name: str, seed: int, folder: Path, **more: Any) -> dict[str, Any]:
    """One method on one task with one seed; a finished one is read back."""
    done = folder / "figures.json"
    if done.is_file():
        return json.loads(done.read_text())
    # Patience off: every method is to use its whole budget.
    config = HPNConfig(**{**TASKS[task]["options"], "seed": seed, "patience": 0, **METHODS[name], **more})
    federation = _federation(task, config)
    run = HPNRun(federation, space_from(TASKS[task]["space"]), config, folder, progress=False)
    began = time.process_time()
    found = run.search()
    searched = time.process_time() - began
    result = run.deploy(found)
    best = federation.known_best
    figures = {
        "global": result["global"],
        "personal": result["personal"],
        "rounds": json.loads((folder / "search.json").read_text())["rounds_used"],
        "cpu_seconds_of_search": searched,
        "configs": {str(k): v for k, v in found.items()},
    }
    if best:
        figures["right_rate"] = sum(
            found[k]["learning_rate"] == best[k]["learning_rate"] for k in best
        ) / len(best)
    if config.method == "released":
        # The policy after its search: how far any probability is from uniform.
        state = torch.load(folder / "search.pt", weights_only=True)
        from hf_plugins.hpn.agent import make_searcher

        searcher = make_searcher(run.space, config)
        searcher.load_state_dict(state["searcher"])
        figures["largest_departure_from_uniform"] = max(
            float((p - 1 / p.shape[1]).abs().max()) for p in searcher.output().probabilities()
        )
    done.write_text(json.dumps(figures))
    return figures


def _known(name: str) -> bool:
    if METHODS[name]["method"] != "tpe":
        return True
    import importlib.util

    return importlib.util.find_spec("optuna") is not None


def quality(task: str, seeds: tuple[int, ...], folder: Path, **more: Any) -> list[list[Any]]:
    """Rows of the table: every method over the seeds."""
    rows = []
    for name in METHODS:
        if not _known(name):
            print(f"{name}: optuna is not installed, left out", file=sys.stderr)
            continue
        runs = []
        for seed in seeds:
            label = name.replace(" ", "_").replace("'", "").replace(",", "").replace("+", "and")
            runs.append(run_one(task, name, seed, folder / task / label / str(seed), **more))
            print(
                json.dumps({"task": task, "method": name, "seed": seed, **runs[-1]["personal"]}), flush=True
            )

        def over(pick: Callable[[dict[str, Any]], float], runs: list[dict[str, Any]] = runs) -> str:
            return spread([100 * pick(run) for run in runs])

        row = [
            name,
            runs[0]["rounds"],
            over(lambda r: r["personal"]["mean"]),
            over(lambda r: r["personal"]["bottom_decile"]),
            over(lambda r: r["global"]["mean"]),
            over(lambda r: r["global"]["bottom_decile"]),
        ]
        if "right_rate" in runs[0]:
            row.append(over(lambda r: r["right_rate"]))
        rows.append(row)
    return rows


def _details(task: str, folder: Path) -> dict[str, Any]:
    return {
        str(path.parent.relative_to(folder / task)): json.loads(path.read_text())
        for path in sorted((folder / task).rglob("figures.json"))
    }


def write_quality(task: str, folder: Path, rows: list[list[Any]]) -> None:
    """The table of one task."""
    columns = [
        "method",
        "rounds of the search",
        "personal, mean",
        "personal, worst tenth",
        "global model, mean",
        "global model, worst tenth",
    ]
    details = _details(task, folder)
    departure = max(
        run["largest_departure_from_uniform"]
        for run in details.values()
        if "largest_departure_from_uniform" in run
    )
    notes = [
        "Test figures in per cent, median (smallest-largest) over seeds. Personal: a client's model after "
        "one more local round; global: the deployed average on each client's test records; worst tenth: mean "
        "over the clients in it.",
        f"HPN as released: after its search no probability is further than {departure:.1g} from uniform.",
    ]
    if task == "synthetic":
        columns.append("right learning rate")
        notes.append("The figure is 1 - relative squared error; the right rate is 1 / the client's scale.")
    else:
        notes.append(
            "2,000 digits over 10 clients (Dirichlet 0.5; 120 training, 40 validation, 40 test each), three "
            "contrasts, three of the clients with 60 % wrong training labels; a network of 784-32-10."
        )
    write_result(
        f"hpn_{task}",
        command="python -m benchmarks.hpn",
        config={k: v for k, v in TASKS[task].items() if k != "make"} | {"methods": METHODS},
        seeds=SEEDS,
        packages=("numpy",),
        columns=columns,
        rows=rows,
        notes=notes,
        details=details,
    )


def cost(counts: tuple[int, ...], most_steps: int) -> list[list[Any]]:
    """CPU time of a search step against the engine's bare round with the same clients and configs."""
    rows = []
    for count in counts:
        steps = max(3, min(most_steps, 1000 // count))
        options = {"num_rounds": 1, "num_steps": steps + 1, "patience": 0, "encoding_epsilon": None}
        config = HPNConfig(**options)
        federation = synthetic(config=config, num_clients=count)
        space = space_from(TASKS["synthetic"]["space"])
        from tempfile import TemporaryDirectory

        from hf_plugins.hpn.agent import make_searcher

        with TemporaryDirectory() as folder:
            run = HPNRun(federation, space, config, folder, progress=False)
            run.anchor()
            searcher = make_searcher(space, config)
            searcher.enrol(run.encodings())
            inner = InProcess(
                federation.transport.weights.model, [c.inner for c in federation.transport.clients]
            )
            bare = RoundEngine(inner, federation.initial_D, progress=False)
            ours, plain = [], []
            for step in range(steps):
                began = time.process_time()
                plan = run.begin(searcher, step)
                searcher.tell(run.run_step(plan))
                ours.append(time.process_time() - began)
                began = time.process_time()
                bare.step(
                    federation.initial_D, 0, configure=lambda context, client, plan=plan: plan.configs[client]
                )
                bare.evaluate_clients(federation.initial_D)
                plain.append(time.process_time() - began)
        ratio = [a / b for a, b in zip(ours, plain, strict=True)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(
            [
                count,
                spread([1e3 * t for t in plain]),
                spread([1e3 * t for t in ours]),
                spread(ratio),
                f"{1 / statistics.median(ours):.3g}",
                f"{peak:.0f}",
            ]
        )
        print(json.dumps({"clients": count, "ratio": statistics.median(ratio)}), flush=True)
    return rows


def main() -> int:
    """Measure; with ``--short`` only show that it runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--cost", action="store_true", help="only what a step costs")
    parser.add_argument("--task", choices=tuple(TASKS), help="only this task")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="only run this seed, and write no table yet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            quality("synthetic", (0,), Path(folder), num_steps=15, num_rounds=3)
        cost((10,), 3)
        return 0
    if options.cost:
        write_result(
            "hpn_cost",
            command="python -m benchmarks.hpn --cost",
            config={"task": "synthetic", "pairs": {"10": 10, "100": 10, "1000": 3}},
            seeds=[0],
            packages=("numpy",),
            columns=(
                "clients",
                "bare round, CPU ms",
                "search step, CPU ms",
                "step / round",
                "steps a second (CPU)",
                "peak memory of the process, MiB",
            ),
            rows=cost((10, 100, 1000), 10),
            notes=[
                "A bare round is one training and one evaluation of every client by the round engine alone; "
                "a search step also proposes, applies and reads back every config, and updates the policy. "
                "Median (smallest-largest) of 10 pairs taken in turn (3 with 1,000 clients), one thread.",
            ],
        )
        return 0
    for task in [options.task] if options.task else list(TASKS):
        if options.seed is not None:
            quality(task, (options.seed,), WORK)
            continue
        write_quality(task, WORK, quality(task, SEEDS, WORK))
    return 0


if __name__ == "__main__":
    sys.exit(main())
