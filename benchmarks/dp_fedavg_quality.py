"""Accuracy of five methods at one true epsilon: DP-FedAvg, FedProx, + BLUR, + LUS, + both; and controls.

``python -m benchmarks.dp_fedavg_quality --task mnist`` runs what is not yet done (an interrupted benchmark
goes on) and writes table and plot. Each method's own setting (S, lambda, keep, mu) is the best of a small
grid on a seed that is not reported, in which DP-FedAvg has the most settings. Controls: LUS with a random
mask, and FedAvg without clipping and noise.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import write_result
from hf_plugins.accounting import noise_multiplier_for
from hf_plugins.dp_fedavg.config import DPFedAvgConfig, RunConfig
from hf_plugins.dp_fedavg.dataset import find_file
from hf_plugins.dp_fedavg.hook import gradient_term
from hf_plugins.dp_fedavg.metric import TestAccuracy, plot_rounds, record_loss
from hf_plugins.dp_fedavg.trainer import Task, build_task, private_engine
from hf_plugins.rounds import LazyClients, LocalTraining, TorchClient, TrainableVector, dirichlet_split
from hf_plugins.whole_files import write_json
from tools.real_data import data_set, minilm

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "work_dirs" / "benchmarks" / "dp_fedavg_quality"
PILOT_SEED = 100
SEEDS = (0, 1, 2)
METHODS = ("DP-FedAvg", "FedProx", "DP-FedAvg + BLUR", "DP-FedAvg + LUS", "DP-FedAvg + BLUR + LUS")
RANDOM = "DP-FedAvg + random mask"
PLAIN = "FedAvg, no privacy"
# What a clipping norm of no effect is: larger than any update.
UNBOUNDED = 1e6


@dataclasses.dataclass(kw_only=True)
class Setting:
    """One task: recipe without the method, the norms that the grid tries, the budget."""

    run: dict[str, Any]
    local: dict[str, Any]
    norms: tuple[float, ...]
    sample_rate: float
    plain_norms: tuple[float, ...]
    group_size: int = 1
    epsilon: float = 4.0
    strengths: tuple[float, ...] = (4.0,)
    keeps: tuple[float, ...] = (0.1,)
    proximal: tuple[float, ...] = (1.0,)


def setting(task: str) -> Setting:
    """Small but real: what fits a few minutes on one core."""
    if task == "mnist":
        return Setting(
            run={
                "task": "images",
                "data": str(data_set("mnist")),
                "model": "mlp",
                "num_clients": 1000,
                "alpha": 0.1,
                "num_rounds": 25,
                "max_records": 60,
                "max_test_records": 2000,
            },
            local={"learning_rate": 0.2, "num_epochs": 5, "batch_size": 20},
            norms=(0.3, 0.6, 0.9, 1.5),
            plain_norms=(0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0),
            sample_rate=0.1,
            group_size=25,
            strengths=(0.4, 1.0, 4.0),
            keeps=(0.3, 0.6, 0.9),
            proximal=(0.01, 0.1, 1.0),
        )
    if task == "shakespeare":
        return Setting(
            run={
                "task": "characters",
                "data": str(data_set("federated_shakespeare")),
                "model": "gru",
                "num_rounds": 6,
                "max_length": 32,
                "max_records": 32,
                "max_test_records": 400,
            },
            local={"learning_rate": 2.0, "num_epochs": 3, "batch_size": 16},
            norms=(0.3, 1.0),
            plain_norms=(0.3, 1.0),
            sample_rate=0.3,
            # Steps of gradient descent on the penalty diverge above 2 / learning rate.
            strengths=(0.4,),
            keeps=(0.5,),
            proximal=(0.1,),
        )
    return Setting(
        run={
            "task": "text",
            "data": str(data_set("banking77")),
            "model": str(minilm()),
            "num_clients": 1000,
            "alpha": 0.1,
            "num_rounds": 30,
            "max_length": 32,
        },
        local={"learning_rate": 4.0, "num_epochs": 5, "batch_size": 10},
        norms=(0.6, 1.0, 2.0, 4.0, 6.0, 8.0),
        plain_norms=(0.3, 0.6, 0.8, 1, 1.4, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 10, 12),
        sample_rate=0.1,
        group_size=25,
        # Below 2 / learning rate, as above.
        strengths=(0.02, 0.1, 0.4),
        keeps=(0.3, 0.6, 0.9),
        proximal=(0.005, 0.02, 0.1),
    )


def features(texts: Sequence[str], model: str, max_length: int) -> torch.Tensor:
    """Sentence embeddings of the public encoder, norm 1: mean over tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    # Texts of like length side by side need little padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), encoder.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(order), 128):
            rows = order[start : start + 128]
            batch = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][:, :, None]
            found[rows] = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(found, dim=1)


def head_task(base: Setting) -> Task:
    """Users of intents; the encoder is public and frozen, a linear head on its features is trained."""
    from hf_plugins.dp_fedavg.peft import read_rows

    folder, run = Path(base.run["data"]), base.run
    rows = [read_rows(find_file(folder, f"{part}*.jsonl*")) for part in ("train", "test")]
    kept = WORK / "banking77_features.pt"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        texts = [[row["text"] for row in part] for part in rows]
        torch.save([features(part, run["model"], run["max_length"]) for part in texts], kept)
    (train_x, test_x), (train_y, test_y) = (
        torch.load(kept, weights_only=True),
        [torch.tensor([int(row["label"]) for row in part]) for part in rows],
    )
    owners = dirichlet_split(train_y.tolist(), run["num_clients"], alpha=run["alpha"], seed=0)
    model = nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    training = LocalTraining().with_config(base.local)

    def client(number: int) -> TorchClient:
        mine = torch.as_tensor(owners[number])
        records = (train_x[mine], train_y[mine])
        return TorchClient(number, records, loss=record_loss, training=training, terms=[gradient_term])

    evaluate = TestAccuracy(TrainableVector(model), (test_x, test_y))
    return Task(model=model, clients=LazyClients(len(owners), client), evaluate=evaluate)


def options(method: str, chosen: dict[str, float]) -> dict[str, Any]:
    """The method's part of `DPFedAvgConfig`."""
    return {
        "clipping_norm": chosen["clipping_norm"],
        "blur": chosen.get("blur", 0.0),
        "keep_ratio": chosen.get("keep_ratio", 1.0),
        "proximal": chosen.get("proximal", 0.0),
        "lus_score": "random" if method == RANDOM else "utility",
    }


@functools.cache
def _calibrated(epsilon: float, sample_rate: float, num_rounds: int, delta: float) -> float:
    return noise_multiplier_for(
        target_epsilon=epsilon, sample_rate=sample_rate, num_steps=num_rounds, delta=delta, sampling="poisson"
    )


def _noise(base: Setting, num_clients: int) -> float:
    """The noise multiplier that every method of a task gets; computed once, as it takes seconds."""
    delta = DPFedAvgConfig(noise_multiplier=1.0).delta_for(num_clients)
    return _calibrated(base.epsilon, base.sample_rate, base.run["num_rounds"], delta)


_FIRST: dict[int, torch.Tensor] = {}


def _reset(task: Task) -> None:
    """Put the task's first weights back into its model."""
    weights = TrainableVector(task.model)
    weights.write_(_FIRST.setdefault(id(task), weights.read()))


def _folder(name: str, base: Setting) -> Path:
    """Where runs of this task are kept: under what all of them share, so that another setting starts anew."""
    shared = [base.run, base.local, base.sample_rate, base.epsilon]
    return WORK / name / hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def one_run(
    task: Task, name: str, base: Setting, method: str, chosen: dict[str, float], seed: int, *, noise: bool
) -> dict[str, Any]:
    """Train once, or read what an earlier call has trained."""
    key = "_".join(f"{k}{v:g}" for k, v in sorted(chosen.items()))
    label = method.replace(" ", "").replace("+", "_")
    path = _folder(name, base) / f"{label}_{key}_{'dp' if noise else 'plain'}_{seed}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    dp = DPFedAvgConfig(
        noise_multiplier=_noise(base, len(task.clients)) if noise else 0.0,
        sample_rate=base.sample_rate,
        seed=seed,
        log_private_statistics=True,
        **options(method, chosen),
    )
    # The resident model holds the weights of the last run that was tested: each run begins at the same ones.
    _reset(task)
    began, wall = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = private_engine(
            task.model,
            task.clients,
            dp,
            num_rounds=base.run["num_rounds"],
            evaluate=task.evaluate,
            evaluate_every=5,
            folder=folder,
            group_size=base.group_size,
            save_every=1000,
            progress=False,
        )
        engine.run(base.run["num_rounds"])
        report = engine.aggregate.report()
    result = {
        "method": method,
        "chosen": chosen,
        "seed": seed,
        "noise": noise,
        "report": report,
        "history": engine.history,
        "accuracy": engine.history[-1]["test/accuracy"],
        "cpu_seconds": time.process_time() - began,
        "wall_seconds": time.perf_counter() - wall,
    }
    write_json(path, result)
    print(
        f"{method} {chosen} seed {seed}: {result['accuracy']:.4f} ({result['cpu_seconds']:.0f} s)", flush=True
    )
    return result


def choose(task: Task, name: str, base: Setting) -> dict[str, dict[str, float]]:
    """Each method's setting: the best on the pilot seed. S is chosen for each method by itself."""
    picked: dict[str, dict[str, float]] = {}
    for method in METHODS:
        extra: list[dict[str, float]] = [{}]
        if method == "FedProx":
            extra = [{"proximal": mu} for mu in base.proximal]
        elif method == "DP-FedAvg + BLUR":
            extra = [{"blur": strength} for strength in base.strengths]
        elif method == "DP-FedAvg + LUS":
            extra = [{"keep_ratio": keep} for keep in base.keeps]
        elif method == "DP-FedAvg + BLUR + LUS":
            strength = picked["DP-FedAvg + BLUR"]["blur"]
            extra = [{"blur": strength, "keep_ratio": keep} for keep in base.keeps]
        tried = [
            (
                one_run(task, name, base, method, {"clipping_norm": norm, **more}, PILOT_SEED, noise=True),
                norm,
                more,
            )
            for norm in (base.norms if extra[0] else base.plain_norms)
            for more in extra
        ]
        _, norm, more = max(tried, key=lambda item: item[0]["accuracy"])
        picked[method] = {"clipping_norm": norm, **more}
    return picked


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.mean(statistics.mean(r[name] for r in row["history"] if name in r) for row in rows)


def _row(method: str, chosen: dict[str, float], found: Sequence[dict[str, Any]], clipping: str) -> list[Any]:
    accuracies = [row["accuracy"] for row in found]
    private = bool(found[0]["noise"])
    names = {"clipping_norm": "S", "proximal": "mu", "blur": "lambda", "keep_ratio": "keep"}
    return [
        method,
        ", ".join(f"{names[k]} {v:g}" for k, v in chosen.items()) if private else "",
        f"{statistics.mean(accuracies):.4f} +- {statistics.stdev(accuracies):.4f}",
        clipping,
        f"{found[0]['report']['epsilon']:.3f}" if private else "infinite",
        f"{_mean(found, 'dp_fedavg/private/clipped_ratio'):.2f}" if private else "0",
        f"{_mean(found, 'dp_fedavg/private/norm_median'):.2f}",
    ]


def report(
    name: str, base: Setting, picked: dict[str, dict[str, float]], seeds: Sequence[int], task: Task
) -> None:
    """Write the table and the plots."""
    rows, runs = [], {}
    settings = {**picked, RANDOM: picked["DP-FedAvg + LUS"]}
    for method, chosen in settings.items():
        found = [one_run(task, name, base, method, chosen, seed, noise=True) for seed in seeds]
        clipping = ""
        if method in (METHODS[0], METHODS[-1]):
            quiet = one_run(task, name, base, method, chosen, seeds[0], noise=False)
            clipping = f"{quiet['accuracy']:.4f}"
        rows.append(_row(method, chosen, found, clipping))
        runs[method] = [row["history"] for row in found]
        guarantee = found[0]["report"]
    unbounded = {"clipping_norm": UNBOUNDED}
    plain = [one_run(task, name, base, PLAIN, unbounded, seed, noise=False) for seed in seeds]
    rows.append(_row(PLAIN, unbounded, plain, ""))
    # Only its accuracy belongs into the plot: it has no epsilon and no S.
    runs[PLAIN] = [
        [{k: v for k, v in row.items() if "dp_fedavg" not in k} for row in found["history"]]
        for found in plain
    ]
    write_result(
        f"dp_fedavg_{name}",
        command=f"python -m benchmarks.dp_fedavg_quality --task {name}",
        config={
            "run": {**base.run, "data": name, "model": Path(str(base.run["model"])).name},
            "local": base.local,
            "grid": {k: getattr(base, k) for k in ("norms", "plain_norms", "strengths", "keeps", "proximal")},
        },
        seeds=seeds,
        packages=("dp-accounting",),
        columns=[
            "method",
            "setting",
            "test accuracy",
            "the same without noise, one seed",
            "epsilon",
            "share clipped",
            "median norm",
        ],
        rows=rows,
        notes=[
            f"{guarantee['users']} users, Poisson sampling {base.sample_rate:g}, "
            f"{base.run['num_rounds']} rounds, noise multiplier {guarantee['noise_multiplier']:.3f}, "
            f"delta {guarantee['delta']:.2g}; mean +- standard deviation over seeds. Each method's setting "
            f"is the best of its grid on seed {PILOT_SEED}: S of {_said(base.norms)} "
            f"(DP-FedAvg: {_said(base.plain_norms)})"
            f"; lambda {_said(base.strengths)}, share kept {_said(base.keeps)}, mu {_said(base.proximal)}; "
            "random mask: LUS's setting. "
            "The search is not in epsilon.",
            "Norm before clipping (after LUS) and share of users clipped are means over rounds.",
        ],
        details={
            "runs": {m: [r[-1] for r in h] for m, h in runs.items()},
            "pilot": _pilots(_folder(name, base)),
        },
    )
    plot_rounds(runs, ROOT / "docs" / "results" / f"dp_fedavg_{name}.svg", title=name)


def _said(values: Sequence[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)


def _pilots(folder: Path) -> dict[str, float]:
    """Accuracy of every setting that was tried on the pilot seed."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*_{PILOT_SEED}.json"))]
    return {f"{one['method']} {one['chosen']}": one["accuracy"] for one in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("mnist", "shakespeare", "banking77"), default="mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--pilot-only", action="store_true", help="only choose the settings")
    parser.add_argument(
        "--short", action="store_true", help="one run, twice, on the tiny set in the repository"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.short:
        return _short()
    base = setting(args.task)
    if args.task == "banking77":
        task = head_task(base)
    else:
        with tempfile.TemporaryDirectory() as folder:
            task = build_task(RunConfig(**base.run, output_dir=folder), base.local)
    picked = choose(task, args.task, base)
    print(json.dumps({"task": args.task, "chosen": picked}), flush=True)
    if not args.pilot_only:
        report(args.task, base, picked, args.seeds, task)
    return 0


def _short() -> int:
    """The same run twice from one task: equal, because the second one begins where the first one began."""
    global WORK
    base = dataclasses.replace(setting_tiny(), epsilon=50.0)
    with tempfile.TemporaryDirectory() as folder:
        task = build_task(RunConfig(**base.run, output_dir=folder), base.local)
        chosen = {"clipping_norm": 1.0, "blur": 0.4, "keep_ratio": 0.5}
        done = []
        for part in ("first", "second"):
            WORK = Path(folder) / part
            done.append(one_run(task, "tiny", base, METHODS[-1], chosen, 0, noise=True))
    if done[0]["accuracy"] != done[1]["accuracy"]:
        raise RuntimeError(f"one seed gave {done[0]['accuracy']} and then {done[1]['accuracy']}")
    print(json.dumps({"accuracy": done[0]["accuracy"], **done[0]["report"]}))
    return 0


def setting_tiny() -> Setting:
    """The images in the repository."""
    return Setting(
        run={
            "task": "images",
            "data": str(ROOT / "tests" / "data" / "fashion_mnist_tiny"),
            "model": "mlp",
            "num_clients": 20,
            "num_rounds": 5,
        },
        local={"learning_rate": 0.05, "batch_size": 5},
        norms=(1.0,),
        plain_norms=(1.0,),
        sample_rate=0.5,
    )


if __name__ == "__main__":
    sys.exit(main())
