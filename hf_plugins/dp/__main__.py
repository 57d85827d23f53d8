"""Command line: ``mmhf dp epsilon | noise | audit | run``."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from transformers import HfArgumentParser, TrainingArguments

from hf_plugins.accounting import AccountantName, Sampling, epsilon, noise_multiplier_for
from hf_plugins.dp.config import DPConfig, RunConfig
from hf_plugins.dp.metric import TrainerAudit, audit_file, audit_trainer
from hf_plugins.dp.peft import recipe_trainer
from hf_plugins.process_group import run_command
from hf_plugins.recipes import read_recipe


def _sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--num-steps", type=int, required=True, help="optimizer steps")
    add("--delta", type=float, required=True, help="below 1 / number of records")
    add("--sampling", choices=get_args(Sampling), default="poisson", help="how records come into a step")
    add(
        "--sample-rate",
        type=float,
        default=1.0,
        help="expected batch / records (poisson), 1 / steps an epoch",
    )
    add("--batch-size", type=int, default=0, help="records in a step (fixed sampling)")
    add("--num-records", type=int, default=0, help="records in all (fixed sampling)")
    add("--accountant", choices=get_args(AccountantName), default="auto", help="default: pld; rdp if fixed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmhf dp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    spent = commands.add_parser("epsilon", help="epsilon that a run spends")
    spent.add_argument("--noise-multiplier", type=float, required=True, help="noise over clipping norm")
    _sampling(spent)
    noise = commands.add_parser("noise", help="smallest noise that keeps a budget")
    noise.add_argument("--target-epsilon", type=float, required=True, help="the budget")
    _sampling(noise)
    audit = commands.add_parser("audit", help="lower bound on epsilon from one training run on canaries")
    audit.add_argument("--noise-multiplier", type=float, default=1.0)
    audit.add_argument("--sample-rate", type=float, default=1.0)
    audit.add_argument("--num-steps", type=int, default=4)
    audit.add_argument("--num-canaries", type=int, default=1000)
    audit.add_argument("--num-guesses", type=int, default=None, help="even; default: a third of the canaries")
    audit.add_argument("--delta", type=float, default=1e-5)
    audit.add_argument("--confidence", type=float, default=0.95)
    audit.add_argument("--seed", type=int, default=0, help="of the coins that put canaries in or out")
    audit.add_argument("--scores", type=Path, help="JSON with scores and included: audit your own canaries")
    audit.add_argument("--claimed-epsilon", type=float, help="the claim that --scores is held against")
    run = commands.add_parser("run", help="train from a recipe")
    run.add_argument(
        "recipe", type=Path, help="YAML: fields of RunConfig and TrainingArguments, DPConfig under dp"
    )
    return parser


def _mode(args: argparse.Namespace) -> dict[str, Any]:
    names = ("num_steps", "delta", "sampling", "sample_rate", "batch_size", "num_records", "accountant")
    return {name: getattr(args, name) for name in names}


def _audit(args: argparse.Namespace) -> TrainerAudit:
    if args.scores is None:
        return audit_trainer(
            DPConfig(noise_multiplier=args.noise_multiplier, delta=args.delta),
            sample_rate=args.sample_rate,
            num_steps=args.num_steps,
            num_canaries=args.num_canaries,
            num_guesses=args.num_guesses,
            confidence=args.confidence,
            seed=args.seed,
        )
    if args.claimed_epsilon is None:
        raise ValueError("--scores needs --claimed-epsilon, the claim that the scores are held against.")
    return audit_file(
        args.scores,
        claimed_epsilon=args.claimed_epsilon,
        delta=args.delta,
        num_guesses=args.num_guesses,
        confidence=args.confidence,
    )


def _train(recipe: Path) -> dict[str, Any]:
    content = read_recipe(recipe)
    # A section of their own: max_grad_norm and seed mean other things in TrainingArguments.
    dp = DPConfig(**content.pop("dp", {}))
    run, args = HfArgumentParser((RunConfig, TrainingArguments)).parse_dict(content)
    trainer = recipe_trainer(run, args, dp)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate() if run.eval_file else {}
    return {**trainer.privacy_report(), **metrics, "output_dir": args.output_dir}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints one JSON line.

    Returns:
        0 if all is well, 1 if an audit refutes its claim, 2 for wrong use.
    """
    args = _parser().parse_args(argv)
    try:
        if args.command == "epsilon":
            spent = epsilon(noise_multiplier=args.noise_multiplier, **_mode(args))
            print(json.dumps({"epsilon": _finite(spent), **_mode(args)}))
        elif args.command == "noise":
            found = noise_multiplier_for(target_epsilon=args.target_epsilon, **_mode(args))
            print(json.dumps({"noise_multiplier": found, **_mode(args)}))
        elif args.command == "audit":
            done = _audit(args)
            verdict = {"claimed_epsilon": _finite(done.claimed_epsilon), "delta": done.delta}
            print(json.dumps({**verdict, **asdict(done.result), "refuted": done.refuted}))
            return 1 if done.refuted else 0
        else:
            print(json.dumps(_train(args.recipe)))
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        print(f"mmhf dp: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
