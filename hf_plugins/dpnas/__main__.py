"""``mmhf dpnas search|train``: search a cell on private images, or train a DPNASNet with DP-SGD."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from hf_plugins.dp import DPConfig
from hf_plugins.dpnas.agent import search
from hf_plugins.dpnas.config import DPNASSearchConfig, DPNASTrainConfig
from hf_plugins.dpnas.dataset import load_images
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification
from hf_plugins.dpnas.trainer import ImageRecords, make_trainer, save_for_pipeline
from hf_plugins.process_group import run_command
from hf_plugins.recipes import read_recipe


def _search(argv: Sequence[str]) -> int:
    parser = HfArgumentParser(DPNASSearchConfig, prog="mmhf dpnas search")
    parser.add_argument("data", help="folder with the images: IDX files (MNIST form) or Parquet")
    parser.add_argument(
        "out", help="folder for the state and search.json; an interrupted search goes on from it"
    )
    parser.add_argument("--split", default="train", help="first letters of the files to read")
    config, places = parser.parse_args_into_dataclasses(list(argv))
    images, labels = load_images(places.data, places.split)

    def show(done: int, whole: int) -> None:
        if done % 10 == 0 or done == whole:
            print(f"step {done}/{whole}", file=sys.stderr, flush=True)

    result = search(config, images, labels, places.out, progress=show)
    print(f"cell: {result.genotype.describe()}")
    cost = (
        f"epsilon {result.epsilon:.3f} at delta {config.delta:g}"
        if result.private
        else "architecture not private"
    )
    print(f"cost: {cost}")
    print(f"written: {Path(places.out) / 'search.json'}")
    return 0


def _train(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mmhf dpnas train")
    parser.add_argument(
        "recipe", type=Path, help="YAML: DPNASTrainConfig and TrainingArguments, DPConfig under dp:"
    )
    recipe = read_recipe(parser.parse_args(argv).recipe)
    if not isinstance(recipe.get("dp"), dict):
        raise ValueError("the recipe needs a section dp: that holds the options of DPConfig.")
    # DPConfig stands apart: TrainingArguments has a max_grad_norm and a seed too, and they mean something
    # else.
    try:
        dp = DPConfig(**recipe.pop("dp"))
    except TypeError as error:
        raise ValueError(f"section dp: {error}") from error
    run, args = HfArgumentParser((DPNASTrainConfig, TrainingArguments)).parse_dict(recipe)
    shape = DPNASNetConfig.preset(run.preset)
    if run.cell_file is not None:
        found = json.loads(Path(run.cell_file).read_text(encoding="utf-8"))
        shape = DPNASNetConfig.preset(run.preset, genotype=found["genotype"], fifth=found["config"]["space"])
    train = ImageRecords(*(part[: run.limit] for part in load_images(run.data, run.train_split)))
    evaluation = None if run.eval_split is None else ImageRecords(*load_images(run.data, run.eval_split))
    model = DPNASNetForImageClassification(shape)
    trainer = make_trainer(model, args, dp, train, evaluation, momentum=run.momentum)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    save_for_pipeline(trainer, Path(args.output_dir))
    if evaluation is not None:
        print(json.dumps(trainer.evaluate(), indent=1))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the sub-command, hand the rest to it; wrong input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="mmhf dpnas", description=__doc__)
    parser.add_argument("command", choices=("search", "train"))
    options, rest = parser.parse_known_args(argv)
    try:
        return {"search": _search, "train": _train}[options.command](rest)
    except (ValueError, OSError) as error:
        print(f"mmhf dpnas {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_command(main)
