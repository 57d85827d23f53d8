"""``python -m mm_plugins.pkd inspect CONFIG`` and ``python -m mm_plugins.pkd export CHECKPOINT OUT``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader

import mm_plugins  # noqa: F401  (registers the rooms and repairs the checkpoint loader)
from mm_plugins.pkd.detector import export_student, inspect_config
from mm_plugins.pkd.report import format_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 1 if `inspect` found a problem, 2 if the command could not run.
    """
    parser = argparse.ArgumentParser(prog="python -m mm_plugins.pkd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="show levels, strides, channels and weights of a config")
    inspect.add_argument("config", help="training config")
    inspect.add_argument("--cfg-options", nargs="+", action=DictAction, help="KEY=VALUE, as in mmdet's tools")
    export = commands.add_parser("export", help="write the plain student of a distilled run")
    export.add_argument("checkpoint", help="checkpoint of a distilled run")
    export.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args(argv)
    try:
        return _inspect(args) if args.command == "inspect" else _export(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _inspect(args: argparse.Namespace) -> int:
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    init_default_scope(config.get("default_scope", "mmdet"))
    report = inspect_config(config)
    print(format_report(report))
    return 1 if report.problems else 0


def _export(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists. Remove it, or give another name.")
    student = export_student(
        CheckpointLoader.load_checkpoint(args.checkpoint, map_location="cpu", logger=None)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that a reader never sees half a file.
    aside = args.out.with_name(args.out.name + ".part")
    try:
        torch.save(student, aside)
        os.replace(aside, args.out)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{args.out}: {len(student['state_dict'])} entries")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
