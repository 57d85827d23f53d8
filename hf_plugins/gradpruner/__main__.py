"""``mmhf gradpruner score | apply | run``: score layers, shorten a checkpoint, or all of it with fine-tuning.

Options come from ``--config recipe.yaml`` and the command line: those of GradPruner, of the command, and
every field of trl's SFTConfig (transformers' TrainingArguments). ``accelerate launch -m
hf_plugins.gradpruner run ...`` runs on several devices.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import SFTConfig, TrlParser

from hf_plugins.gradpruner.callback import GradPrunerCallback
from hf_plugins.gradpruner.config import GradPrunerConfig, RunConfig
from hf_plugins.gradpruner.model import baseline_plan
from hf_plugins.gradpruner.picture import scores_svg
from hf_plugins.gradpruner.plan import PruningPlan, plan_pruning
from hf_plugins.gradpruner.stability import plan_stability
from hf_plugins.gradpruner.storage import (
    HISTORY_FOLDER,
    REPORT_FILE,
    GradientHistory,
    ScoreRecord,
    prune_checkpoint,
    read_scores,
)
from hf_plugins.gradpruner.trainer import calibration_batches, collect, finetune, load_model, model_folder
from hf_plugins.process_group import run_command
from hf_plugins.recipes import check_weights, read_recipe
from hf_plugins.whole_files import write_json

COMMANDS = {
    "score": "train LoRA for a few steps and write layer scores and the plan into --output_dir",
    "apply": "shorten the checkpoint --model by the plan of --scores into --output_dir, as a stream",
    "run": "score, apply, fine-tune the short model, evaluate; everything in --output_dir",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 2 if the command could not run.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<6} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mmhf gradpruner",
        description=__doc__,
        epilog=f"commands (`mmhf gradpruner COMMAND --help` lists its options):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    if not words or words[0].startswith("-"):
        parser.parse_args(words)
    command = parser.parse_args(words[:1]).command
    try:
        options = TrlParser((RunConfig, GradPrunerConfig, SFTConfig), prog=f"mmhf gradpruner {command}")  # type: ignore[arg-type]
        recipe = read_recipe(words[words.index("--config") + 1]) if "--config" in words[:-1] else {}
        if "bf16" not in recipe and "--bf16" not in words and not torch.accelerator.is_available():
            # SFTConfig's own default, bf16, is refused where there is only a CPU.
            words += ["--bf16", "false"]
        run, config, args = options.parse_args_and_config(words[1:])
        run = replace(run, model=model_folder(run.model))
        if Path(run.model).is_dir():
            check_weights(run.model)
        return {"score": _score, "apply": _apply, "run": _run}[command](run, config, args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(record: ScoreRecord, config: GradPrunerConfig, scores: torch.Tensor | None = None) -> PruningPlan:
    return plan_pruning(
        record.scores(score=config.score, normalize=config.normalize) if scores is None else scores,
        n_prune=config.n_prune,
        ratio=config.ratio,
        n_merge=config.n_merge,
        protect=config.protect,
        layers=config.layers,
    )


def _report(
    plan: PruningPlan, config: GradPrunerConfig, record: ScoreRecord | None, folder: Path
) -> dict[str, Any]:
    content: dict[str, Any] = {"plan": plan.to_dict(), "options": vars(config)}
    if record is not None:
        generator = torch.Generator().manual_seed(config.plan_seed)
        by_step = record.by_step(score=config.score, normalize=config.normalize)
        stability = plan_stability(by_step, lambda s: _plan(record, config, s).dropped, generator=generator)
        content["stability"] = stability._asdict()
        content["steps"] = {
            "scored": len(record.norms),
            "zero": record.num_zero,
            "skipped": record.num_skipped,
        }
        if not stability.halves_agree:
            print(
                "warning: the first and the second half of the steps choose different layers; raise num_steps"
            )
    write_json(folder / "plan.json", content)
    (folder / "scores.svg").write_text(scores_svg(plan), encoding="utf-8")
    merged = ", ".join(f"{donor} -> {receiver}" for donor, receiver in plan.merged) or "none"
    print(f"dropped layers: {list(plan.dropped)} of {plan.num_layers}; merged: {merged}")
    print(f"wrote {folder / 'plan.json'} and scores.svg")
    return content


def _score(run: RunConfig, config: GradPrunerConfig, args: SFTConfig) -> int:
    if config.method != "gradpruner":
        raise ValueError(f"method={config.method!r} needs no scoring run; use `apply` or `run`.")
    callback = collect(run, config, args)
    if PartialState().is_main_process:
        folder = Path(args.output_dir)
        callback.save(folder)
        _report(callback.plan(), config, callback.record, folder)
    return 0


def _history(folder: Path, plan: PruningPlan) -> GradientHistory | None:
    return GradientHistory.open(folder / HISTORY_FOLDER) if plan.merged and plan.rule == "same_sign" else None


def _shorten(
    run: RunConfig, config: GradPrunerConfig, args: SFTConfig, scores: Path | None, out: Path
) -> PruningPlan:
    record = None
    if config.method == "gradpruner":
        if scores is None:
            raise ValueError(
                "scores is not set; name the folder that `mmhf gradpruner score` wrote, or another method."
            )
        record = read_scores(scores)
        plan = _plan(record, config)
    else:
        batches = calibration_batches(run, args) if config.method in ("block_influence", "laco") else []
        plan = baseline_plan(load_model(run.model, run, 2), config, batches)
    history = _history(scores, plan) if scores is not None else None
    prune_checkpoint(
        run.model, out, plan, history=history, keep=config.keep, weighting=config.weighting,
        notes={"options": vars(config)},
    )  # fmt: skip
    _report(plan, config, record, out)
    return plan


def _apply(run: RunConfig, config: GradPrunerConfig, args: SFTConfig) -> int:
    out = Path(args.output_dir)
    _shorten(run, config, args, Path(run.scores) if run.scores else None, out)
    print(f"wrote {out}")
    return 0


def _run(run: RunConfig, config: GradPrunerConfig, args: SFTConfig) -> int:
    out = Path(args.output_dir)
    scores, short = out / "scores", out / "model"
    callback: GradPrunerCallback | None = None
    state = PartialState()
    # A run owns its output_dir, as a Trainer does; a folder it did not write is left alone.
    if state.is_main_process and (short / REPORT_FILE).is_file():
        shutil.rmtree(short)
    if config.method == "gradpruner":
        callback = collect(run, config, replace(args, output_dir=str(scores)))
    # One process writes the short model, all read it: every rank then trains the same weights.
    if state.is_main_process:
        if callback is not None:
            callback.save(scores)
        _shorten(run, config, args, scores if callback is not None else None, short)
    state.wait_for_everyone()
    if run.finetune == "none":
        return 0
    metrics = finetune(str(short), run, args)
    if state.is_main_process:
        shutil.copyfile(short / REPORT_FILE, out / "final" / REPORT_FILE)
        write_json(out / "metrics.json", metrics)
        print(metrics)
    return 0


if __name__ == "__main__":
    run_command(main)
