"""``mmhf fapm BASE FINETUNED OUT --keep 0.1``: prune a fine-tuned model's task vector; also add and remove
sidecars, draw the keep curve, and run mergekit with the method ``fapm``.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hf_plugins.fapm.config import FAPMConfig
from hf_plugins.fapm.model import apply_sidecar, fapm_prune_checkpoint
from hf_plugins.process_group import run_command
from hf_plugins.recipes import read_recipe

COMMANDS = ("prune", "add", "remove", "curve", "mergekit", "demo")
_CHOICES = {
    "method": ("fapm", "magnitude", "relative", "dare", "ties", "wise_ft"),
    "scope": ("tensor", "global"),
    "out_dtype": ("float32", "bfloat16", "float16"),
}


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Every field of `FAPMConfig` with its help; absent ones stay absent, so that a recipe can give them."""
    for field in fields(FAPMConfig):
        flag, help_text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        default = field.default if field.default is not MISSING else None
        common: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
        if field.name == "per_tensor":
            parser.add_argument(flag, action="append", metavar="REGEX=KEEP", **common)
        elif isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            kind = type(default) if isinstance(default, int | float) else str
            parser.add_argument(flag, type=kind, choices=_CHOICES.get(field.name), **common)
    parser.add_argument("--config", type=Path, help="YAML recipe: base, finetuned, out and the options above")


def _per_tensor(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for item in given:
        pattern, separator, keep = item.rpartition("=")
        if not separator:
            raise ValueError(f"per_tensor needs REGEX=KEEP, for example 'mlp=0.05'; got {item!r}.")
        found[pattern] = float(keep)
    return found


def _recipe(args: argparse.Namespace) -> tuple[dict[str, Any], FAPMConfig]:
    """Paths and options: the recipe's, overridden by the command line's."""
    values: dict[str, Any] = {}
    if args.config:
        values = read_recipe(args.config)
    paths = {
        name: getattr(args, name, None) or values.pop(name, None) for name in ("base", "finetuned", "out")
    }
    for name in ("base", "finetuned", "out"):
        values.pop(name, None)
    known = {field.name for field in fields(FAPMConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"the recipe has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}."
        )
    given = {name: value for name, value in vars(args).items() if name in known}
    if "per_tensor" in given:
        given["per_tensor"] = _per_tensor(given["per_tensor"])
    if lacking := [name for name, value in paths.items() if value is None and name in vars(args)]:
        raise ValueError(f"{', '.join(lacking)} must be given, on the command line or in the recipe.")
    return paths, FAPMConfig(**values | given)


def _prune(args: argparse.Namespace) -> int:
    paths, config = _recipe(args)
    report = fapm_prune_checkpoint(paths["base"], paths["finetuned"], paths["out"], config)
    if int(os.environ.get("RANK", "0")) == 0:
        totals = report["totals"]
        print(
            f"{totals['tensors_pruned']} tensors, {totals['kept']:,} of {totals['entries']:,} entries "
            f"kept, effective density {totals['effective_density']:.4f}, {report['seconds']:.1f} s -> "
            f"{paths['out']}"
        )
    return 0


def _sidecar(args: argparse.Namespace) -> int:
    out = apply_sidecar(args.model, args.sidecar, args.out, remove=args.command == "remove")
    print(f"written: {out}")
    return 0


def _curve(args: argparse.Namespace) -> int:
    from hf_plugins.fapm.metric import checkpoint_curve, plot_curve

    paths, config = _recipe(args)
    rows = checkpoint_curve(paths["base"], paths["finetuned"], args.keeps, config)
    if args.general or args.downstream:
        quality = _text_curve(args, paths, config)
        rows = [row | more for row, more in zip(rows, quality, strict=True)]
    print(json.dumps(rows, indent=1))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot_curve(rows, args.plot)
    return 0


def _text_curve(
    args: argparse.Namespace, paths: dict[str, Any], config: FAPMConfig
) -> list[dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_plugins.fapm.metric import log_probabilities, model_curve, text_quality

    tokenizer = AutoTokenizer.from_pretrained(paths["base"])
    model = AutoModelForCausalLM.from_pretrained(paths["base"], dtype=torch.float32).eval()
    texts = {name: getattr(args, name) for name in ("general", "downstream") if getattr(args, name)}
    rows = {}
    for name, path in texts.items():
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        length = min(args.length, len(ids))
        rows[name] = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[: args.rows]
    with torch.no_grad():
        # Only the first rows: log-probabilities of the whole vocabulary are large.
        reference = log_probabilities(model, rows["general"][:8]) if "general" in rows else None

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, ids in rows.items():
            found |= {f"{name}_{key}": value for key, value in text_quality(model, ids).items()}
        if reference is not None:
            found["general_kl"] = text_quality(model, rows["general"][:8], reference=reference)["kl"]
        return found

    return model_curve(model, paths["base"], paths["finetuned"], args.keeps, evaluate, config)


def _mergekit(args: argparse.Namespace) -> int:
    from hf_plugins.fapm.strategy import register_mergekit

    register_mergekit()
    from mergekit.scripts.run_yaml import main as run_yaml

    run_yaml([args.merge_config, args.out, *args.options], standalone_mode=False)
    return 0


def _demo(args: argparse.Namespace) -> int:
    """Prune a tiny random model that was moved a little, so that the first look needs no files."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
    with tempfile.TemporaryDirectory() as aside:
        folder = args.folder or Path(aside)
        base, tuned, out = (folder / name for name in ("base", "finetuned", "out"))
        model.save_pretrained(base)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=1e-3)
        model.save_pretrained(tuned)
        code = main([str(base), str(tuned), str(out), "--keep", str(args.keep)])
        loaded = type(AutoModelForCausalLM.from_pretrained(out)).__name__
        print(f"reloaded: {loaded}; files: {sorted(os.listdir(out))}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmhf fapm",
        description=__doc__,
        epilog="`mmhf fapm BASE FINETUNED OUT` is short for `mmhf fapm prune BASE FINETUNED OUT`.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prune = commands.add_parser("prune", help="write the pruned model (the default command)")
    for name in ("base", "finetuned", "out"):
        prune.add_argument(
            name, nargs="?", help={"finetuned": "model or LoRA adapter folder"}.get(name, "folder")
        )
    _add_options(prune)
    for name, text in (("add", "base and sidecar to the full model"), ("remove", "take a sidecar out again")):
        each = commands.add_parser(name, help=text)
        for argument in ("model", "sidecar", "out"):
            each.add_argument(argument, help="folder")
    curve = commands.add_parser("curve", help="what many keeps would give, in one pass")
    for name in ("base", "finetuned"):
        curve.add_argument(name, nargs="?", help="folder")
    curve.add_argument("--keeps", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
    curve.add_argument("--general", type=Path, help="text that must not be forgotten")
    curve.add_argument("--downstream", type=Path, help="text of the task")
    curve.add_argument("--rows", type=int, default=64, help="rows of each text that are measured")
    curve.add_argument("--length", type=int, default=256, help="tokens of a row")
    curve.add_argument("--json", type=Path, help="where the figures go")
    curve.add_argument("--plot", type=Path, help="where the picture goes (.svg, .png)")
    _add_options(curve)
    merge = commands.add_parser("mergekit", help="run a mergekit config that uses merge_method: fapm")
    merge.add_argument("merge_config", help="mergekit's YAML")
    merge.add_argument("out", help="folder")
    merge.add_argument("options", nargs=argparse.REMAINDER, help="options of mergekit-yaml")
    demo = commands.add_parser("demo", help="prune a tiny random model, in seconds")
    demo.add_argument("--keep", type=float, default=0.1)
    demo.add_argument("--folder", type=Path, help="where the models stay; by default nothing is left behind")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 fine, 2 wrong use or inputs that do not fit)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in COMMANDS and argv[0] not in ("-h", "--help"):
        argv = ["prune", *argv]
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    run = {"prune": _prune, "curve": _curve, "mergekit": _mergekit, "demo": _demo}.get(args.command, _sidecar)
    try:
        return run(args)
    except ModuleNotFoundError:
        raise  # `mmhf` names the extra that brings it.
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.stderr.write(f"mmhf fapm: {error}\n")
        return 2


if __name__ == "__main__":
    run_command(main)
