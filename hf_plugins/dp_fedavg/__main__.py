"""Command line: ``mmhf dp-fedavg run RECIPE | epsilon RECIPE | picture FOLDER``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_plugins import recipes
from hf_plugins.dp_fedavg.config import DPFedAvgConfig, RunConfig, parse_recipe
from hf_plugins.dp_fedavg.metric import KEPT, plot_kept, plot_rounds
from hf_plugins.dp_fedavg.trainer import PrivateMean, build_task, finish_run, recipe_engine
from hf_plugins.process_group import run_command
from hf_plugins.rounds.trackers import Reporter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmhf dp-fedavg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train from a recipe in one process; goes on where it stopped")
    run.add_argument("recipe", type=Path, help="YAML: fields of RunConfig, DPFedAvgConfig under dp, local")
    run.add_argument("--output-dir", help="instead of the recipe's")
    cost = commands.add_parser("epsilon", help="what a recipe spends, without training")
    cost.add_argument("recipe", type=Path, help="YAML recipe")
    cost.add_argument("--num-clients", type=int, help="users, where the data decide (characters)")
    drawn = commands.add_parser("picture", help="accuracy, epsilon, norms over rounds, and what LUS keeps")
    drawn.add_argument("folder", type=Path, help="output_dir of a run")
    return parser


def read_recipe(path: Path, **override: Any) -> tuple[RunConfig, DPFedAvgConfig, dict[str, Any]]:
    """A recipe's three parts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no mapping, or a key is unknown.
    """
    content = recipes.read_recipe(path)
    content |= {name: value for name, value in override.items() if value is not None}
    return parse_recipe(content)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    run, dp, local = read_recipe(args.recipe, output_dir=args.output_dir)
    reporter = Reporter(run.report_to, run.output_dir) if run.report_to else None
    task = build_task(run, local)
    engine = recipe_engine(task, run, dp, on_round=[reporter] if reporter else [])
    engine.run(run.num_rounds)
    if reporter:
        reporter.close()
    return finish_run(engine, task.model, run)


def _cost(args: argparse.Namespace) -> dict[str, Any]:
    run, dp, _ = read_recipe(args.recipe)
    private = PrivateMean(dp, num_clients=args.num_clients or run.num_clients, num_rounds=run.num_rounds)
    for _ in range(run.num_rounds):
        private.pay()
    return private.report()


def _picture(args: argparse.Namespace) -> dict[str, Any]:
    path = args.folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `mmhf dp-fedavg run RECIPE` first.")
    history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    written = [args.folder / "rounds.png"]
    plot_rounds({"run": [history]}, written[0], title=str(args.folder))
    if any(name.startswith(KEPT) for row in history for name in row):
        written.append(args.folder / "lus.png")
        plot_kept(history, written[1], title=str(args.folder))
    return {"written": [str(path) for path in written]}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints one JSON line.

    Returns:
        0 if all is well, 2 for wrong use.
    """
    args = _parser().parse_args(argv)
    try:
        done = {"run": _run, "epsilon": _cost, "picture": _picture}[args.command](args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"mmhf dp-fedavg: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    run_command(main)
