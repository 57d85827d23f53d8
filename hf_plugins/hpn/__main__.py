"""Command line: ``mmhf hpn search RECIPE``, then ``mmhf hpn deploy FOLDER``; ``mmhf hpn picture FOLDER``."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_plugins import recipes
from hf_plugins.hpn.config import read_recipe
from hf_plugins.hpn.dataset import make_federation
from hf_plugins.hpn.picture import picture
from hf_plugins.hpn.server import HPNRun
from hf_plugins.hpn.space import space_from
from hf_plugins.process_group import run_command
from hf_plugins.whole_files import write_json


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmhf hpn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search", help="anchor and search; the same line goes on after a kill")
    search.add_argument("recipe", type=Path, help="YAML: options of HPNConfig and TaskConfig")
    search.add_argument("--output-dir", type=Path, help="instead of the recipe's")
    search.add_argument("--method", help="instead of the recipe's")
    search.add_argument("--seed", type=int, help="instead of the recipe's")
    deploy = commands.add_parser("deploy", help="train under the configs that a search has found")
    deploy.add_argument("folder", type=Path, help="output_dir of the search")
    drawn = commands.add_parser("picture", help="chosen hyper-parameters of each client as an SVG")
    drawn.add_argument("folder", type=Path, help="output_dir of the search")
    return parser


def _run(recipe: Mapping[str, Any]) -> HPNRun:
    config, task = read_recipe(recipe)
    space = space_from(task.space, grid_size=task.grid_size, grid_kind=task.grid_kind)
    federation = make_federation(task.task, task.task_args, config)
    return HPNRun(federation, space, config, Path(task.output_dir))


def _search(args: argparse.Namespace) -> dict[str, Any]:
    content = recipes.read_recipe(args.recipe)
    read_recipe(content)
    given = {"output_dir": args.output_dir, "method": args.method, "seed": args.seed}
    content |= {key: str(v) if isinstance(v, Path) else v for key, v in given.items() if v is not None}
    run = _run(content)
    write_json(run.folder / "recipe.json", content)
    configs = run.search()
    best = run.federation.known_best
    right = (
        {"known_best_found": sum(configs[client] == config for client, config in best.items()) / len(best)}
        if best
        else {}
    )
    found = json.loads((run.folder / "search.json").read_text(encoding="utf-8"))
    return {
        "output_dir": str(run.folder),
        "rounds_used": found["rounds_used"],
        **found["privacy"],
        **right,
        "next": f"mmhf hpn deploy {run.folder}",
    }


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `mmhf hpn search RECIPE` to its end first.")
    return json.loads(path.read_text(encoding="utf-8"))


def _deploy(args: argparse.Namespace) -> dict[str, Any]:
    found = _read(args.folder, "search.json")
    run = _run(_read(args.folder, "recipe.json") | {"output_dir": str(args.folder)})
    result = run.deploy({int(client): config for client, config in found["configs"].items()})
    return {key: result[key] for key in ("metric", "records", "global", "personal")}


def _picture(args: argparse.Namespace) -> dict[str, Any]:
    found = _read(args.folder, "search.json")
    path = args.folder / "configs.svg"
    path.write_text(picture(found["configs"]), encoding="utf-8")
    return {"written": str(path)}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints one JSON line.

    Returns:
        0 if all is well, 2 for wrong use.
    """
    args = _parser().parse_args(argv)
    command = {"search": _search, "deploy": _deploy, "picture": _picture}[args.command]
    try:
        print(json.dumps(command(args)))
    except ModuleNotFoundError:
        raise  # `mmhf` names the extra that brings it.
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"mmhf hpn {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
