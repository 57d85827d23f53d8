"""Rounds per second and memory of the in-process engine, one by one and side by side, against a plain loop
and Flower's simulation, with 10, 100 and 1,000 clients of which 10 train in a round.

``python -m benchmarks.dp_fedavg`` measures each way in a process of its own and writes
``docs/results/dp_fedavg.json``; ``--short`` does a little and writes nothing.
"""

import argparse
import copy
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.record import spread, write_result
from hf_plugins.dp_fedavg.config import DPFedAvgConfig
from hf_plugins.dp_fedavg.hook import gradient_term
from hf_plugins.dp_fedavg.metric import record_loss
from hf_plugins.dp_fedavg.model import image_model
from hf_plugins.dp_fedavg.trainer import private_engine
from hf_plugins.rounds import InProcess, LazyClients, LocalTraining, TorchClient

ROOT = Path(__file__).resolve().parent.parent
PER_ROUND, RECORDS, BATCH = 10, 40, 10
# Seconds for one way with one number of clients.
LIMIT = 300
Seconds = tuple[float, float]
WAYS = (
    "plain loop",
    "engine, averaging only",
    "engine",
    "engine, side by side",
    "flower simulation",
)


def records(client_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's images: random, as only time is measured."""
    generator = torch.Generator().manual_seed(client_id)
    images = torch.randn(RECORDS, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (RECORDS,), generator=generator)


def network() -> nn.Module:
    """The recipe's network."""
    torch.manual_seed(0)
    return image_model("mlp", num_classes=10, size=28)


def client(client_id: int) -> TorchClient:
    """Two epochs of plain SGD: 8 steps."""
    training = LocalTraining(learning_rate=0.05, num_epochs=2, batch_size=BATCH)
    return TorchClient(
        client_id, records(client_id), loss=record_loss, training=training, terms=[gradient_term]
    )


def options(num_clients: int, *, averaging_only: bool = False) -> DPFedAvgConfig:
    """BLUR and LUS on unless only averaged; exactly ten clients a round, so that each way trains the same."""
    method = {"noise_multiplier": 2.0, "keep_ratio": 0.5}
    if averaging_only:
        method = {"noise_multiplier": 0.0, "keep_ratio": 1.0, "blur": 0.0, "clipping_norm": math.inf}
    return DPFedAvgConfig(sampling="fixed", cohort_size=min(PER_ROUND, num_clients), seed=0, **method)


def clock() -> Seconds:
    """Wall and CPU time."""
    return time.perf_counter(), time.process_time()


def since(began: Seconds) -> Seconds:
    """Wall and CPU time that has passed."""
    return time.perf_counter() - began[0], time.process_time() - began[1]


def plain_loop(num_clients: int, num_rounds: int) -> list[Seconds]:
    """What a script does: a copy of the model for each client, all data in memory, an average of states."""
    data = [records(i) for i in range(num_clients)]
    model, times = network(), []
    for number in range(num_rounds):
        began = clock()
        generator = torch.Generator().manual_seed(number)
        states = []
        for i in torch.randperm(num_clients, generator=generator)[:PER_ROUND].tolist():
            local = copy.deepcopy(model)
            optimizer = torch.optim.SGD(local.parameters(), lr=0.05)
            for _ in range(2):
                for rows in torch.randperm(RECORDS, generator=generator).split(BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(local(data[i][0][rows]), data[i][1][rows]).backward()
                    optimizer.step()
            states.append(local.state_dict())
        model.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
        times.append(since(began))
    return times


def in_process(num_clients: int, num_rounds: int, way: str) -> list[Seconds]:
    """The engine with clipping, noise, BLUR and LUS; no checkpoints, as the others write none."""
    engine = private_engine(
        network(),
        LazyClients(num_clients, client),
        options(num_clients, averaging_only="only" in way),
        num_rounds=num_rounds,
        group_size=PER_ROUND if "side" in way else 1,
        evaluate_every=10**6,
        progress=False,
    )
    times = []
    for number in range(num_rounds):
        began = clock()
        engine.vector_D = engine.step(engine.vector_D, number).vector_D
        times.append(since(began))
    return times


def flower(num_clients: int, num_rounds: int) -> list[Seconds]:
    """The same through Flower's simulation engine: two simulated nodes that hold the clients."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from hf_plugins.dp_fedavg.client import user_level_mod
    from hf_plugins.dp_fedavg.strategy import UserLevelDP
    from hf_plugins.rounds.flower import Population, hosted_share, round_client_app

    def populate(context: Context) -> Population:
        clients = LazyClients(num_clients, client)
        return Population(transport=InProcess(network(), clients), hosted=hosted_share(context, num_clients))

    server, times = ServerApp(), []

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = UserLevelDP(
            network(), options(num_clients), num_clients=num_clients, num_rounds=num_rounds, num_nodes=2
        )
        strategy._connect(grid)
        engine = strategy.engine
        for number in range(num_rounds):
            began = clock()
            engine.vector_D = engine.step(engine.vector_D, number).vector_D
            times.append(since(began))

    run_simulation(
        server_app=server,
        client_app=round_client_app(populate, mods=[user_level_mod]),
        num_supernodes=2,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
    )
    return times


def measure(way: str, num_clients: int, num_rounds: int) -> dict[str, Any]:
    """One way in this process: seconds of each round, CPU seconds, largest memory."""
    torch.set_num_threads(1)
    if way == "plain loop":
        times = plain_loop(num_clients, num_rounds)
    elif way == "flower simulation":
        times = flower(num_clients, num_rounds)
    else:
        times = in_process(num_clients, num_rounds, way)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # The first round warms up caches, imports and workers.
    return {
        "seconds": [wall for wall, _ in times[1:]],
        "cpu_seconds": [cpu for _, cpu in times[1:]],
        "peak_mb": peak,
    }


def _apart(way: str, num_clients: int, num_rounds: int) -> dict[str, Any]:
    """`measure` in a process of its own, ended with its workers if it does not come to an end."""
    words = [sys.executable, "-m", "benchmarks.dp_fedavg", "--one", way]
    words += ["--clients", str(num_clients), "--rounds", str(num_rounds)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise RuntimeError(f"{way} with {num_clients} clients did not end within {LIMIT} s") from None
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{way} with {num_clients} clients failed: {errors.read()[-2000:]}")
    return json.loads(output.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all ways in turns, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="engine and plain loop, 10 clients, 3 rounds")
    parser.add_argument("--one", choices=WAYS, help="measure one way in this process")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.clients, args.rounds)))
        return 0
    if args.short:
        print(json.dumps({way: measure(way, 10, 3) for way in WAYS[:4]}))
        return 0
    found: dict[str, dict[str, Any]] = {}
    for num_clients in (10, 100, 1000):
        for way in WAYS:
            rounds = 6 if way == "flower simulation" else args.rounds
            found[f"{way}, {num_clients}"] = one = _apart(way, num_clients, rounds)
            print(way, num_clients, one["peak_mb"], file=sys.stderr, flush=True)
    rows = []
    for num_clients in (10, 100, 1000):
        for way in WAYS:
            one = found[f"{way}, {num_clients}"]
            base = statistics.median(found[f"plain loop, {num_clients}"]["seconds"])
            rows.append(
                [
                    num_clients,
                    way,
                    spread([1 / s for s in one["seconds"]]),
                    spread([base / s for s in one["seconds"]]),
                    "" if "flower" in way else spread([1e3 * s for s in one["cpu_seconds"]]),
                    f"{one['peak_mb']:.0f}",
                ]
            )
    write_result(
        "dp_fedavg",
        command="python -m benchmarks.dp_fedavg",
        config={"per_round": PER_ROUND, "records": RECORDS, "batch_size": BATCH, "epochs": 2, "model": "mlp"},
        seeds=[0],
        packages=("flwr", "ray"),
        columns=[
            "clients",
            "way",
            "rounds per second",
            "speed next to the plain loop",
            "CPU ms of a round",
            "peak memory (MB)",
        ],
        rows=rows,
        notes=[
            "Ten clients train in a round, 8 steps each; median (smallest-largest) over rounds "
            "without the first. The engine clips, adds noise and runs BLUR and LUS, except where it only "
            "averages as the plain loop does.",
            "Memory is that of the driving process. Flower's workers are processes besides it, so its CPU "
            "time is not shown.",
            "Other work ran on the machine; the ratio is more telling than the rate.",
        ],
        details=found,
    )
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
