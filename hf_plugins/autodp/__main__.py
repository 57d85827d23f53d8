"""``mmhf autodp search | apply | report``: find the data-processing strategy for a fine-tuning set, run
it.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hf_plugins import recipes
from hf_plugins.autodp.config import AutoDPConfig
from hf_plugins.process_group import run_command
from hf_plugins.whole_files import write_text

_LISTS = {
    "space": ("teams", "ops"),
    "search": ("agent", "exhaustive", "random", "halving", "mcts", "hybrid"),
    "prompt": ("json", "paper_zh"),
    "sampler": ("stratified", "herding", "random", "centrality", "graph_cut"),
    "screening": ("off", "teacher", "column"),
    "metric": ("loss", "winrate"),
    "select": ("less", "deita"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 1 if no strategy beats the raw data, 2 if the command could not run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _quiet()
    try:
        commands = {"search": _search, "apply": _apply, "report": _report, "demo": _demo}
        return (commands | {"evaluate": _evaluate})[args.command](args)
    except ModuleNotFoundError:
        raise  # `mmhf` names the extra that brings it.
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _quiet() -> None:
    """Bars of the many small steps would hide the lines that tell how far the search is."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


def _say(line: str) -> None:
    print(line, flush=True)


def _search(args: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "start a search as one process; it starts the trainings itself (launch: '--num_processes 4' "
            "for several processes each, workers for several at once)."
        )
    from hf_plugins.autodp.strategy import AutoDP

    paths, config = _recipe(args)
    if args.model is None and paths["model"] is None:
        raise ValueError("model must be given, on the command line or in the recipe.")
    tuner = AutoDP(paths["model"], config, cache=args.cache)
    held_out = {name: paths[name] for name in ("dev", "test", "anchors")}
    result = tuner.search(
        paths["data"], args.out, **held_out, question=args.question, answer=args.answer, show=_say
    )
    _write_page(args.out, result)
    final = result["final"]
    print(
        f"chosen: {result['chosen_key']} ({final['score']:+.4f}, {final['low']:+.4f} to "
        f"{final['high']:+.4f} on the test questions); see {args.out / 'report.html'}. On all rows: mmhf "
        f"autodp apply {args.out / 'recipe.yaml'} {paths['data']} --out DIR"
    )
    return 0 if result["chosen"] else 1


def _apply(args: argparse.Namespace) -> int:
    from hf_plugins.autodp.strategy import AutoDP, read_recipe

    recipe = read_recipe(args.recipe)
    config = AutoDPConfig(**recipe.get("config", {}) | ({} if args.reuse else {"reuse": False}))
    model = args.model or recipe.get("model")
    rows = AutoDP(model, config, cache=args.cache).apply(
        recipe, args.data, args.out, question=args.question, answer=args.answer, show=_say
    )
    print(f"{len(rows)} rows: {args.out / 'rows.jsonl'}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    """Search on generated rows of which half are spoilt, with a tiny fresh model: a first look without
    files.
    """
    from hf_plugins.autodp.model import write_demo

    folder = args.out / "demo"
    write_demo(folder)
    words = ["search", str(folder / "rows.jsonl"), "--model", str(folder / "model")]
    words += [
        "--dev",
        str(folder / "dev.jsonl"),
        "--test",
        str(folder / "test.jsonl"),
        "--out",
        str(args.out),
    ]
    words += "--metric loss --search exhaustive --sample-ratio 1 --num-anchors 8 --num-steps 16".split()
    words += "--batch-size 8 --device-batch-size 8 --learning-rate 5e-3 --lora-r 0 --max-length 96".split()
    words += "--min-tokens 8 --less-checkpoints 1 --less-warmup 0.2 --projection-dim 256".split()
    return main([*words, "--no-isolate", "--use-cpu"])


def _report(args: argparse.Namespace) -> int:
    path = args.folder / "result.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; `mmhf autodp search --out {args.folder}` writes it when it is done."
        )
    _write_page(args.folder, json.loads(path.read_text(encoding="utf-8")))
    print(args.folder / "report.html")
    return 0


def _write_page(folder: Path, result: dict[str, Any]) -> None:
    from hf_plugins.autodp.page import render_page

    write_text(folder / "report.html", render_page(result))


def _evaluate(args: argparse.Namespace) -> int:
    from hf_plugins.autodp.trainer import TrainJob, run_job

    result = run_job(TrainJob(**json.loads(args.job.read_text(encoding="utf-8"))))
    print(f"{result['steps']} updates")
    return 0


def _recipe(args: argparse.Namespace) -> tuple[dict[str, Any], AutoDPConfig]:
    """Paths and options: those of the recipe, overridden by the command line's."""
    values: dict[str, Any] = {}
    if args.config:
        values = recipes.read_recipe(args.config)
    names = ("data", "model", "dev", "test", "anchors")
    paths = {name: getattr(args, name, None) or values.pop(name, None) for name in names}
    for name in names:
        values.pop(name, None)
    known = {field.name for field in fields(AutoDPConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"the recipe has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}."
        )
    if paths["data"] is None:
        raise ValueError("data must be given, on the command line or in the recipe.")
    given = {name: value for name, value in vars(args).items() if name in known}
    return paths, AutoDPConfig(**values | given)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Every plain field of `AutoDPConfig`; absent ones stay absent, so that a recipe can give them."""
    for field in fields(AutoDPConfig):
        if field.default is MISSING:
            continue
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(flag, type=type(field.default), choices=_LISTS.get(field.name), **common)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmhf autodp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search", help="find the strategy; the same command goes on after a stop")
    search.add_argument("data", nargs="?", help="rows: .jsonl, .csv (also .gz), .parquet or an Arrow folder")
    search.add_argument("--model", help="folder of the model that is tuned")
    for name, text in (
        ("dev", "held-out rows that strategies are compared on; some of DATA otherwise"),
        ("test", "held-out rows for the report; some of DATA otherwise"),
        ("anchors", "rows the model should become good at, for LESS; some of --dev otherwise"),
    ):
        search.add_argument(f"--{name}", help=text)
    search.add_argument("--out", type=Path, default=Path("autodp"), help="folder of the run")
    search.add_argument(
        "--config", type=Path, help="YAML recipe: paths and the options below; the command line wins"
    )
    apply = commands.add_parser("apply", help="run the chosen strategy on all rows")
    apply.add_argument("recipe", type=Path, help="recipe.yaml of a search")
    apply.add_argument("data", help="rows")
    apply.add_argument("--model", help="folder of the model, if it has moved")
    apply.add_argument("--out", type=Path, required=True, help="folder of the processed rows")
    apply.add_argument("--reuse", action=argparse.BooleanOptionalAction, default=True, help="use the cache")
    for each in (search, apply):
        each.add_argument("--question", default="", help="column of questions")
        each.add_argument("--answer", default="", help="column of answers")
        each.add_argument("--cache", type=Path, help="cache folder, may be shared; OUT/cache otherwise")
    _add_options(search)
    report = commands.add_parser("report", help="write report.html again from result.json")
    report.add_argument("folder", type=Path, help="folder of the run")
    demo = commands.add_parser("demo", help="a search on generated rows with a tiny model, under a minute")
    demo.add_argument("--out", type=Path, default=Path("work_dirs/autodp_demo"), help="folder of the run")
    evaluate = commands.add_parser("evaluate", help="run one evaluation (what a search starts by itself)")
    evaluate.add_argument("job", type=Path, help="job.json")
    return parser


if __name__ == "__main__":
    run_command(main)
